"""What the backends are compared with: the policy in PyTorch on the same device."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqbet_bench.timing import Latency, measure
from vqbet_edge.errors import BackendError
from vqbet_edge.model.checkpoint import Checkpoint, load_checkpoint

Observation = Mapping[str, Any]


def lerobot_eager(
    checkpoint: str, observation: Observation, device: str, runs: int, *, compiled: bool
) -> Latency:
    """A re-planning `select_action` of LeRobot's own policy, frame upload included.

    Args:
        checkpoint: a directory that LeRobot loads.
        observation: numpy, as `EdgePolicy` takes it.
        device: torch's name of it.
        runs: how many to time.
        compiled: compile the network with `torch.compile` first.

    Raises:
        BackendError: LeRobot is not installed or does not load the checkpoint.
    """
    try:
        from lerobot.policies.vqbet.modeling_vqbet import VQBeTPolicy  # noqa: PLC0415

        policy: Any = VQBeTPolicy.from_pretrained(checkpoint).eval().to(device)
    except Exception as error:
        raise BackendError(f"LeRobot cannot be measured: {error}") from error
    if compiled:
        policy.vqbet = torch.compile(policy.vqbet)

    @torch.no_grad()
    def act() -> None:
        policy.select_action(_batch(observation, device)).cpu()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy.reset()
        queue = policy._queues["action"]  # noqa: SLF001 - when it is empty, LeRobot re-plans
        return measure(act, runs, queue.clear)


def network_compiled(checkpoint: str, observation: Observation, device: str, runs: int) -> Latency:
    """The training network over a whole window, `torch.compile` with CUDA graphs, FP16 weights.

    It stops at the features: sampling and decoding are not included.
    """
    loaded = load_checkpoint(checkpoint)
    network = loaded.network.to(device, torch.float16 if device == "cuda" else torch.float32)
    forward = torch.compile(network, mode="reduce-overhead")
    images, states = _window(loaded, observation, device, next(network.parameters()).dtype)

    @torch.no_grad()
    def run() -> None:
        forward(images, states).cpu()

    return measure(run, runs, lambda: None)


def attempt(call: Callable[[], Latency]) -> Latency | str:
    """A measurement, or why there is none: one peer that fails must not lose the others."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises
        return f"not measured: {type(error).__name__}: {str(error)[:300]}"


def _batch(observation: Observation, device: str) -> dict[str, Tensor]:
    batch = {}
    for key, value in observation.items():
        tensor = torch.from_numpy(np.asarray(value)).to(device)
        image = tensor.ndim == 3
        batch[key] = (tensor.permute(2, 0, 1) / 255 if image else tensor.float())[None]
    return batch


def _window(
    checkpoint: Checkpoint, observation: Observation, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Images (1, N, K, 3, H, W) and states (1, N, S): the same observation N times."""
    config, batch = checkpoint.config, _batch(observation, device)
    names = {key: checkpoint.renamed.get(key, key) for key in config.input_features}
    images = torch.stack([batch[names[key]] for key in config.image_keys], dim=1)
    states = batch[names["observation.state"]]
    repeats = config.n_obs_steps
    return (
        images[:, None].expand(-1, repeats, -1, -1, -1, -1).to(dtype).contiguous(),
        states[:, None].expand(-1, repeats, -1).to(dtype).contiguous(),
    )
