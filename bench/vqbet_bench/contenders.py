"""Policies to compare, each behind the same two methods.

A contender runs in a process of its own, so that memory and start-up are its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

IMAGE, STATE = "observation.image", "observation.state"


class Contender(Protocol):
    """What the benchmark asks of a policy."""

    def prepare(self, frame: NDArray[np.uint8], state: NDArray[np.float32]) -> Any:
        """The observation as this policy takes it; not timed."""

    def act(self, observation: Any) -> None:
        """One step of the control loop; timed."""


class LeRobotEager:
    """LeRobot's `select_action` in eager PyTorch.

    Its processors (normalisation, batch axis, float conversion) are left out of the time, which
    favours it: `EdgePolicy.act` does that work inside.
    """

    def __init__(self, checkpoint: Path, threads: int) -> None:
        import torch  # noqa: PLC0415
        from lerobot.policies.vqbet.modeling_vqbet import VQBeTPolicy  # noqa: PLC0415

        torch.set_num_threads(threads)
        self._torch = torch
        self._policy = VQBeTPolicy.from_pretrained(checkpoint).eval()
        self._policy.reset()

    def prepare(self, frame: NDArray[np.uint8], state: NDArray[np.float32]) -> Any:
        """float32 (1, 3, H, W) in [0, 1] and (1, S) in [-1, 1]."""
        image = self._torch.from_numpy(frame).permute(2, 0, 1).float()[None] / 255
        return {IMAGE: image, STATE: self._torch.from_numpy(state)[None] / 256 - 1}

    def act(self, observation: Any) -> None:
        """`select_action`, which fills LeRobot's own queues."""
        with self._torch.inference_mode():
            self._policy.select_action(observation)


class Edge:
    """`EdgePolicy` on the CPU."""

    def __init__(self, bundle: Path, _threads: int) -> None:
        from vqbet_edge import EdgePolicy  # noqa: PLC0415

        self._policy = EdgePolicy.load(bundle, backend="onnxruntime")

    def prepare(self, frame: NDArray[np.uint8], state: NDArray[np.float32]) -> Any:
        """uint8 (H, W, 3) and float32 (S,) in the robot's units."""
        return {IMAGE: frame, STATE: state}

    def act(self, observation: Any) -> None:
        """`act`: checks, normalisation and un-normalisation included."""
        self._policy.act(observation)


CONTENDERS: dict[str, Callable[[Path, int], Contender]] = {"lerobot": LeRobotEager, "edge": Edge}
