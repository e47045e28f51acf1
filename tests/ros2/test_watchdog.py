"""Who may move the robot, and what it is told, without ROS and without waiting."""

from typing import Any

import numpy as np
import pytest
from vqbet_edge_ros.inputs import Refusal
from vqbet_edge_ros.joints import Joints
from vqbet_edge_ros.outputs import Output, Outputs
from vqbet_edge_ros.watchdog import Mode, Ticket, Watchdog

from vqbet_edge import ObservationError

STALE = Refusal("stale", "the camera is gone")
REPEATED = Refusal("repeated", "nothing new")
ACTION = np.array([1.0, 2.0], np.float32)


class Robot:
    """A watchdog, and what was sent through it."""

    def __init__(self, kind: Any = "array", when_stopped: Any = "hold", **options: Any) -> None:
        self.sent: list[list[list[float]]] = []
        # Whether what was sent last has come through, as often as that is asked.
        self.acknowledged = True
        output = Output(
            Joints(("a", "b")), kind, when_stopped,
            lambda rows: self.sent.append(rows.tolist()), lambda: self.acknowledged,
        )  # fmt: skip
        given = {"timeout": 0.2, "resume_within": 1.0, "teleop_timeout": 0.5} | options
        self.dog = Watchdog(Outputs([output]), **given)

    def took(self) -> list[list[list[float]]]:
        """What was sent since the last look."""
        sent, self.sent = self.sent, []
        return sent

    def expect(self, mode: Mode, sent: list[list[list[float]]]) -> None:
        """Who may move it, and what was sent since the last look."""
        assert self.dog.mode is mode
        assert self.took() == sent

    def admitted(self, now: float) -> Ticket:
        """There is an observation, and the policy may act on it."""
        ticket = self.dog.admit(now)
        assert ticket is not None
        return ticket

    def step(self, now: float, action: np.ndarray = ACTION) -> bool:
        """An observation, and a command for it."""
        ticket = self.dog.admit(now)
        return ticket is not None and self.command(ticket, now, action)

    def command(self, ticket: Ticket, now: float, action: np.ndarray = ACTION) -> bool:
        return self.dog.command(ticket, action, action[None], now)


def running(**options: Any) -> Robot:
    robot = Robot(**options)
    robot.dog.open(10.0)
    assert robot.step(10.0)
    assert robot.took() == [[[1, 2]]]
    return robot


def test_nothing_moves_before_it_is_opened_or_after_it_is_closed() -> None:
    robot = Robot()
    assert not robot.step(10.0)
    assert not robot.dog.asks_policy()
    robot.dog.watch(10.0)
    robot.dog.teleoperate(np.zeros(2), 10.0)
    assert not robot.dog.enable(True, 10.0)
    assert robot.took() == []
    robot = running()
    robot.dog.close("deactivated")
    assert robot.took() == [[[1, 2]]]
    assert not robot.step(10.03)
    robot.dog.close("again")
    robot.dog.watch(11.0)
    robot.dog.teleoperate(np.zeros(2), 11.0)
    assert robot.took() == []


def test_a_command_that_was_under_way_when_the_robot_was_stopped_is_not_sent() -> None:
    robot = running(when_stopped="silence")
    ticket = robot.admitted(10.03)
    robot.dog.close("signal 15")
    assert not robot.command(ticket, 10.04)
    robot.dog.open(10.0)
    assert not robot.command(ticket, 10.05)
    assert robot.took() == []


@pytest.mark.parametrize(
    ("when_stopped", "sent"), [("hold", [[[1, 2]]]), ("zero", [[[0, 0]]]), ("silence", [])]
)
def test_a_stale_observation_stops_at_once(when_stopped: str, sent: Any) -> None:
    robot = running(when_stopped=when_stopped)
    robot.dog.refuse(STALE, 10.03)
    robot.expect(Mode.STOPPED, sent)
    assert robot.dog.reason == STALE.reason
    robot.dog.watch(10.06)
    assert robot.took() == sent


