"""Each integration takes cameras of different sizes, and acts as the policy does by itself."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from environments import ROOT
from serve.serving import serving
from two_cameras import SCENE, STATE, WRIST, Trained
from vqbet_edge_ros.inputs import Refusal
from vqbet_edge_ros.loading import assemble, load_policy
from vqbet_edge_ros.parameters import parse
from vqbet_serve import RemotePolicy
from vqbet_serve.remote_graphs import GraphRunner, RemoteBackend

from vqbet_edge import EdgePolicy, Guards, ObservationError
from vqbet_edge.runtime.bundle import Bundle

Act = Callable[[dict[str, np.ndarray]], np.ndarray]


@contextmanager
def served(bundle: Path) -> Iterator[Act]:
    guards = Guards(deadline_s=20.0, on_late="raise")
    with (
        EdgePolicy.load(bundle) as policy,
        serving(policy) as server,
        RemotePolicy(server.url, guards=guards) as remote,
    ):
        yield remote.act


@contextmanager
def fleet(bundle: Path) -> Iterator[Act]:
    opened = Bundle.open(bundle)
    with (
        closing(GraphRunner(opened, "onnxruntime")) as graphs,
        EdgePolicy(opened, RemoteBackend(opened.manifest, graphs.answer)) as policy,
    ):
        yield policy.act


@contextmanager
def ros(bundle: Path) -> Iterator[Act]:
    topics = {SCENE: "/scene", WRIST: "/wrist", STATE: "/joints"}
    given = parse({
        "bundle": str(bundle), "backend": "onnxruntime", "cameras.keys": [WRIST, SCENE],
        "cameras.topics": ["/wrist", "/scene"], "state.topic": "/joints",
        "state.joints": ["a", "b"], "command.topic": "/out", "max_age": 5.0, "max_skew": 1.0,
        "rate": 10.0, "predict_within": -1.0, "command.when_stopped": "silence",
    })  # fmt: skip
    with load_policy(given) as policy:
        node = assemble(given, policy, lambda *_: None, lambda _: True, lambda _: None)
        assert {part.name for part in node.topics.values()} == set(topics.values())

        def act(observation: dict[str, np.ndarray]) -> np.ndarray:
            now = time.monotonic()
            for key, value in observation.items():
                message = SimpleNamespace(name=["a", "b"], position=value.tolist())
                if key != STATE:
                    height, width, _ = value.shape
                    message = SimpleNamespace(height=height, width=width, encoding="rgb8",
                                              step=3 * width, data=value.tobytes())  # fmt: skip
                name = key if key in node.topics else topics[key]
                node.topics[name].offer(message, now, now)
            seen = node.inputs.observe(now)
            if isinstance(seen, Refusal):
                raise ObservationError(seen.reason)
            return policy.act(seen.values)

        yield act


@contextmanager
def lerobot(bundle: Path) -> Iterator[Act]:
    factory = oracle.lerobot("policies.factory")
    from lerobot_policy_vqbet_edge import VqbetEdgePolicy

    policy = VqbetEdgePolicy.from_pretrained(bundle)
    before, after = factory.make_pre_post_processors(policy.config, pretrained_path=str(bundle))

    def act(observation: dict[str, np.ndarray]) -> np.ndarray:
        seen = {key: torch.from_numpy(value) for key, value in observation.items()}
        planar = {key: seen[key].permute(2, 0, 1) / 255 for key in (SCENE, WRIST)}
        action: Any = after(policy.select_action(before({**seen, **planar})))[0]
        return np.asarray(action)

    yield act


@pytest.mark.parametrize("way", [served, fleet, ros, lerobot], ids=lambda way: way.__name__)
def test_each_camera_is_taken_at_its_own_size(
    two_cameras: Trained, way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "integrations" / "lerobot"))
    bundle, seen = two_cameras.bundle("fp32"), two_cameras.observations()[:5]
    with way(bundle) as act, EdgePolicy.load(bundle) as alone:
        for observation in seen:
            difference = np.abs(act(observation) - alone.act(observation))
            assert difference.max() <= (2e-5 if way is fleet else 0)
        exchanged = {**seen[0], SCENE: seen[0][WRIST], WRIST: seen[0][SCENE]}
        with pytest.raises(ObservationError, match=rf"'({SCENE}|/wrist)': expected"):
            act(exchanged)
