"""Policies as the evaluation drives them: a slot per environment that runs at the same time."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqbet_edge import EdgePolicy
from vqbet_edge.runtime.backends import BackendName
from vqbet_edge.runtime.backends.base import HeadOutputs
from vqbet_edge.runtime.guards import Guards
from vqbet_edge.runtime.sampling import CodeSampler
from vqbet_edge.training.checkpoint import Checkpoint, load_checkpoint
from vqbet_edge.training.config import STATE_KEY
from vqbet_edge.training.network import ActionHead
from vqbet_edge.training.normalization import scale_images

Floats = npt.NDArray[np.float32]
Observations = Mapping[str, npt.NDArray[Any]]  # a leading axis of slots


@dataclass(frozen=True)
class ActorOptions:
    """How a policy is driven.

    Attributes:
        backend: who runs a bundle.
        temperature: of the code distribution; None takes the policy's, 0 is greedy.
        replan_every: predict anew after so many actions; None executes whole chunks.
    """

    backend: BackendName = "auto"
    temperature: float | None = None
    replan_every: int | None = None


class Actor(Protocol):
    """One policy, driving several environments at once."""

    def reset(self, slot: int, seed: int) -> None:
        """Begin an episode in a slot."""

    def act(self, observations: Observations) -> Floats:
        """Actions (slots, A) for observations with a leading axis of slots."""


def load_actor(source: str, slots: int, options: ActorOptions) -> Actor:
    """A bundle or a checkpoint, by what is there.

    Raises:
        CheckpointError: it is neither, or not whole.
        BundleError: the bundle is not whole.
    """
    if (Path(source) / "manifest.json").is_file():
        return BundleActor.load(source, slots, options)
    return TorchActor(load_checkpoint(source), slots, options)


class BundleActor:
    """A bundle on any backend; every slot has a policy of its own."""

    def __init__(self, policies: Sequence[EdgePolicy]) -> None:
        self._policies = policies

    @classmethod
    def load(cls, source: str, slots: int, options: ActorOptions) -> "BundleActor":
        """Open a bundle once per slot."""
        return cls(
            [
                EdgePolicy.load(
                    source,
                    options.backend,
                    temperature=options.temperature,
                    replan_every=options.replan_every,
                    guards=Guards(action_limits=None),  # a checkpoint to compare with has none
                )
                for _ in range(slots)
            ]
        )

    def reset(self, slot: int, seed: int) -> None:
        """See `Actor`."""
        self._policies[slot].reset(seed)

    def act(self, observations: Observations) -> Floats:
        """See `Actor`."""
        rows = [{k: v[i] for k, v in observations.items()} for i in range(len(self._policies))]
        actions = [p.act(row) for p, row in zip(self._policies, rows, strict=True)]
        return np.stack(actions)


class TorchActor:
    """A checkpoint in PyTorch; draws codes from the same random sequence as a bundle does."""

    def __init__(self, checkpoint: Checkpoint, slots: int, options: ActorOptions) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = checkpoint.network.to(self._device)
        self._config = config = checkpoint.config
        self._keys = [checkpoint.renamed.get(k, k) for k in config.image_keys]
        self._state_key = checkpoint.renamed.get(STATE_KEY, STATE_KEY)
        self._image_scalings = [checkpoint.inputs[key] for key in config.image_keys]
        self._state_scaling, self._action_scaling = checkpoint.inputs[STATE_KEY], checkpoint.action
        self._replan_every = options.replan_every or config.action_chunk_size
        self._windows: list[deque[tuple[Tensor, Tensor]]] = [
            deque(maxlen=config.n_obs_steps) for _ in range(slots)
        ]
        self._queues: list[deque[Floats]] = [deque() for _ in range(slots)]
        trained = config.bet_softmax_temperature
        temperature = trained if options.temperature is None else options.temperature
        columns = _secondary_columns(checkpoint)
        self._samplers = [CodeSampler(temperature, trained, columns, 0) for _ in range(slots)]

    def reset(self, slot: int, seed: int) -> None:
        """See `Actor`."""
        self._windows[slot].clear()
        self._queues[slot].clear()
        self._samplers[slot].reseed(seed)

    def act(self, observations: Observations) -> Floats:
        """See `Actor`."""
        images = np.stack([observations[key] for key in self._keys], axis=1)  # (B, K, H, W, 3)
        states = self._state_scaling.apply(observations[self._state_key].astype(np.float32))
        for slot, window in enumerate(self._windows):
            newest = torch.from_numpy(images[slot]), torch.from_numpy(states[slot])
            # The first observation fills the window, as in LeRobot's `populate_queues`.
            window.extend([newest] * (1 if window else self._config.n_obs_steps))
        empty = [slot for slot, queue in enumerate(self._queues) if not queue]
        if empty:
            self._plan(empty)
        return np.stack([queue.popleft() for queue in self._queues])

    @torch.no_grad()
    def _plan(self, slots: Sequence[int]) -> None:
        images = torch.stack([torch.stack([w[0] for w in self._windows[s]]) for s in slots])
        states = torch.stack([torch.stack([w[1] for w in self._windows[s]]) for s in slots])
        pixels = self._to_network_units(images.to(self._device))
        features = self._network(pixels, states.to(self._device))[:, self._config.n_obs_steps - 1]
        for slot, chunk in zip(slots, self.chunks(features, slots), strict=True):
            actions = self._action_scaling.apply(chunk)
            self._queues[slot].extend(actions[: self._replan_every])

    def chunks(self, features: Tensor, slots: Sequence[int]) -> Floats:
        """(M, D) of the current step -> (M, W, A), normalised."""
        head = self._network.head
        logits, offsets = _base_logits(head, features), head.offsets(features).cpu().numpy()
        codes = np.stack(
            [
                self._samplers[slot].choose(HeadOutputs(logits[i], offsets[i])).codes
                for i, slot in enumerate(slots)
            ]
        )
        decoded = head.vqvae_model.decode(torch.from_numpy(codes).to(self._device)).cpu().numpy()
        rows = np.arange(len(codes))
        chosen: Floats = offsets[rows, 0, codes[:, 0]] + offsets[rows, 1, codes[:, 1]]
        return decoded + chosen

    def _to_network_units(self, images: Tensor) -> Tensor:
        """uint8 (B, N, K, H, W, 3) -> float32 (B, N, K, 3, H, W), normalised."""
        pixels = images.movedim(-1, -3).float() / 255
        parts = [scale_images(pixels[:, :, k], s) for k, s in enumerate(self._image_scalings)]
        return torch.stack(parts, dim=2)


def _base_logits(head: ActionHead, features: Tensor) -> Floats:
    """(M, 2, C); the sequential head's secondary ones lack the primary code's column.

    `CodeSampler` adds that, the same for a checkpoint as for a bundle.
    """
    if head.sequential:
        none = features.new_zeros(len(features), head.num_codes)
        secondary = head.map_to_cbet_preds_secondary_bin(torch.cat([features, none], dim=-1))
        both = torch.stack([head.primary_logits(features), secondary], dim=1)
    else:
        both = head.code_logits(features, torch.empty(0))
    logits: Floats = both.cpu().numpy()
    return logits


def _secondary_columns(checkpoint: Checkpoint) -> Floats | None:
    head = checkpoint.network.head
    if not head.sequential:
        return None
    weight: Tensor = head.map_to_cbet_preds_secondary_bin[0].weight  # type: ignore[assignment]
    columns: Floats = weight.detach()[:, checkpoint.config.gpt_output_dim :].T.numpy()
    return columns
