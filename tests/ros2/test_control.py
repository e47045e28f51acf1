"""The control loop with a policy and without ROS."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import miniature
import numpy as np
import pytest
from miniature import IMAGE, STATE
from vqbet_edge_ros.control import Loop, Step
from vqbet_edge_ros.diagnostics import ERROR, LEVELS, OK, WARN, Statistics
from vqbet_edge_ros.loading import (
    assemble,
    control_rate,
    load_policy,
    prediction_time,
)
from vqbet_edge_ros.parameters import Parameters, parse
from vqbet_edge_ros.parts import command_joints, when_stopped
from vqbet_edge_ros.watchdog import Mode

from vqbet_edge import BackendError, DeadlineError, EdgePolicy, NonFiniteError, UsageError
from vqbet_edge.runtime import proof


def parameters(mini: Path, **changed: Any) -> Parameters:
    given: dict[str, Any] = {
        "bundle": str(mini), "backend": "onnxruntime", "cameras.topics": ["/camera"],
        "state.joints": ["a", "b"], "command.topic": "/out", "seed": 5, "max_age": 5.0,
        "max_skew": 1.0, "timeout": 60.0, "resume_within": 60.0, "command.when_stopped": "hold", "rate": 30.0,
        "predict_within": -1.0,  # others are at work here
    }  # fmt: skip
    return parse(given | changed)


@dataclass
class Rig:
    """Everything between messages and commands."""

    policy: EdgePolicy
    given: Parameters
    sent: list[list[list[float]]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        made = assemble(
            self.given, self.policy, lambda _, rows: self.sent.append(rows.tolist()), lambda _: True,
            self.steps.append,
        )  # fmt: skip
        self.inputs, self.dog, self.controller = made.topics, made.watchdog, made.controller
        self.statistics = made.statistics
        self.dog.open(time.monotonic())

    def see(self, observation: dict[str, np.ndarray], encoding: str = "rgb8") -> None:
        """The messages of an observation, its joints in another order."""
        frame, (a, b) = observation[IMAGE], observation[STATE].tolist()
        height, width, _ = frame.shape
        pixels = frame[..., ::-1] if encoding == "bgr8" else frame
        image = SimpleNamespace(height=height, width=width, encoding=encoding, step=3 * width,
                                data=pixels.tobytes())  # fmt: skip
        joints = SimpleNamespace(name=["b", "other", "a"], position=[b, 1e9, a])
        now = time.monotonic()
        self.inputs[IMAGE].offer(image, now, now)
        self.inputs["/joint_states"].offer(joints, now, now)


@pytest.fixture
def rig(mini: Path) -> Iterator[Rig]:
    given = parameters(mini)
    with load_policy(given) as policy:
        yield Rig(policy, given)


def observations(count: int) -> list[dict[str, np.ndarray]]:
    return miniature.observations(count, seed=3)


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8"])
def test_commands_are_bitwise_the_policys(rig: Rig, mini: Path, encoding: str) -> None:
    with EdgePolicy.load(mini, "onnxruntime", seed=5) as alone:
        for observation in observations(12):
            rig.see(observation, encoding)
            rig.controller.tick()
            rig.controller.tick()  # nothing new: nothing is sent
            expected = alone.act(observation)
            assert rig.sent.pop() == [expected.tolist()]
            assert rig.sent == []
            step = rig.steps.pop()
            assert (step.action == expected).all()
            assert (step.observation[IMAGE] == observation[IMAGE]).all()
    assert rig.statistics.counts == {"commands": 12, "repeated": 12}


LIMIT = 0.01
SLOW = {"guards.max_change": [LIMIT, LIMIT], "guards.action_limits": "none"}


@pytest.mark.parametrize(
    ("changed", "anchor"),
    [
        ({}, "measured"),
        ({"command.joints": ["b", "a"]}, "measured"),
        ({"command.joints": ["a", "c"]}, "last"),
        ({"command.when_stopped": "silence"}, "last"),
        ({"command.when_stopped": "zero", "command.scale": [2.0, 2.0]}, "zero"),
    ],
)
def test_an_episodes_first_action_is_no_jump(
    mini: Path, changed: Any, anchor: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It starts from where the robot is, or from the last command if that is all there is."""
    given = parameters(mini, **SLOW, **changed)
    with load_policy(given) as policy:
        rig = Rig(policy, given)
        scale = np.array(given.commands[""].scale or [1.0, 1.0])
        # Joint b is the action's first number where commands begin with it.
        order = [1, 0] if given.commands[""].joints == ("b", "a") else [0, 1]
        sent = []
        for observation in observations(4):
            before = rig.policy.guard_counts.slowed
            rig.see(observation)
            rig.controller.tick()
            sent.append(np.array(rig.sent.pop()[0]) * scale)
            starts = {"measured": observation[STATE][order], "zero": [0, 0]}
            start = sent[-2:-1] or starts.get(anchor, ())
            start = starts["measured"] if anchor == "measured" else start
            if len(start):
                np.testing.assert_allclose(sent[-1], np.ravel(start), atol=LIMIT * 1.001)
                assert rig.policy.guard_counts.slowed == before + 1
            assert rig.dog.request_reset()
    said = caplog.text.count("does not hold on this episode's first action")
    assert said == (1 if anchor == "last" else 0)


