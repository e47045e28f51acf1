"""Cameras of different sizes through LeRobot's own factory."""

import oracle
import pytest
import torch
from two_cameras import SCENE, STATE, WRIST, Trained

from vqbet_edge import EdgePolicy, ObservationError

oracle.lerobot("policies.factory")

from lerobot.policies.factory import make_pre_post_processors  # noqa: E402
from lerobot_policy_vqbet_edge import VqbetEdgePolicy  # noqa: E402


def test_the_plugin_takes_each_camera_at_its_own_size(two_cameras: Trained) -> None:
    bundle = two_cameras.bundle("fp32")
    policy = VqbetEdgePolicy.from_pretrained(bundle)
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(bundle))
    with EdgePolicy.load(bundle) as alone:
        for observation in two_cameras.observations()[:5]:
            batch = before({
                STATE: torch.from_numpy(observation[STATE]),
                **{k: torch.from_numpy(observation[k]).permute(2, 0, 1) / 255 for k in (SCENE, WRIST)},
            })  # fmt: skip
            action = after(policy.select_action(batch))[0].numpy()
            assert (action == alone.act(observation)).all()
    exchanged = {**batch, SCENE: batch[WRIST], WRIST: batch[SCENE]}
    with pytest.raises(ObservationError, match=rf"'{SCENE}': expected a batch of \(3, 60, 108\)"):
        policy.select_action(exchanged)
