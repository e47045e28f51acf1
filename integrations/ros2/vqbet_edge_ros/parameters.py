"""The node's parameters, as frozen dataclasses; `config/pusht.yaml` explains each of them."""

import dataclasses
import difflib
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from vqbet_edge import Guards, UsageError
from vqbet_edge.runtime.backends import BackendName

Stamps = Literal["header", "receive"]
Units = Literal["as_is", "degrees"]
StateType = Literal["joint_state", "joint_velocity", "joint_effort", "pose", "odometry"]
CommandType = Literal["array", "trajectory", "joint_state", "twist", "twist_stamped"]
WhenStopped = Literal["hold", "silence", "zero"]
AfterTeleop = Literal["wait", "resume"]


@dataclass(frozen=True)
class Cameras:
    """Which topic feeds which camera of the policy; `.../compressed` is a CompressedImage."""

    keys: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()


@dataclass(frozen=True)
class State:
    """The messages that the policy's state, or a part of it, is made of."""

    topic: str = "/joint_states"
    type: StateType = "joint_state"
    joints: tuple[str, ...] = ()
    units: Units = "as_is"
    scale: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()


@dataclass(frozen=True)
class Command:
    """What of the action is sent where; see `parts` for what None stands for."""

    topic: str = ""
    type: CommandType = "array"
    joints: tuple[str, ...] = ()
    units: Units | None = None
    scale: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()
    when_stopped: WhenStopped | None = None


@dataclass(frozen=True)
class Limits:
    """`vqbet_edge.Guards`, spelled for ROS."""

    action_limits: Literal["data", "given", "none"] = "data"
    lowest: tuple[float, ...] = ()
    highest: tuple[float, ...] = ()
    margin: float = 0.1
    max_change: tuple[float, ...] = ()
    state_limits: Literal["data", "none"] = "none"
    deadline: float = 0.0
    on_late: Literal["raise", "hold", "continue"] = "raise"

    def guards(self, max_age: float) -> Guards:
        """As the policy takes them."""
        limits: Any = {"data": "data", "none": None, "given": (self.lowest, self.highest)}
        return Guards(
            action_limits=limits[self.action_limits],
            margin=self.margin,
            max_change=self.max_change or None,
            state_limits="data" if self.state_limits == "data" else None,
            max_age_s=max_age,
            deadline_s=self.deadline or None,
            on_late=self.on_late if self.deadline else None,
        )


@dataclass(frozen=True)
class Teleoperation:
    """The topic whose commands pre-empt the policy's; empty: there is none."""

    topic: str = ""
    timeout: float = 0.5
    after: AfterTeleop = "wait"


@dataclass(frozen=True)
class Parameters:
    """All of them. Times are in seconds, rates in Hz.

    `states` and `commands` are the parts of state and action in their order, by their names; where
    the file names no parts there is one, without a name.
    """

    bundle: str = ""
    backend: BackendName = "auto"
    require: tuple[BackendName, ...] = ()
    predict_within: float = 0.0
    seed: int = 0
    temperature: float = -1.0
    replan_every: int = 0
    rate: float = 0.0
    prove: bool = True
    autostart: bool = False
    stamps: Stamps = "header"
    max_age: float = 0.2
    max_skew: float = 0.1
    max_repeats: int = 1
    timeout: float = 0.2
    resume_within: float = 2.0
    cameras: Cameras = field(default_factory=Cameras)
    states: dict[str, State] = field(default_factory=dict)
    commands: dict[str, Command] = field(default_factory=dict)
    guards: Limits = field(default_factory=Limits)
    teleop: Teleoperation = field(default_factory=Teleoperation)

    def __post_init__(self) -> None:
        needed = {"bundle": self.bundle, "cameras.topics": self.cameras.topics}
        needed |= {_named("state", part, "joints"): e.joints for part, e in self.states.items()}
        needed |= {_named("command", part, "topic"): e.topic for part, e in self.commands.items()}
        for name, value in needed.items():
            if not value:
                raise UsageError(f"the parameter '{name}' is missing; config/pusht.yaml has all")
        for name in ("max_age", "max_skew", "timeout", "teleop.timeout"):
            if not 0 < _at(self, name) < float("inf"):
                raise UsageError(f"expected '{name}' above 0, got {_at(self, name)!r}")
        if math.isnan(self.predict_within):
            raise UsageError("expected 'predict_within' in seconds, 0 or -1, got nan")
        for name in ("rate", "resume_within", "max_repeats"):
            if not 0 <= _at(self, name) < float("inf"):
                raise UsageError(f"expected '{name}' of 0 or more, got {_at(self, name)!r}")
        topics = [each.topic for each in self.commands.values()]
        if len(set(topics)) < len(topics):
            raise UsageError(f"expected a topic for every part of the command, got {topics}")
        for each in self.commands.values():
            self._check_command(each)

    def _check_command(self, command: Command) -> None:
        if command.type in {"trajectory", "joint_state"} and command.when_stopped == "zero":
            raise UsageError(
                f"command.type {command.type!r} is of positions, and command.when_stopped "
                "'zero' would move the joints there; choose 'hold'"
            )
        if command.type != "trajectory":
            return
        if command.when_stopped not in {None, "hold"}:
            raise UsageError(
                "command.type 'trajectory' goes with command.when_stopped 'hold' alone: a "
                f"controller would go on with the chunk it has, got {command.when_stopped!r}"
            )
        if self.guards.max_change:
            raise UsageError(
                "guards.max_change limits single actions, and a trajectory is a whole chunk; "
                "limit the change in the trajectory controller, or choose command.type 'array'"
            )


