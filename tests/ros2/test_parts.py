"""A state of several messages, and an action that goes to several topics."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import miniature
import numpy as np
import pytest
from vqbet_edge_ros.anchor import Anchor
from vqbet_edge_ros.joints import Joints, Values
from vqbet_edge_ros.loading import assemble, load_policy, make_inputs
from vqbet_edge_ros.outputs import Output, Outputs
from vqbet_edge_ros.parameters import Command, Parameters, State, defaults, parse
from vqbet_edge_ros.parts import command_parts, state_parts, when_stopped

from vqbet_edge import EdgePolicy, ObservationError, UsageError

BASE: dict[str, Any] = {"bundle": "x.bundle", "cameras.topics": ["/camera"], "rate": 30.0}
# Two joints in degrees, the gripper in other units, a base that drives and turns.
STATES: dict[str, Any] = {
    "state.parts": ["arm", "speed", "base"],
    "state.arm.joints": ["a", "b"], "state.arm.units": "degrees",
    "state.speed.type": "joint_velocity", "state.speed.joints": ["b"],
    "state.base.topic": "/odom", "state.base.type": "odometry",
    "state.base.joints": ["twist.twist.linear.x", "pose.pose.orientation.z"],
    "state.base.scale": [2.0, 1.0],
}  # fmt: skip
COMMANDS: dict[str, Any] = {
    "command.parts": ["arm", "gripper", "base"],
    "command.arm.topic": "/arm", "command.arm.joints": ["b", "a"],
    "command.arm.when_stopped": "hold",
    "command.gripper.topic": "/gripper", "command.gripper.joints": ["g"],
    "command.gripper.type": "joint_state", "command.gripper.units": "as_is",
    "command.gripper.scale": [0.5], "command.gripper.offset": [1.0],
    "command.base.topic": "/cmd_vel", "command.base.type": "twist",
    "command.base.joints": ["linear.x", "angular.z"],
}  # fmt: skip
MANY = BASE | STATES | COMMANDS


def fake(kinds: tuple[str, ...] = ()) -> Any:
    """Of a policy of five states and five actions, what its parts are asked of."""
    spec = SimpleNamespace(action_kinds=kinds)
    shapes = {"observation.image": (24, 24, 3)}
    return SimpleNamespace(manifest=SimpleNamespace(
        state_dim=5, action_dim=5, policy=spec, state_key="observation.state", image_shapes=shapes,
        image_keys=tuple(shapes),
    ))  # fmt: skip


def odometry(speed: float = 0.0, turned: float = 0.0) -> Any:
    twist = SimpleNamespace(linear=SimpleNamespace(x=speed, y=7.0))
    pose = SimpleNamespace(orientation=SimpleNamespace(z=turned, w=7.0))
    return SimpleNamespace(twist=SimpleNamespace(twist=twist), pose=SimpleNamespace(pose=pose))


def test_without_parts_there_is_one_of_each() -> None:
    plain = {"state.joints": ["a"], "command.topic": "/out"}
    read = parse(BASE | plain)
    assert read.states == {"": State(joints=("a",))}
    assert read.commands == {"": Command(topic="/out")}
    assert parse(defaults() | BASE | plain) == read
    many = parse(MANY)
    assert list(many.states) == STATES["state.parts"]
    assert list(many.commands) == COMMANDS["command.parts"]
    assert many.commands["gripper"].scale == (0.5,)
    # As ROS gives them: every parameter with a value.
    assert parse(defaults(MANY) | MANY) == many


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"command.grip.topic": "/x"}, r"no parameter 'command\.grip\.topic'"),
        ({"command.arm.topics": "/x"}, r"did you mean 'command\.arm\.topic'"),
        ({"command.topic": "/out"}, r"give 'command\.arm\.topic' and the like"),
        ({"command.when_stopped": "hold"}, r"give 'command\.arm\.when_stopped'"),
        ({"state.joints": ["a"]}, r"give 'state\.arm\.joints' and the like"),
        ({"state.parts": ["arm", "arm"]}, r"expected state\.parts to be names, each once"),
        ({"state.parts": "arm"}, r"expected state\.parts to be names, each once, got 'arm'"),
        ({"state.parts": ["arm.left"]}, r"expected state\.parts to be names"),
        ({"state.parts": ["joints"]}, r"state\.parts: \['joints'\] are names of parameters"),
        ({"state.arm.joints": []}, r"the parameter 'state\.arm\.joints' is missing"),
        ({"command.gripper.topic": ""}, r"the parameter 'command\.gripper\.topic' is missing"),
        ({"command.gripper.topic": "/arm"}, "expected a topic for every part of the command"),
        ({"command.gripper.type": "grip"}, r"Invalid enum value 'grip' - at `\$\.command\.gripper"),
        ({"command.gripper.when_stopped": "zero"}, "would move the joints there"),
        ({"command.gripper.type": "trajectory", "guards.max_change": [1.0]}, "max_change limits"),
    ],
)
def test_parts_that_are_none_are_refused(changed: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(MANY | changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"state.base.joints": ["twist.twist.linear.x"]},
            "expected 5 joints in state.arm.joints, ",
        ),
        (
            {"state.base.joints": ["linear.x", "linear.y"]},
            "'odometry' to be among .*'twist.twist.l",
        ),
        ({"command.base.joints": ["linear.x", "x"]}, "'twist' to be among .*'linear.x'"),
        ({"command.base.joints": ["linear.x"]}, "expected 5 joints in command.arm.joints, command"),
        ({"command.gripper.joints": ["a"]}, "every joint in one part of the command"),
        ({"command.gripper.scale": []}, "command.gripper.scale is missing: there is state.scale"),
        ({"command.arm.joints": ["b", "c"]}, "command.arm.units is missing: there is state.units"),
        ({"command.arm.when_stopped": ""}, "expected command.arm.when_stopped of 'hold' where"),
        (
            {"command.base.when_stopped": "hold"},
            "expected command.base.when_stopped .* 'hold', and",
        ),
        ({"state.base.topic": "/joint_states"}, "cannot have messages of .'joints', 'odometry'"),
        ({"state.base.topic": "/camera"}, "cannot be of a camera and of the state"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed: Any, said: str) -> None:
    read = parse(MANY | changed)
    with pytest.raises(UsageError, match=said):  # noqa: PT012 - one of them does
        make_inputs(read, fake())
        command_parts(read, fake())


def test_a_state_is_its_parts_in_their_order() -> None:
    """Positions and velocities are of one message, and numbers of others by where they stand."""
    read = parse(MANY)
    inputs = make_inputs(read, fake())
    assert {each.name: each.kind for each in inputs.values()} == {
        "/camera": "image", "/joint_states": "joint_state", "/odom": "odometry",
    }  # fmt: skip
    joints = SimpleNamespace(name=["b", "a"], position=[np.pi, np.pi / 2], velocity=[0.25, 9.0])
    found = inputs["/joint_states"]._decode(joints) | inputs["/odom"]._decode(odometry(1.5, 0.5))
    np.testing.assert_allclose(
        np.concatenate([found[n] for n in sorted(found)]), [90, 180, 0.25, 3, 0.5]
    )
    joints.velocity = []
    with pytest.raises(ObservationError, match="expected 2 velocities, got 0"):
        inputs["/joint_states"]._decode(joints)
    with pytest.raises(ObservationError, match=r"expected finite numbers, got .*linear.x': nan"):
        inputs["/odom"]._decode(odometry(float("nan")))


class Told:
    """What was sent where, and who acknowledges."""

    def __init__(self, read: Parameters, policy: Any) -> None:
        self.sent: list[tuple[str, list[float]]] = []
        self.deaf: set[str] = set()
        self.broken: set[str] = set()
        self.asked: list[str] = []
        self.parts = command_parts(read, policy)
        self.outputs = Outputs([self._output(each.given.topic, each) for each in self.parts])

    def _output(self, topic: str, part: Any) -> Output:
        def publish(rows: Values) -> None:
            if topic in self.broken:
                raise RuntimeError(topic)
            self.sent.append((topic, rows[0].round(6).tolist()))

        def acknowledged() -> bool:
            self.asked.append(topic)
            return topic not in self.deaf

        return Output(part.joints, part.given.type, part.when_stopped, publish, acknowledged)

    def took(self) -> list[tuple[str, list[float]]]:
        sent, self.sent = self.sent, []
        return sent


ACTION = np.array([90.0, 180.0, 2.0, 0.5, -0.5], np.float32)
ARM, GRIPPER = [1.570796, 3.141593], [2.0]


def test_an_action_is_sent_in_parts_and_stopped_in_parts() -> None:
    """Positions are held, velocities zero; all are told before anybody is waited for."""
    told = Told(parse(MANY), fake())
    assert [each.when_stopped for each in told.parts] == ["hold", "hold", "zero"]
    outputs = told.outputs
    assert (outputs.width, outputs.last) == (5, None)
    outputs.command(ACTION, ACTION[None])
    moved = [("/arm", ARM), ("/gripper", GRIPPER), ("/cmd_vel", [0.5, -0.5])]
    stopped = [*moved[:2], ("/cmd_vel", [0.0, 0.0])]
    assert told.took() == moved
    np.testing.assert_allclose(outputs.last, [*ARM, *GRIPPER, 0.5, -0.5], rtol=1e-6)
    outputs.stand()
    assert told.took() == stopped
    told.deaf = {"/cmd_vel"}
    outputs.end()
    assert told.took() == [*stopped, stopped[2], stopped[2]]
    assert told.asked == ["/arm", "/gripper", "/cmd_vel", "/cmd_vel", "/cmd_vel"]
    # Somebody else may have moved the positions, but goes nowhere with a zero.
    outputs.end(alone=False)
    assert told.took() == [stopped[2]] * 3
    outputs.forward(np.arange(5.0))
    assert told.took() == [("/arm", [0, 1]), ("/gripper", [2]), ("/cmd_vel", [3, 4])]
    outputs.clear()
    assert outputs.last is None
    outputs.stand()
    assert told.took() == [stopped[2]]


@pytest.mark.parametrize("how", ["stand", "end"])
def test_a_part_that_fails_keeps_no_other_from_stopping(how: str) -> None:
    told = Told(parse(MANY), fake())
    told.outputs.command(ACTION, ACTION[None])
    told.took()
    told.broken = {"/arm", "/gripper"}
    with pytest.raises(RuntimeError, match="/gripper"):
        getattr(told.outputs, how)()
    assert told.took() == [("/cmd_vel", [0.0, 0.0])]


def test_a_trajectory_is_held_as_one_point_when_late() -> None:
    """The rest of the chunk is not executed; it comes again once the policy has caught up."""
    sent: list[list[list[float]]] = []
    joints = Joints(("a", "b"))
    output = Output(joints, "trajectory", "hold", lambda rows: sent.append(rows.tolist()), bool)
    chunk = np.arange(8, dtype=np.float32).reshape(4, 2)
    for upcoming in (chunk, chunk[1:]):
        output.command(upcoming[0], upcoming)
    # What `EdgePolicy.upcoming` is after a late call with on_late: hold.
    output.command(chunk[1], chunk[1:2])
    output.command(chunk[2], chunk[2:])
    output.command(chunk[3], chunk[3:])
    assert sent == [chunk.tolist(), chunk[1:2].tolist(), chunk[2:].tolist()]


def test_an_episode_begins_where_each_part_is(caplog: pytest.LogCaptureFixture) -> None:
    """Measured, or told last, or standing."""
    read = parse(MANY)
    state, command = state_parts(read, fake()), command_parts(read, fake())
    anchor = Anchor(state, command, limited=True)
    seen = np.array([90.0, 180.0, 0.25, 3.0, 0.5])
    last = np.array([0.0, 0.0, 2.0, 0.5, -0.5])
    np.testing.assert_allclose(anchor(seen, last), [180, 90, 2, 0.5, -0.5])
    assert anchor(seen, None) is None  # the gripper's place is not known
    assert "does not hold on this episode's first action" in caplog.text
    np.testing.assert_allclose(
        Anchor(state, [command[0], command[2]], limited=True)(seen, None), [180, 90, 0, 0]
    )


@pytest.mark.parametrize(
    ("kinds", "given", "found"),
    [((), None, "zero"), (("velocity",), None, "zero"), (("velocity",), "silence", "silence"),
     ((), "zero", "zero"), (("position",), None, None), (("position",), "zero", None),
     ((), "hold", None)],
)  # fmt: skip
def test_a_base_is_stopped_by_zero(kinds: Any, given: Any, found: str | None) -> None:
    command = Command(topic="/x", type="twist_stamped", when_stopped=given)
    if found is not None:
        assert when_stopped(command, set(kinds)) == found
        return
    with pytest.raises(UsageError, match=r"expected command\.when_stopped of"):
        when_stopped(command, set(kinds))


def test_each_part_has_its_own_kinds() -> None:
    kinds = ("position", "position", "gripper", "velocity", "velocity")
    undecided = {name: v for name, v in MANY.items() if name != "command.arm.when_stopped"}
    parts = command_parts(parse(undecided), fake(kinds))
    assert [each.when_stopped for each in parts] == ["hold", "hold", "zero"]
    with pytest.raises(
        UsageError, match=r"command\.arm\.when_stopped .*actions are \['velocity'\]"
    ):
        command_parts(parse(undecided), fake(("velocity", "velocity", *kinds[2:])))


MINI: dict[str, Any] = {
    "backend": "onnxruntime", "seed": 5, "max_age": 5.0, "max_skew": 1.0, "timeout": 60.0, "predict_within": -1.0,
    "state.parts": ["arm", "base"], "state.arm.joints": ["a"], "state.base.topic": "/odom",
    "state.base.type": "odometry", "state.base.joints": ["twist.twist.linear.x"],
    "command.parts": ["arm", "base"], "command.arm.topic": "/arm", "command.arm.joints": ["a"],
    "command.arm.when_stopped": "hold", "command.base.topic": "/cmd_vel",
    "command.base.type": "twist", "command.base.joints": ["linear.x"],
}  # fmt: skip


def test_commands_of_parts_are_bitwise_the_policys(mini: Path) -> None:
    given, sent = parse(BASE | MINI | {"bundle": str(mini)}), list[tuple[str, float]]()
    random = np.random.default_rng(3)
    with load_policy(given) as policy, EdgePolicy.load(mini, "onnxruntime", seed=5) as alone:
        made = assemble(
            given, policy, lambda part, rows: sent.append((part.given.topic, float(rows[0, 0]))),
            lambda _: True, lambda _: None,
        )  # fmt: skip
        made.watchdog.open(time.monotonic())
        topics = {each.name: each for each in made.topics.values()}
        for _ in range(8):
            seen = miniature.observation(random)
            (a, speed), now = seen[miniature.STATE].tolist(), time.monotonic()
            messages = {
                "/camera": SimpleNamespace(
                    height=24, width=24, encoding="rgb8", step=72,
                    data=seen[miniature.IMAGE].tobytes(),
                ),
                "/joint_states": SimpleNamespace(name=["a"], position=[a]),
                "/odom": odometry(speed),
            }  # fmt: skip
            for topic, message in messages.items():
                assert sent == []
                topics[topic].offer(message, now, now)
                if made.statistics.counts.get("commands", 0) == 0:
                    made.controller.tick()  # there is no observation before all parts came
            made.controller.tick()
            first, second = alone.act(seen).tolist()
            assert sent == [("/arm", first), ("/cmd_vel", second)]
            sent.clear()
