"""LeRobot's own VQ-BeT, the reference for ours.

It is imported inside functions only: tests that do not need it run without it.
"""

import importlib
import importlib.metadata
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

STATE, ACTION = "observation.state", "action"


def newest() -> bool:
    """Whether the LeRobot here is 0.6.1, which needs Python 3.12, and not 0.4.4."""
    try:
        return importlib.metadata.version("lerobot") >= "0.6"
    except importlib.metadata.PackageNotFoundError:
        return False


def lerobot(name: str) -> Any:
    """A module of LeRobot; in CI its absence is a failure, elsewhere a skip."""
    try:
        return importlib.import_module(f"lerobot.{name}")
    except ImportError:
        if os.environ.get("CI"):
            raise
        pytest.skip("LeRobot is not installed; `make test` installs it")


@dataclass(frozen=True)
class Case:
    """A policy to compare: what differs from LeRobot's defaults, and the robot's sizes."""

    name: str
    image: tuple[int, int] = (96, 96)
    state_dim: int = 2
    action_dim: int = 2
    cameras: int = 1
    seed: int = 0
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def image_keys(self) -> list[str]:
        if self.cameras == 1:
            return ["observation.image"]
        return [f"observation.images.camera_{k}" for k in range(self.cameras)]


SMALL = {
    "gpt_n_layer": 2,
    "gpt_n_head": 4,
    "gpt_hidden_dim": 64,
    "gpt_input_dim": 96,
    "gpt_output_dim": 80,
    "vqvae_embedding_dim": 32,
    "vqvae_enc_hidden_dim": 48,
    "spatial_softmax_num_keypoints": 16,
    "use_group_norm": False,
}


def small(name: str, **changes: Any) -> Case:
    """A policy with a small transformer."""
    own = ("image", "state_dim", "action_dim", "cameras", "seed")
    sizes = {key: changes.pop(key) for key in own if key in changes}
    return Case(name, **sizes, fields={**SMALL, **changes})


CASES = [
    Case("default", fields={"use_group_norm": False}),
    small("sequential", sequentially_select=True),
    small("group_norm_window_1", use_group_norm=True, n_obs_steps=1, n_action_pred_token=7),
    small("resnet34_window_7", vision_backbone="resnet34", gpt_n_layer=1, n_obs_steps=7,
          bet_softmax_temperature=0.5),
    small("resnet50", vision_backbone="resnet50", vqvae_n_embed=24),
    small("arm", image=(120, 160), state_dim=7, action_dim=6, action_chunk_size=8,
          crop_shape=(105, 144)),
    small("chunk_1_no_crop", action_chunk_size=1, crop_shape=None, n_action_pred_token=1),
    small("two_cameras", cameras=2, image=(80, 72), crop_shape=(64, 64), vqvae_n_embed=8),
]  # fmt: skip

TINY = small("tiny", image=(40, 48), crop_shape=(36, 40))


def make_policy(case: Case) -> Any:
    """An untrained LeRobot policy whose norms and code books have lived a little."""
    types = lerobot("configs.types")
    configuration = lerobot("policies.vqbet.configuration_vqbet")
    modeling = lerobot("policies.vqbet.modeling_vqbet")
    feature, kind = types.PolicyFeature, types.FeatureType
    config = configuration.VQBeTConfig(
        input_features={
            **{key: feature(kind.VISUAL, (3, *case.image)) for key in case.image_keys},
            STATE: feature(kind.STATE, (case.state_dim,)),
        },
        output_features={ACTION: feature(kind.ACTION, (case.action_dim,))},
        pretrained_backbone_weights=None,
        device="cpu",
        **case.fields,
    )
    torch.manual_seed(case.seed)
    # Upstream's network takes several cameras, only its validation does not.
    with mock.patch.object(configuration.VQBeTConfig, "validate_features"):
        policy = modeling.VQBeTPolicy(config).eval()
    for module in policy.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.uniform_(module.weight, 0.7, 1.3)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.6, 1.5)
    policy.vqbet.action_head.vqvae_model.discretized.fill_(True)
    return policy


