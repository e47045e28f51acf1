"""Closed loop: environments, actors, figures."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import oracle
import pytest
from scipy import stats
from workshop import Exported, Workshop

from examples.detour.expert import collect
from vqbet_edge.errors import UsageError, VQBeTEdgeError
from vqbet_edge.runtime.guards import Guards
from vqbet_edge.training.backend import TorchBackend, load_backend
from vqbet_edge.training.evaluation.actors import Siblings
from vqbet_edge.training.evaluation.cli import EvalConfig
from vqbet_edge.training.evaluation.detour import DetourEnv
from vqbet_edge.training.evaluation.pusht import (
    PushTWithContact,
    PushTWithPose,
    mirror_frames,
    mirror_points,
)
from vqbet_edge.training.evaluation.rollout import run_episodes
from vqbet_edge.training.evaluation.summary import bootstrap, compare, summarize, wilson
from vqbet_edge.training.evaluation.tasks import TASKS, make_task

PACKAGES = {
    "pusht": "gym_pusht",
    "pusht_pose": "gym_pusht",
    "pusht_contact": "gym_pusht",
    "metaworld_push": "metaworld",
}


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Callable[[], gymnasium.Env[Any, Any]]:
    if request.param in PACKAGES:
        pytest.importorskip(PACKAGES[request.param])
    return make_task(request.param)


class RandomActor:
    """Any action, remembered by seed."""

    def __init__(self, slots: int, space: gymnasium.spaces.Box) -> None:
        self._random = [np.random.default_rng(0) for _ in range(slots)]
        self._space = space

    def reset(self, slot: int, seed: int) -> None:
        self._random[slot] = np.random.default_rng(seed)

    def act(self, observations: object) -> np.ndarray:  # noqa: ARG002
        return np.stack([r.uniform(self._space.low, self._space.high) for r in self._random])


def test_environments_repeat_and_fit_their_spaces(
    task: Callable[[], gymnasium.Env[Any, Any]],
) -> None:
    first, second = task(), task()
    second.reset(seed=1)
    second.step(second.action_space.sample())
    for env in (first, second):  # one of them has already been used
        env.action_space.seed(0)
        observation, _ = env.reset(seed=7)
        assert env.observation_space.contains(observation)
    for _ in range(3):
        action = first.action_space.sample()
        before = first.step(action)
        again = second.step(action)
        assert first.observation_space.contains(before[0])
        for key in before[0]:
            np.testing.assert_array_equal(before[0][key], again[0][key])
        assert before[1:4] == again[1:4]
    first.close()
    second.close()


def test_the_contact_state_sees_the_pusher_from_the_block_as_the_simulator_does() -> None:
    pytest.importorskip("gym_pusht")
    env = PushTWithContact()
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        simulator: Any = env.unwrapped
        expected = simulator.block.world_to_local(simulator.agent.position)
        np.testing.assert_allclose(observation["observation.state"][6:], expected, atol=1e-3)
        turn = np.arctan2(*observation["observation.state"][[5, 4]])
        np.testing.assert_allclose(np.exp(1j * turn), np.exp(1j * simulator.block.angle), atol=1e-6)


def mirrored(pose: np.ndarray) -> np.ndarray:
    pusher, block = mirror_points(pose[:2]), mirror_points(pose[2:4])
    return np.array([*pusher, *block, np.pi / 2 - pose[4]])


def place(env: PushTWithPose, pose: np.ndarray) -> None:
    env.reset(seed=0)
    simulator: Any = env.unwrapped
    simulator.agent.position = pose[:2].tolist()
    simulator.block.angle = float(pose[4])
    simulator.block.position = pose[2:4].tolist()
    simulator.space.step(1e-6)


def test_pusht_is_the_same_task_in_the_mirror() -> None:
    """The simulator pushes, draws and counts alike where all is mirrored but the target."""
    pytest.importorskip("gym_pusht")
    env, mirror = PushTWithPose(), PushTWithPose()
    pose = np.array([180.0, 200.0, 250.0, 240.0, 0.4])
    place(env, pose)
    place(mirror, mirrored(pose))
    for action in ([200.0, 210.0], [250.0, 240.0], [280.0, 260.0], [300.0, 280.0]):
        seen, reward, *_ = env.step(np.array(action))
        also, same_reward, *_ = mirror.step(mirror_points(np.array(action)))
        expected = mirrored(seen["observation.state"])
        np.testing.assert_allclose(also["observation.state"], expected, atol=0.1)
        assert reward == pytest.approx(same_reward, abs=1e-3)
        frames = mirror_frames(seen["observation.image"]), also["observation.image"]
        unlike = np.abs(np.subtract(*frames, dtype=int)).max(axis=-1) > 40
        assert unlike.mean() < 0.01  # edges, drawn in whole pixels
    assert abs(seen["observation.state"][2] - pose[2]) > 5  # the block was pushed


def test_results_do_not_depend_on_how_many_run_at_once() -> None:
    space = DetourEnv().action_space
    assert isinstance(space, gymnasium.spaces.Box)
    seeds = range(5, 12)
    alone = run_episodes(DetourEnv, RandomActor(1, space), seeds, slots=1)
    together = run_episodes(DetourEnv, RandomActor(3, space), seeds, slots=3)
    assert [e.seed for e in together] == list(seeds)
    for a, b in zip(alone, together, strict=True):
        assert (a.success, a.max_reward) == (b.success, b.max_reward)
        np.testing.assert_array_equal(a.states, b.states)


class DyingEnv(DetourEnv):
    """Ends its process, as one that ran out of memory does."""

    def step(self, action: object) -> Any:  # noqa: ARG002
        os._exit(9)


def test_an_environment_whose_process_dies_is_no_disk_error() -> None:
    space = DetourEnv().action_space
    assert isinstance(space, gymnasium.spaces.Box)
    with pytest.raises(VQBeTEdgeError, match="ended by itself") as caught:
        run_episodes(DyingEnv, RandomActor(2, space), range(2), slots=2, processes=True)
    assert caught.value.exit_code == 1


def test_the_expert_goes_both_ways_and_a_straight_line_crashes() -> None:
    demonstrations = collect(20, seed=0)
    assert len(demonstrations) == 40
    for left, right in zip(demonstrations[::2], demonstrations[1::2], strict=True):
        for key in ("observation.image", "observation.state"):  # one scene
            assert np.array_equal(left[key][0], right[key][0])
        assert left["observation.state"][:, 0].min() < 0.35
        assert right["observation.state"][:, 0].max() > 0.65
    env, crashes = DetourEnv(), 0
    for seed in range(20):
        env.reset(seed=seed)
        done, info = False, {}
        while not done:
            way = env.scene.goal - env.position
            _, _, crashed, truncated, info = env.step(0.045 * way / np.linalg.norm(way))
            done = crashed or truncated
        crashes += info["crashed"]
    assert crashes == 20


@pytest.mark.parametrize("sequential", [False, True])
def test_a_bundle_and_its_checkpoint_act_alike(workshop: Workshop, sequential: bool) -> None:
    case = oracle.small("sequential", sequentially_select=True) if sequential else oracle.TINY
    exported = workshop.bundle(case)
    actors = [
        Siblings(*load_backend(str(p)), 2, temperature=1.0)
        for p in (exported.checkpoint, exported.bundle)
    ]
    rng = np.random.default_rng(0)
    for actor in actors:
        actor.reset(0, seed=3)
        actor.reset(1, seed=4)
    for step in range(12):
        frames = rng.integers(0, 256, (2, *case.image, 3), np.uint8)
        states = rng.uniform(-1, 1, (2, case.state_dim)).astype(np.float32)
        if step == 7:
            for actor in actors:
                actor.reset(0, seed=5)
        seen = {case.image_keys[0]: frames, oracle.STATE: states}
        expected, got = (actor.act(seen) for actor in actors)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_siblings_in_pytorch_share_runs_and_act_as_each_alone(
    tiny: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What did not encode or predict together would take as much time as so many policies."""
    runs: list[int] = []
    run_together = TorchBackend.run_together

    def counted(self: TorchBackend, part: Any, windows: Any) -> None:
        runs.append(len(windows))
        run_together(self, part, windows)

    monkeypatch.setattr(TorchBackend, "run_together", counted)
    bundle, backend = load_backend(str(tiny.checkpoint))
    together = Siblings(bundle, backend, 3)
    rng, case = np.random.default_rng(0), tiny.case
    seen = [
        {
            case.image_keys[0]: rng.integers(0, 256, (3, *case.image, 3), np.uint8),
            oracle.STATE: rng.uniform(-1, 1, (3, case.state_dim)).astype(np.float32),
        }
        for _ in range(9)
    ]
    acted = []
    for slot in range(3):
        together.reset(slot, seed=slot)
    for step, observations in enumerate(seen):
        if step == 2:  # from now on it predicts at other steps than the others
            together.reset(1, seed=1)
        acted.append(together.act(observations))
    assert runs == [3, 1, 2, 1]
    alone = Siblings(*load_backend(str(tiny.checkpoint)), 1)
    for slot in range(3):
        alone.reset(0, seed=slot)
        for step, observations in enumerate(seen):
            if step == 2 and slot == 1:
                alone.reset(0, seed=1)
            (got,) = alone.act({k: v[slot : slot + 1] for k, v in observations.items()})
            np.testing.assert_allclose(acted[step][slot], got, rtol=1e-4, atol=1e-4)