def test_a_step_without_anything_new_is_left_out_and_many_stop() -> None:
    robot = running()
    robot.dog.refuse(REPEATED, 10.1)
    robot.expect(Mode.RUNNING, [])
    assert robot.step(10.15)
    robot.took()
    robot.dog.refuse(REPEATED, 10.36)
    robot.expect(Mode.STOPPED, [[[1, 2]]])


def test_a_late_policy_is_stopped_and_what_it_says_then_is_not_sent() -> None:
    robot = running()
    ticket = robot.admitted(10.03)
    robot.dog.watch(10.2)
    assert robot.took() == []
    robot.dog.watch(10.21)
    robot.expect(Mode.STOPPED, [[[1, 2]]])
    assert "the policy is late" in robot.dog.reason
    assert not robot.command(ticket, 10.22, np.array([5, 6], np.float32))
    assert robot.took() == []


def test_after_a_short_stop_the_policy_goes_on_in_a_new_episode() -> None:
    robot = running()
    assert not robot.admitted(10.03).reset
    robot.dog.refuse(STALE, 10.1)
    ticket = robot.admitted(10.9)
    assert ticket.reset
    assert robot.command(ticket, 10.9)
    assert not robot.admitted(10.93).reset


@pytest.mark.parametrize("watched", [True, False])
def test_after_a_long_stop_it_waits_for_somebody(watched: bool) -> None:
    robot = running()
    robot.dog.refuse(STALE, 10.1)
    if watched:
        robot.dog.watch(11.01)
        assert robot.dog.mode is Mode.WAITING
    assert robot.dog.admit(11.02) is None
    assert robot.dog.mode is Mode.WAITING
    assert robot.dog.reason == STALE.reason
    assert not robot.dog.asks_policy()
    robot.took()
    # By now somebody may have moved it: nothing is sent, nor held when the policy goes on.
    robot.dog.watch(60.0)
    assert robot.dog.enable(False, 60.0)
    assert robot.dog.enable(True, 60.0)
    robot.dog.refuse(STALE, 60.5)
    robot.dog.watch(60.5)
    assert robot.took() == []
    assert robot.admitted(61.0) == Ticket(robot.dog._generation, reset=True, last=None)


def test_stops_without_a_command_between_them_are_one_long_stop() -> None:
    """A policy that is late at every step would otherwise never be given up."""
    robot = running()
    for now in np.arange(10.03, 11.0, 0.03):
        assert robot.dog.admit(now) is not None
        robot.dog.refuse(Refusal("late", "no action in time"), now + 0.02)
        assert robot.dog.mode is Mode.STOPPED
    assert robot.dog.admit(11.05) is None
    assert robot.dog.mode is Mode.WAITING


def armed(how: str, robot: Robot) -> None:
    """Let the policy move the robot at 10.0."""
    robot.dog.open(10.0 if how == "activated" else 1.0)
    if how == "enabled":
        robot.dog.watch(9.9)
        assert robot.dog.mode is Mode.WAITING
        assert robot.dog.enable(True, 10.0)
    if how == "given back":
        robot.dog.teleoperate(np.zeros(2), 1.5)
        robot.dog.watch(10.0)
    assert robot.dog.mode is Mode.STARTING


@pytest.mark.parametrize("how", ["activated", "enabled", "given back"])
@pytest.mark.parametrize("watched", [True, False])
def test_who_armed_the_policy_meant_it_then_and_not_an_hour_later(how: str, watched: bool) -> None:
    robot = Robot(when_stopped="zero", teleop_resumes=True)
    armed(how, robot)
    robot.took()
    robot.dog.refuse(Refusal("missing", "no message came"), 10.0)
    robot.dog.watch(10.0)
    robot.dog.watch(11.0)
    assert robot.dog.reason == "no message came"
    assert robot.took() == [[[0, 0]], [[0, 0]]]
    if watched:
        robot.dog.watch(11.1)
    assert not robot.step(3610.0)
    robot.expect(Mode.WAITING, [[[0, 0]]])
    robot.dog.enable(False, 3610.0)
    robot.dog.watch(3610.0)
    robot.dog.close("deactivated")
    assert robot.took() == [], "somebody else may be driving"