def make_statistics(case: Case) -> dict[str, dict[str, torch.Tensor]]:
    """Statistics of a data set in the hundreds, as pixels or degrees are."""
    random = torch.Generator().manual_seed(case.seed)
    stats = {}
    for key, dim in ((STATE, case.state_dim), (ACTION, case.action_dim)):
        low = torch.rand(dim, generator=random) * 50
        stats[key] = {"min": low, "max": low + 100 + torch.rand(dim, generator=random) * 300}
        stats[key] |= {"mean": low + 60, "std": low + 20}
    return stats


def make_processors(policy: Any, case: Case) -> tuple[Any, Any]:
    """LeRobot's pre- and post-processor of a policy."""
    module = lerobot("policies.vqbet.processor_vqbet")
    before, after = module.make_vqbet_pre_post_processors(policy.config, make_statistics(case))
    return before, after


def save_checkpoint(policy: Any, case: Case, directory: Path) -> Path:
    """Write what LeRobot's training writes: weights, config and processors."""
    policy.save_pretrained(directory)
    for processor in make_processors(policy, case):
        processor.save_pretrained(directory)
    return directory


def observations(case: Case, steps: int) -> list[dict[str, np.ndarray]]:
    """Smooth random frames and states within the statistics' range."""
    random = np.random.default_rng(case.seed + 1)
    stats = make_statistics(case)[STATE]
    found = []
    for _ in range(steps):
        coarse = torch.from_numpy(random.uniform(0, 255, (case.cameras, 3, 12, 12)))
        smooth = torch.nn.functional.interpolate(coarse, case.image, mode="bilinear")
        images = smooth.permute(0, 2, 3, 1).numpy().astype(np.uint8)
        share = random.uniform(0, 1, case.state_dim).astype(np.float32)
        state = stats["min"].numpy() + share * (stats["max"] - stats["min"]).numpy()
        cameras = dict(zip(case.image_keys, images, strict=True))
        found.append({**cameras, STATE: state.astype(np.float32)})
    return found


class InjectedCodes:
    """Replaces LeRobot's sampling by given codes, and keeps the probabilities it would use."""

    def __init__(self, policy: Any) -> None:
        self._query = policy.config.n_obs_steps - 1
        self._sequential = policy.config.sequentially_select
        self.codes = (0, 0)
        self.probabilities: np.ndarray = np.zeros(0)
        self._layer = 0

    def multinomial(self, weights: torch.Tensor, num_samples: int) -> torch.Tensor:
        """Stand in for torch.multinomial."""
        assert num_samples == 1
        if self._sequential:
            layer, self._layer = self._layer, 1 - self._layer
            row = weights[self._query].numpy()
            self.probabilities = row[None] if layer == 0 else np.stack([self.probabilities[0], row])
            return torch.full((len(weights), 1), self.codes[layer])
        self.probabilities = weights.view(-1, 2, weights.shape[1])[self._query].numpy()
        return torch.tensor(self.codes).repeat(len(weights) // 2)[:, None]

    def patch(self) -> Any:
        """The context in which the codes are injected."""
        return mock.patch.object(torch, "multinomial", self.multinomial)


class ReferencePolicy:
    """LeRobot's `select_action` with its processors, from raw observation to robot units."""

    def __init__(self, policy: Any, case: Case) -> None:
        self.policy = policy
        self.before, self.after = make_processors(policy, case)
        self.injected = InjectedCodes(policy)
        self._image_keys = case.image_keys
        policy.reset()

    def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """One step of a robot's control loop as LeRobot runs it."""
        batch = {STATE: torch.from_numpy(observation[STATE])}
        for key in self._image_keys:
            batch[key] = torch.from_numpy(observation[key]).permute(2, 0, 1).float() / 255
        batch = self.before(batch)
        with self.injected.patch(), torch.no_grad():
            action = self.policy.select_action(batch)
        result: np.ndarray = self.after(action)[0].numpy()
        return result
