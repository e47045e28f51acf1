"""Cameras of different sizes on a server."""

from contextlib import closing

import numpy as np
import pytest
from serve.serving import serving
from two_cameras import SCENE, STATE, WRIST, Trained
from vqbet_bench.serving import observations
from vqbet_serve import RemotePolicy
from vqbet_serve.elsewhere import Elsewhere, Graphs

from vqbet_edge import EdgePolicy, Guards, ObservationError
from vqbet_edge.runtime.bundle import Bundle

GUARDS = Guards(deadline_s=20.0, on_late="raise")


def test_a_robot_is_told_each_cameras_size_and_acts_the_same(two_cameras: Trained) -> None:
    with (
        EdgePolicy.load(two_cameras.bundle("fp32"), "onnxruntime") as policy,
        policy.sibling(seed=0) as alone,
        serving(policy) as server,
        RemotePolicy(server.url, guards=GUARDS) as remote,
    ):
        told = remote.metadata.observation
        assert {key: part.shape for key, part in told.items()} == {
            SCENE: (60, 108, 3), WRIST: (48, 64, 3), STATE: (2,),
        }  # fmt: skip
        remote.reset(seed=0)
        random = next(observations(policy.manifest, 0))
        for observation in [*two_cameras.observations()[:4], random]:
            assert (remote.act(observation) == alone.act(observation)).all()
        wrong = {**random, WRIST: np.zeros((60, 108, 3), np.uint8)}
        with pytest.raises(ObservationError, match=rf"'{WRIST}'.*48, 64, 3"):
            remote.act(wrong)


def test_graphs_elsewhere_see_the_same_frames(two_cameras: Trained) -> None:
    bundle = Bundle.open(two_cameras.bundle("fp32"))
    with closing(Graphs(bundle, "onnxruntime")) as graphs:
        backend = Elsewhere(bundle.manifest, lambda request: graphs.run([request])[0])  # type: ignore[arg-type, return-value]
        with EdgePolicy(bundle, backend) as policy, EdgePolicy.load(bundle.path) as here:
            for observation in two_cameras.observations()[:6]:
                difference = policy.act(observation) - here.act(observation)
                assert np.abs(difference).max() <= 2e-5