@pytest.mark.parametrize("how", ["activated", "enabled", "given back"])
def test_who_never_wants_it_to_go_on_by_itself_can_begin(how: str) -> None:
    robot = Robot(resume_within=0.0, teleop_resumes=True)
    armed(how, robot)
    robot.took()
    assert robot.step(10.2)
    robot.dog.refuse(STALE, 10.21)
    assert not robot.step(10.22)
    assert robot.dog.mode is Mode.WAITING


CONFLICT = Refusal("conflict", "another node sends commands")


@pytest.mark.parametrize(("when_stopped", "sent"), [("hold", []), ("zero", [[[0, 0]]])])
def test_nobody_is_fought_over_the_robot(when_stopped: str, sent: Any) -> None:
    robot = running(when_stopped=when_stopped)
    robot.dog.refuse(CONFLICT, 10.03)
    robot.expect(Mode.WAITING, sent)
    robot.dog.watch(10.06)
    robot.dog.close("deactivated")
    robot.dog.open(10.0)
    robot.dog.watch(10.1)
    robot.dog.refuse(CONFLICT, 10.13)
    assert robot.dog.mode is Mode.WAITING
    robot.dog.watch(10.16)
    robot.dog.enable(False, 10.2)
    robot.dog.close("deactivated")
    assert robot.took() == []


def test_who_is_stopped_and_hears_another_does_not_go_on_by_itself() -> None:
    robot = running()
    robot.dog.refuse(STALE, 10.03)
    robot.took()
    robot.dog.refuse(CONFLICT, 10.06)
    assert not robot.step(10.1)
    assert robot.took() == []


@pytest.mark.parametrize("kind", ["array", "trajectory"])
@pytest.mark.parametrize("end", ["close", "enable", "operator", "long stop"])
@pytest.mark.parametrize(("lost", "times"), [(1, 2), (9, 3)])
def test_the_last_word_is_said_until_it_is_heard(
    kind: str, end: str, lost: int, times: int
) -> None:
    """A velocity goes on, and a chunk too, if the message that ends it gets lost."""
    robot = running(kind=kind, when_stopped="zero" if kind == "array" else "hold")
    answers = iter([False] * lost + [True] * 9)
    robot.dog._output._outputs[0].acknowledged = lambda: next(answers)
    now = 10.1
    if end == "operator":
        robot.dog.teleoperate(np.array([7.0, 8.0]), now)
    if end == "long stop":
        robot.dog.refuse(STALE, now)
    robot.took()
    match end:
        case "close":
            robot.dog.close("signal 15")
        case "enable":
            robot.dog.enable(False, now)
        case _:
            robot.dog.watch(now + 2)
    standing = [0, 0] if kind == "array" else [7, 8] if end == "operator" else [1, 2]
    # Of a trajectory the stop was sent when it began.
    expected = 0 if (kind, end) == ("trajectory", "long stop") else times
    assert robot.took() == [[standing]] * expected


@pytest.mark.parametrize("before", [True, False])
def test_what_was_last_is_forgotten_with_the_activation(before: bool) -> None:
    """And there is nothing to hold before the first command."""
    robot = running() if before else Robot()
    robot.dog.close("deactivated")
    robot.took()
    robot.dog.open(10.0)
    robot.dog.refuse(STALE, 10.1)
    robot.dog.watch(10.1)
    robot.dog.close("deactivated")
    assert robot.took() == []


def test_a_stop_that_cannot_be_sent_is_a_stop() -> None:
    robot = running()
    ticket = robot.admitted(10.03)

    def broken(**_: Any) -> None:
        raise RuntimeError("the network is gone")

    robot.dog._output.end = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        robot.dog.close("signal 15")
    assert robot.dog.mode is Mode.CLOSED
    assert not robot.command(ticket, 10.04)