def test_trajectories_are_the_chunks(mini: Path) -> None:
    given = parameters(mini, **{"command.type": "trajectory", "replan_every": 2})
    alone = EdgePolicy.load(mini, "onnxruntime", seed=5, replan_every=2)
    with load_policy(given) as policy, alone, alone.sibling(seed=5) as first:
        rig = Rig(policy, given)
        assert policy.upcoming is None
        sent = []
        for number, observation in enumerate(observations(6)):
            rig.see(observation)
            rig.controller.tick()
            action = alone.act(observation).tolist()
            if number % 2 == 0:
                sent.append(rig.sent.pop())
                assert len(sent[-1]) == policy.manifest.policy.action_chunk_size
            assert sent[-1][number % 2] == action
            assert rig.sent == []
            if number == 0:
                assert sent == [first.act_chunk(observation).tolist()]


def test_a_policy_that_is_stopped_meanwhile_says_nothing(rig: Rig) -> None:
    rig.see(observations(1)[0])
    act = rig.policy.act

    def slow(*arguments: Any) -> Any:
        rig.dog.close("signal 15")
        return act(*arguments)

    rig.policy.act = slow  # type: ignore[method-assign]
    rig.controller.tick()
    assert rig.sent == rig.steps == []
    assert rig.statistics.counts == {"overtaken": 1}


def test_a_late_policy_stops_the_robot(rig: Rig) -> None:
    first, second = observations(2)
    rig.see(first)
    rig.controller.tick()
    command = rig.sent.pop()
    rig.policy.act = Mock(side_effect=DeadlineError("no action in time"))  # type: ignore[method-assign]
    rig.see(second)
    rig.controller.tick()
    assert rig.dog.mode is Mode.STOPPED
    assert rig.sent == [command]
    assert rig.statistics.counts["late"] == 1


def test_a_broken_policy_ends_the_loop(rig: Rig) -> None:
    rig.policy.act = Mock(side_effect=NonFiniteError("not a number"))  # type: ignore[method-assign]
    rig.see(observations(1)[0])
    loop = Loop(rig.controller.tick, 100.0)
    loop.start()
    loop._thread.join(20)
    assert isinstance(loop.failure, NonFiniteError)
    assert loop.stop(5.0)
    assert rig.sent == []


def test_the_loop_does_not_make_up_for_missed_steps() -> None:
    times: list[float] = []

    def tick() -> None:
        times.append(time.monotonic())
        if len(times) == 1:
            time.sleep(0.1)
        if len(times) == 4:
            loop._ended.set()

    loop = Loop(tick, 50.0)
    loop.start()
    loop._thread.join(20)
    # One at once, the others a period apart again, however late the machine makes them.
    assert times[2] - times[1] > 0.015
    assert times[3] - times[1] > 0.035


