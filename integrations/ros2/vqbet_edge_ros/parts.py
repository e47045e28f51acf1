"""What of the state comes from which message, and what of an action goes where."""

from collections.abc import Sequence
from dataclasses import dataclass

from vqbet_edge import EdgePolicy, UsageError
from vqbet_edge_ros.joints import NUMBERS, Joints
from vqbet_edge_ros.parameters import Command, Parameters, State, WhenStopped

# Of `PolicySpec.action_kinds`: a robot that is told the same again stays, or moves on.
_POSITIONS = {"position", "angle", "rotation_vector", "gripper"}
_MOVES = {"velocity", "displacement"}
_TWISTS = {"twist", "twist_stamped"}


@dataclass(frozen=True)
class StatePart:
    """`places` of the state (S,), read from messages as `given` says."""

    given: State
    joints: Joints
    places: slice


@dataclass(frozen=True)
class CommandPart:
    """`places` of an action (A,), sent as `given` says."""

    given: Command
    joints: Joints
    places: slice
    when_stopped: WhenStopped

    @property
    def positions(self) -> bool:
        """Whether these are commands that keep the robot where it is when they are repeated."""
        return self.when_stopped == "hold"


def state_parts(parameters: Parameters, policy: EdgePolicy) -> list[StatePart]:
    """The parts of the policy's state, in its order.

    Raises:
        UsageError: they do not fit it.
    """
    states, dim = parameters.states, policy.manifest.state_dim
    names = [name for each in states.values() for name in each.joints]
    if len(names) != dim:
        raise UsageError(f"expected {dim} joints in {_where('state', states)}, got {names}")
    for part, each in states.items():
        _check_numbers(_name("state", part), each)
    places = _places([each.joints for each in states.values()])
    return [
        StatePart(each, Joints(each.joints, each.units, each.scale, each.offset), place)
        for each, place in zip(states.values(), places, strict=True)
    ]


def command_parts(parameters: Parameters, policy: EdgePolicy) -> list[CommandPart]:
    """The parts of the policy's action, in its order.

    Raises:
        UsageError: they do not fit it, or it is not clear what they are.
    """
    commands, manifest = parameters.commands, policy.manifest
    joints = [_names(each, parameters) for each in commands.values()]
    names = [name for each in joints for name in each]
    if len(names) != manifest.action_dim:
        where = _where("command", commands)
        raise UsageError(f"expected {manifest.action_dim} joints in {where}, got {names}")
    if len(set(names)) < len(names):
        raise UsageError(f"expected every joint in one part of the command, got {names}")
    made = []
    for (part, given), place in zip(commands.items(), _places(joints), strict=True):
        name = _name("command", part)
        _check_numbers(name, given)
        stopped = when_stopped(given, set(manifest.policy.action_kinds[place]), name)
        scaled = command_joints(given, parameters, positions=stopped == "hold", name=name)
        made.append(CommandPart(given, scaled, place, stopped))
    return made


def when_stopped(given: Command, kinds: set[str], name: str = "command") -> WhenStopped:
    """What is sent while the policy is stopped; `hold` says that commands are positions.

    Args:
        given: the part of the command.
        kinds: of its numbers, as far as the bundle knows them.
        name: of the part, for an error.
    """
    if given.type in _TWISTS:
        kinds = kinds | {"velocity"}
        if given.when_stopped is None and not kinds & _POSITIONS:
            return "zero"
    positions = bool(kinds) and kinds <= _POSITIONS
    if given.when_stopped is None and (positions or (given.type != "array" and not kinds & _MOVES)):
        return "hold"
    wrong = {"hold": kinds & _MOVES, "zero": kinds & _POSITIONS, "silence": ()}
    if given.when_stopped is None or wrong[given.when_stopped]:
        raise UsageError(
            f"expected {name}.when_stopped of 'hold' where commands are positions, 'zero' where "
            "they are velocities or efforts, with which a controller goes on, or 'silence'; got "
            f"{given.when_stopped or 'nothing'!r}, and actions are {sorted(kinds) or ['unknown']}"
        )
    return given.when_stopped


def command_joints(
    given: Command, parameters: Parameters, *, positions: bool, name: str = "command"
) -> Joints:
    """The joints of a part of the command.

    Units, scale and offset are the state's where not given, of positions of joints that are in one
    part of the state; of other commands, those that the state has must be given.
    """
    names, states = _names(given, parameters), parameters.states.values()
    measured = [e for e in states if e.type == "joint_state" and set(names) <= set(e.joints)]
    state = measured[0] if positions and measured else None
    for field in ("units", "scale", "offset"):
        has = any(getattr(each, field) not in {"as_is", ()} for each in states)
        if has and state is None and not getattr(given, field) and given.type not in _TWISTS:
            raise UsageError(
                f"{name}.{field} is missing: there is state.{field}, and commands that are not "
                "positions of the state's joints may have the same or another; give it"
            )
    if state is None:
        return Joints(names, given.units or "as_is", given.scale, given.offset)
    places = [state.joints.index(each) for each in names]
    scale = given.scale or tuple(state.scale[place] for place in places if state.scale)
    offset = given.offset or tuple(state.offset[place] for place in places if state.offset)
    return Joints(names, given.units or state.units, scale, offset)


def _names(given: Command, parameters: Parameters) -> tuple[str, ...]:
    """Of a part's joints; of the only one, the state's where it has none."""
    alone = len(parameters.commands) == len(parameters.states) == 1
    return given.joints or (next(iter(parameters.states.values())).joints if alone else ())


def _check_numbers(name: str, given: State | Command) -> None:
    known = NUMBERS.get(given.type)
    if known is not None and not set(given.joints) <= set(known):
        raise UsageError(
            f"expected {name}.joints of a message of type {given.type!r} to be among "
            f"{list(known)}, got {list(given.joints)}"
        )


def _places(joints: Sequence[Sequence[str]]) -> list[slice]:
    """Where each part stands, one behind the other."""
    ends = [sum(map(len, joints[: number + 1])) for number in range(len(joints))]
    return [slice(end - len(part), end) for end, part in zip(ends, joints, strict=True)]


def _name(group: str, part: str) -> str:
    return f"{group}.{part}" if part else group


def _where(group: str, parts: dict[str, State] | dict[str, Command]) -> str:
    return ", ".join(f"{_name(group, part)}.joints" for part in parts)