def test_a_run_that_fails_ends_all_that_wait_for_it(
    tiny: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    actor = Siblings(*load_backend(str(tiny.checkpoint)), 3)
    monkeypatch.setattr(TorchBackend, "run_together", broken)
    case = tiny.case
    seen = {
        case.image_keys[0]: np.zeros((3, *case.image, 3), np.uint8),
        oracle.STATE: np.zeros((3, case.state_dim), np.float32),
    }
    with pytest.raises(KeyboardInterrupt):
        actor.act(seen)
    assert actor._together is not None
    actor._together._threads.shutdown(wait=True)  # none of them hangs


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_actions_are_clamped_as_on_a_robot_unless_guards_are_off(tiny: Exported, kind: str) -> None:
    case, policy = tiny.case, getattr(tiny, kind)
    narrow = Guards(action_limits=(-1e-3, 1e-3))
    seen = {
        case.image_keys[0]: np.zeros((1, *case.image, 3), np.uint8),
        oracle.STATE: np.zeros((1, case.state_dim), np.float32),
    }
    by_default = Siblings(*load_backend(str(policy)), 1).policies[0]
    assert by_default.action_limits is not None
    free = Siblings(*load_backend(str(policy)), 1, guards=Guards(action_limits=None))
    assert free.policies[0].action_limits is None
    assert np.abs(free.act(seen)).max() > 1e-3
    assert np.abs(Siblings(*load_backend(str(policy)), 1, guards=narrow).act(seen)).max() <= 1e-3


def test_intervals_are_scipys() -> None:
    for successes, trials in ((0, 10), (45, 50), (50, 50)):
        expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
        got = wilson(successes, trials)
        assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
        assert got.low <= got.mean <= got.high  # plots take the differences
    values = np.random.default_rng(1).normal(size=60)
    expected = stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    got = bootstrap(values.tolist())
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_comparison_is_paired() -> None:
    space = DetourEnv().action_space
    assert isinstance(space, gymnasium.spaces.Box)
    episodes = run_episodes(DetourEnv, RandomActor(2, space), range(4), slots=2)
    same = compare(episodes, episodes)
    assert (same.success.low, same.success.high) == (0, 0)
    assert (same.only_first, same.only_second) == (0, 0)
    assert summarize(episodes).episodes == 4


def test_an_unknown_environment_is_named() -> None:
    with pytest.raises(UsageError, match="environment chess is unknown; use one of detour"):
        make_task("chess")


@pytest.mark.extended
def test_a_renderer_that_does_not_start_is_a_sentence() -> None:
    pytest.importorskip("mujoco")
    broken = {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "99"}
    command = [sys.executable, "-m", "vqbet_edge.training.evaluation", "x", "--env"]
    ended = subprocess.run(
        [*command, "metaworld_push"], capture_output=True, text=True, env=os.environ | broken
    )
    assert ended.returncode == 2, ended.stderr
    said = " ".join(ended.stderr.split())
    assert f"cannot draw with MUJOCO_GL={broken['MUJOCO_GL']}" in said
    assert "apt install libegl1" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"env": "detour", "num_envs": 0}, "--num-envs must be at least 1, got 0"),
        ({"env": "detour", "temperature": -0.5}, "--temperature must not be negative, got -0.5"),
        ({}, "expected --env NAME or --replay FOLDER"),
        ({"env": "detour", "replay": Path("a")}, "expected --env NAME or --replay FOLDER"),
        ({"replay": Path("a"), "record": Path("b")}, "--record does not go with --replay"),
    ],
)
def test_wrong_flags_are_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EvalConfig("policy", **flags)