def test_a_simulations_time_is_the_loops() -> None:
    """While it stands there are no steps, and it may begin anew."""
    ticks: SimpleQueue[float] = SimpleQueue()
    now = [100.0]
    loop = Loop(lambda: ticks.put(now[0]), 20.0, lambda: now[0])
    loop.start()
    assert ticks.get(timeout=20) == 100
    for step in range(1, 5):
        time.sleep(0.02)
        assert ticks.empty()
        now[0] = 100 + step / 20 + 1e-6
        assert ticks.get(timeout=20) == now[0]
    found = []
    for step in range(5):
        now[0] = 5 + step / 20
        with suppress(Empty):
            found.append(ticks.get(timeout=0.05))
    assert loop.stop(5.0)
    assert len(found) >= 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"state.joints": ["a"]},
        {"command.joints": ["a", "b", "c"]},
        {"cameras.topics": ["/one", "/two"]},
        {"cameras.keys": ["observation.other"]},
        {"guards.max_change": [1.0, 2.0, 3.0]},
        {"replan_every": 1000},
        {"rate": 0.0},
        {"command.when_stopped": ""},
    ],
)
def test_parameters_that_do_not_fit_the_policy_are_refused(mini: Path, wrong: Any) -> None:
    given = parameters(mini, **wrong)
    with ExitStack() as stack, pytest.raises(UsageError):  # noqa: PT012 - one of them does
        policy = stack.enter_context(load_policy(given))
        Rig(policy, given)