def test_disabling_stops_until_enabled() -> None:
    robot = running()
    ticket = robot.admitted(10.03)
    assert robot.dog.enable(False, 10.0)
    assert robot.took() == [[[1, 2]]]
    assert not robot.command(ticket, 10.04)
    assert robot.dog.admit(10.06) is None
    assert robot.dog.enable(True, 10.0)
    assert robot.step(10.1)


def test_reset_on_request() -> None:
    robot = running()
    assert robot.dog.request_reset()
    assert robot.admitted(10.03).reset
    robot.dog.close("deactivated")
    assert not robot.dog.request_reset()


@pytest.mark.parametrize("resumes", [True, False])
def test_an_operator_takes_over_and_gives_back(resumes: bool) -> None:
    robot = running(teleop_resumes=resumes)
    ticket = robot.admitted(10.03)
    robot.dog.teleoperate(np.array([7.0, 8.0]), 10.04)
    assert robot.dog.mode is Mode.TELEOP
    assert not robot.command(ticket, 10.05)
    assert robot.dog.admit(10.06) is None
    robot.dog.watch(10.5)
    assert robot.took() == [[[7, 8]]]
    robot.dog.watch(10.55)
    assert robot.took() == [[[7, 8]]]
    if resumes:
        after = robot.admitted(10.6)
        assert after.reset
        assert after.last is not None
        assert after.last.tolist() == [7, 8]
    else:
        assert robot.dog.admit(10.6) is None
        assert robot.dog.mode is Mode.WAITING
        assert robot.dog.reason == "the operator has given back"
        assert robot.dog.enable(True, 11.0)
        assert robot.step(11.1)


@pytest.mark.parametrize("resumes", [True, False])
def test_an_operator_may_move_a_robot_that_is_stopped_and_it_stays_stopped(resumes: bool) -> None:
    robot = running(teleop_resumes=resumes)
    robot.dog.enable(False, 10.1)
    robot.took()
    robot.dog.teleoperate(np.array([7.0, 8.0]), 20.0)
    robot.dog.watch(21.0)
    robot.expect(Mode.WAITING, [[[7, 8]], [[7, 8]]])
    robot.dog.enable(True, 22.0)
    robot.dog.teleoperate(np.array([7.0, 8.0]), 22.0)
    # What is said while an operator moves the robot says nothing about when he has done.
    assert not robot.dog.enable(True, 22.1)
    assert robot.dog.mode is Mode.TELEOP
    robot.dog.watch(23.0)
    assert robot.dog.mode is Mode.WAITING


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0], [np.nan, 0.0]])
def test_an_operators_nonsense_is_refused(values: list[float]) -> None:
    robot = running()
    with pytest.raises(ObservationError, match="2 finite numbers"):
        robot.dog.teleoperate(np.array(values), 10.04)
    robot.expect(Mode.RUNNING, [])


def test_a_trajectory_is_sent_once_per_chunk_and_cut_short_when_stopped() -> None:
    robot = Robot("trajectory")
    robot.dog.open(10.0)
    chunk = np.arange(8, dtype=np.float32).reshape(4, 2)
    new = chunk + 10

    def step(upcoming: np.ndarray, now: float) -> None:
        assert robot.dog.command(robot.admitted(now), upcoming[0], upcoming, now)

    step(chunk, 10.0)
    step(chunk[1:], 10.03)
    assert robot.took() == [chunk.tolist()]
    step(new, 10.06)
    step(new[1:], 10.09)
    assert robot.took() == [new.tolist()]
    robot.dog.refuse(STALE, 10.1)
    robot.dog.watch(10.13)
    robot.dog.close("deactivated")
    # The point where it should be by now replaces the rest, once.
    assert robot.took() == [[new[1].tolist()]]
    robot.dog.open(10.0)
    step(new[2:], 10.2)
    assert robot.took() == [new[2:].tolist()]
