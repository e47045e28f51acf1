"""Cameras of different sizes in the node's inputs."""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from two_cameras import SCENE, STATE, WRIST, Trained
from vqbet_edge_ros.inputs import Inputs, Observed, Refusal
from vqbet_edge_ros.loading import load_policy, make_inputs
from vqbet_edge_ros.parameters import parse

from vqbet_edge import EdgePolicy


def message(frame: np.ndarray) -> Any:
    height, width, _ = frame.shape
    return SimpleNamespace(
        height=height, width=width, encoding="rgb8", step=3 * width, data=frame.tobytes()
    )


def test_each_camera_is_taken_at_its_own_size(two_cameras: Trained) -> None:
    bundle = two_cameras.bundle("fp32")
    given = parse({
        "bundle": str(bundle), "backend": "onnxruntime", "cameras.keys": [WRIST, SCENE],
        "cameras.topics": ["/wrist", "/scene"], "state.topic": "/joints",
        "state.joints": ["a", "b"], "command.topic": "/out", "max_age": 5.0, "max_skew": 1.0,
    })  # fmt: skip
    with load_policy(given) as policy, EdgePolicy.load(bundle, "onnxruntime") as alone:
        parts = make_inputs(given, policy)
        assert {key: part.name for key, part in parts.items()} == {
            SCENE: "/scene", WRIST: "/wrist", STATE: "/joints",
        }  # fmt: skip
        joined = Inputs(parts, given.max_skew, given.max_repeats)
        for observation in two_cameras.observations()[:4]:
            now = time.monotonic()
            joints = SimpleNamespace(name=["a", "b"], position=observation[STATE].tolist())
            parts[SCENE].offer(message(observation[SCENE]), now, now)
            parts[WRIST].offer(message(observation[WRIST]), now, now)
            parts[STATE].offer(joints, now, now)
            seen = joined.observe(now)
            assert isinstance(seen, Observed)
            assert (policy.act(seen.values) == alone.act(observation)).all()
        parts[WRIST].offer(message(observation[SCENE]), now + 0.1, now + 0.1)
        refused = joined.observe(now + 0.1)
        assert isinstance(refused, Refusal)
        assert "/wrist" in refused.reason
        assert "60" in refused.reason
        assert "48" in refused.reason