# Group of parameters -> where its parts are in `Parameters`, and what one is.
_PARTS: dict[str, tuple[str, Any]] = {"state": ("states", State), "command": ("commands", Command)}


def defaults(values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Dotted name -> default of every parameter, as ROS declares them: lists, no None.

    Args:
        values: of which `state.parts` and `command.parts` name parts, whose parameters there are.
    """
    found = dict(_defaults(Parameters, ""))
    for group, (_, kind) in _PARTS.items():
        for prefix in (group, *(f"{group}.{part}" for part in _parts(group, values or {}))):
            found |= _defaults(kind, f"{prefix}.")
        found[f"{group}.parts"] = []
    return found


def parse(values: Mapping[str, Any]) -> Parameters:
    """Parameters from dotted names; what is missing or None has its default.

    Raises:
        UsageError: a name is unknown, or a value has the wrong type or is out of range.
    """
    check_names(values)
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        if value is not None and value != "":
            place = nested
            for each in path:
                place = place.setdefault(each, {})
            place[last] = list(value) if isinstance(value, array) else value
    for group, (plural, kind) in _PARTS.items():
        found, parts = nested.pop(group, {}), _parts(group, values)
        nested[plural] = {part: found.get(part, {}) for part in parts} or {"": found}
        for part, given in nested[plural].items():
            _convert(given, kind, f".{group}" + f".{part}" * bool(part))
        if parts:
            _check_whole(group, kind, parts[0], values)
    converted: Parameters = _convert(nested, Parameters, "")
    return converted


def check_names(names: Mapping[str, Any]) -> None:
    """ROS ignores a parameter that nobody declared, so a misspelled limit would be none.

    Raises:
        UsageError: a name is unknown.
    """
    known = defaults(names)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {sorted(known)}"
            raise UsageError(f"there is no parameter '{name}'; {hint}")


def _parts(group: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a group's parts, none where it is one."""
    names = values.get(f"{group}.parts") or ()
    fields = {each.name for each in dataclasses.fields(_PARTS[group][1])} | {"parts"}
    given = not isinstance(names, str) and all(isinstance(name, str) for name in names)
    if not given or len(set(names)) < len(names) or not all(map(str.isidentifier, names)):
        raise UsageError(f"expected {group}.parts to be names, each once, got {names!r}")
    if taken := fields & set(names):
        raise UsageError(f"{group}.parts: {sorted(taken)} are names of parameters, choose others")
    return tuple(names)


def _check_whole(group: str, kind: Any, part: str, values: Mapping[str, Any]) -> None:
    """What every part has is not given for all of them."""
    for name, default in _defaults(kind, ""):
        if values.get(f"{group}.{name}") not in (None, "", default):
            raise UsageError(
                f"with {group}.parts, every part has its own '{name}': give '{group}.{part}.{name}'"
                f" and the like instead of '{group}.{name}'"
            )


def _convert(values: Mapping[str, Any], kind: Any, at: str) -> Any:
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        text = str(error).replace("`$", f"`${at}")
        raise UsageError(
            f"a parameter does not fit: {text}; config/pusht.yaml explains each of them"
        ) from error


def _named(group: str, part: str, name: str) -> str:
    return ".".join(filter(None, [group, part, name]))


def _at(parameters: Parameters, name: str) -> Any:
    value: Any = parameters
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _defaults(cls: Any, prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for each in dataclasses.fields(cls):
        if dataclasses.is_dataclass(each.type):
            found += _defaults(each.type, f"{prefix}{each.name}.")
        elif each.name not in {plural for plural, _ in _PARTS.values()}:
            value: Any = each.default
            text = "" if value is None else value
            found.append((prefix + each.name, list(text) if isinstance(text, tuple) else text))
    return found
