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
CommandType = Literal["array", "trajectory", "joint_state"]
WhenStopped = Literal["hold", "silence", "zero"]
AfterTeleop = Literal["wait", "resume"]


@dataclass(frozen=True)
class Cameras:
    """Which topic feeds which camera of the policy; `.../compressed` is a CompressedImage."""

    keys: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()


@dataclass(frozen=True)
class State:
    """The JointState that the policy's state is made of."""

    topic: str = "/joint_states"
    joints: tuple[str, ...] = ()
    units: Units = "as_is"
    scale: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()


@dataclass(frozen=True)
class Command:
    """What is sent where; see `loading.command_joints` and `loading.when_stopped` for None."""

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
    """All of them. Times are in seconds, rates in Hz."""

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
    state: State = field(default_factory=State)
    command: Command = field(default_factory=Command)
    guards: Limits = field(default_factory=Limits)
    teleop: Teleoperation = field(default_factory=Teleoperation)

    def __post_init__(self) -> None:
        for name in ("bundle", "cameras.topics", "state.joints", "command.topic"):
            if not _at(self, name):
                raise UsageError(f"the parameter '{name}' is missing; config/pusht.yaml has all")
        for name in ("max_age", "max_skew", "timeout", "teleop.timeout"):
            if not 0 < _at(self, name) < float("inf"):
                raise UsageError(f"expected '{name}' above 0, got {_at(self, name)!r}")
        if math.isnan(self.predict_within):
            raise UsageError("expected 'predict_within' in seconds, 0 or -1, got nan")
        for name in ("rate", "resume_within", "max_repeats"):
            if not 0 <= _at(self, name) < float("inf"):
                raise UsageError(f"expected '{name}' of 0 or more, got {_at(self, name)!r}")
        self._check_command()

    def _check_command(self) -> None:
        if self.command.type != "array" and self.command.when_stopped == "zero":
            raise UsageError(
                f"command.type {self.command.type!r} is of positions, and command.when_stopped "
                "'zero' would move the joints there; choose 'hold'"
            )
        if self.command.type != "trajectory":
            return
        if self.command.when_stopped not in {None, "hold"}:
            raise UsageError(
                "command.type 'trajectory' goes with command.when_stopped 'hold' alone: a "
                f"controller would go on with the chunk it has, got {self.command.when_stopped!r}"
            )
        if self.guards.max_change:
            raise UsageError(
                "guards.max_change limits single actions, and a trajectory is a whole chunk; "
                "limit the change in the trajectory controller, or choose command.type 'array'"
            )


def defaults() -> dict[str, Any]:
    """Dotted name -> default of every parameter, as ROS declares them: lists, no None."""
    return dict(_defaults(Parameters, ""))


def parse(values: Mapping[str, Any]) -> Parameters:
    """Parameters from dotted names; what is missing or None has its default.

    Raises:
        UsageError: a name is unknown, or a value has the wrong type or is out of range.
    """
    check_names(values)
    nested: dict[str, Any] = {}
    for name, value in values.items():
        group, _, field_name = name.rpartition(".")
        if value is not None and value != "":
            place = nested.setdefault(group, {}) if group else nested
            place[field_name] = list(value) if isinstance(value, array) else value
    try:
        return msgspec.convert(nested, Parameters)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"a parameter does not fit: {error}; config/pusht.yaml explains each of them"
        ) from error


def check_names(names: Mapping[str, Any]) -> None:
    """ROS ignores a parameter that nobody declared, so a misspelled limit would be none.

    Raises:
        UsageError: a name is unknown.
    """
    known = defaults()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {sorted(known)}"
            raise UsageError(f"there is no parameter '{name}'; {hint}")


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
        else:
            value: Any = each.default
            text = "" if value is None else value
            found.append((prefix + each.name, list(text) if isinstance(text, tuple) else text))
    return found