@pytest.mark.parametrize("said", [None, "1"])
def test_engines_are_built_before_and_not_in_configure(
    mini: Path, monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    variable = "VQBET_EDGE_BUILD_ENGINES"
    monkeypatch.setenv(variable, said or "")  # so that it is as before after the test
    if said is None:
        monkeypatch.delenv(variable)
    monkeypatch.setattr(EdgePolicy, "load", Mock(side_effect=BackendError("none here")))
    with pytest.raises(BackendError, match="none here"):
        load_policy(parameters(mini, backend="tensorrt"))
    assert os.environ[variable] == (said or "0")


@pytest.mark.parametrize("prove", [True, False])
def test_loading_proves_if_asked_and_leaves_no_trace(
    mini: Path, monkeypatch: pytest.MonkeyPatch, prove: bool
) -> None:
    proven, [observation] = Mock(), observations(1)
    monkeypatch.setattr(proof, "prove", proven)
    with (
        load_policy(parameters(mini, prove=prove)) as warm,
        EdgePolicy.load(mini, "onnxruntime", seed=5) as fresh,
    ):
        assert proven.called == prove
        assert warm.last is None
        assert (warm.act(observation) == fresh.act(observation)).all()
        assert warm.guard_counts == fresh.guard_counts


@pytest.mark.parametrize(
    ("fps", "given", "rate", "warned"),
    [(10.0, 0.0, 10, False), (10.0, 10.0, 10, False), (10.0, 30.0, 30, True), (None, 20.0, 20, False)],
)  # fmt: skip
def test_the_rate_is_the_demonstrations(
    mini: Path, fps: Any, given: float, rate: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    read = parameters(mini, rate=given)
    assert control_rate(read, SimpleNamespace(fps=fps)) == rate  # type: ignore[arg-type]
    assert ("3 times as fast" in caplog.text) == warned


@pytest.mark.parametrize(
    ("given", "seconds"), [(0.0, 0.1), (0.03, 0.03), (-1.0, float("inf")), (5.0, 5.0)]
)
def test_a_prediction_fits_between_two_steps(given: float, seconds: float) -> None:
    assert prediction_time(given, 10.0) == seconds


def test_a_policy_that_is_too_slow_is_refused(mini: Path) -> None:
    """Or one that is none of the backends that it must be."""
    for changed in ({"rate": 1e7, "predict_within": 0.0}, {"predict_within": 1e-7}):
        given = parameters(mini, **changed)
        with load_policy(given) as policy, pytest.raises(BackendError, match="vqbet-doctor '"):
            Rig(policy, given)
    given = parameters(mini, rate=1e7)
    with load_policy(given) as policy:
        Rig(policy, given)
    with pytest.raises(UsageError, match="none of those required: tensorrt"):
        load_policy(parameters(mini, require=["tensorrt"]))


@pytest.mark.parametrize(
    ("kinds", "message", "given", "found"),
    [
        ((), "array", "", None),
        (("position", "unknown"), "array", "", None),
        (("position", "gripper"), "array", "", "hold"),
        ((), "joint_state", "", "hold"),
        ((), "trajectory", "", "hold"),
        (("velocity", "velocity"), "joint_state", "", None),
        (("displacement", "gripper"), "array", "hold", None),
        (("velocity", "velocity"), "array", "zero", "zero"),
        (("position", "gripper"), "array", "zero", None),
        (("unknown", "unknown"), "array", "hold", "hold"),
        (("velocity", "gripper"), "array", "silence", "silence"),
    ],
)
def test_what_stops_the_robot_is_chosen_or_certain(
    mini: Path, kinds: Any, message: str, given: str, found: str | None
) -> None:
    read = parameters(mini, **{"command.type": message, "command.when_stopped": given})
    command = read.commands[""]
    if found is not None:
        assert when_stopped(command, set(kinds)) == found
        return
    with pytest.raises(UsageError, match=r"expected command\.when_stopped"):
        when_stopped(command, set(kinds))


DEGREES = {"state.units": "degrees", "state.scale": [2.0, 4.0], "state.offset": [10.0, 20.0]}
SWAPPED = {"command.joints": ["b", "a"]}


@pytest.mark.parametrize(
    ("given", "ros"),
    [
        (DEGREES, [np.pi, np.pi]),
        (DEGREES | SWAPPED, [np.deg2rad((370 - 20) / 4), np.deg2rad((740 - 10) / 2)]),
        (DEGREES | {"command.units": "as_is"}, [180, 180]),
        (DEGREES | {"command.scale": [1.0, 1.0]}, [2 * np.pi, 4 * np.pi]),
        (DEGREES | {"command.offset": [370.0, 740.0]}, [0, 0]),
        ({"command.units": "degrees"}, np.deg2rad([370, 740])),
        ({"command.scale": [2.0, 4.0]}, [185, 185]),
        ({"command.joints": ["c", "d"]}, [370, 740]),
        (DEGREES | {"command.joints": ["a", "c"], "command.units": "degrees",
                    "command.scale": [2.0, 4.0], "command.offset": [10.0, 20.0]}, [np.pi, np.pi]),
    ],
)  # fmt: skip
def test_what_commands_are_not_given_they_have_of_the_state(
    mini: Path, given: Any, ros: Any
) -> None:
    read = parameters(mini, **given)
    joints = command_joints(read.commands[""], read, positions=True)
    action = np.array([370.0, 740.0])
    np.testing.assert_allclose(joints.to_ros(action), ros)
    np.testing.assert_allclose(joints.from_ros(joints.to_ros(action)), action)


@pytest.mark.parametrize("field", ["units", "scale", "offset"])
@pytest.mark.parametrize("other", ["joints", "velocities"])
def test_what_need_not_be_the_states_has_to_be_given(mini: Path, field: str, other: str) -> None:
    """Another joint's scale, or an offset of positions for velocities."""
    given = {f"state.{field}": DEGREES[f"state.{field}"]}
    if other == "joints":
        given["command.joints"] = ["a", "c"]
    read = parameters(mini, **given)
    with pytest.raises(UsageError, match=f"command.{field} is missing"):
        command_joints(read.commands[""], read, positions=other == "joints")


def test_figures_for_diagnostics() -> None:
    statistics = Statistics()
    assert statistics.summary() == {}
    for step in range(10):
        statistics.acted(0.002, 0.01, step / 10)
    statistics.count("stale")
    summary = statistics.summary()
    assert summary["commands"] == "10"
    assert summary["stale"] == "1"
    assert summary["act_ms_p50"] == "2.00"
    assert summary["age_ms_max"] == "10.00"
    assert summary["period_ms_p99"] == "100.00"
    assert LEVELS == {
        Mode.CLOSED: OK, Mode.STARTING: WARN, Mode.RUNNING: OK, Mode.STOPPED: WARN,
        Mode.WAITING: ERROR, Mode.TELEOP: OK,
    }  # fmt: skip
