"""From parameters to a policy that has acted once, and to what reads its inputs."""

import importlib.util
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vqbet_edge import EdgePolicy, UsageError
from vqbet_edge_ros.anchor import Anchor
from vqbet_edge_ros.control import Controller, Step
from vqbet_edge_ros.diagnostics import Statistics
from vqbet_edge_ros.images import decode_compressed, decode_image
from vqbet_edge_ros.inputs import Input, Inputs
from vqbet_edge_ros.joints import NUMBERS, Values
from vqbet_edge_ros.outputs import Output, Outputs
from vqbet_edge_ros.parameters import Parameters
from vqbet_edge_ros.parts import CommandPart, StatePart, command_parts, state_parts
from vqbet_edge_ros.watchdog import Watchdog

_LOG = logging.getLogger(__name__)
COMPRESSED = "/compressed"
_Pieces = dict[int, Values]


def load_policy(parameters: Parameters) -> EdgePolicy:
    """The policy, checked and proven.

    Raises:
        VQBeTEdgeError: it cannot be loaded, or does not do what its checkpoint did.
    """
    if parameters.backend == "tensorrt":
        # vqbet-build does that: it takes minutes, in which the node would not answer.
        os.environ.setdefault("VQBET_EDGE_BUILD_ENGINES", "0")
    policy = EdgePolicy.load(
        parameters.bundle,
        parameters.backend,
        seed=parameters.seed,
        temperature=None if parameters.temperature < 0 else parameters.temperature,
        replan_every=parameters.replan_every or None,
        guards=parameters.guards.guards(parameters.max_age),
        prove=parameters.prove,
        require=parameters.require,
    )
    try:
        _check_observed(policy)
    except BaseException:
        policy.close()
        raise
    return policy


@dataclass(frozen=True)
class Assembly:
    """Everything between messages and commands.

    Attributes:
        rate: of the control loop, in steps per second.
        topics: feature of the policy, or part of one -> its topic; `inputs` joins them.
        state, command: the parts of a state and of an action, in their order.
    """

    rate: float
    topics: dict[str, Input]
    inputs: Inputs
    state: list[StatePart]
    command: list[CommandPart]
    statistics: Statistics
    watchdog: Watchdog
    controller: Controller


def assemble(
    parameters: Parameters,
    policy: EdgePolicy,
    publish: Callable[[CommandPart, Values], None],
    acknowledged: Callable[[CommandPart], bool],
    sent: Callable[[Step], None],
) -> Assembly:
    """Put it together; `publish` and `acknowledged` as of an `Output`, `sent` as of `Controller`.

    The policy is warm afterwards: its first call is slower than all others, and would be late.

    Raises:
        UsageError: the parameters do not fit the policy.
        BackendError: it is too slow for them.
    """
    topics, state = make_inputs(parameters, policy), state_parts(parameters, policy)
    command = command_parts(parameters, policy)
    outputs = Outputs([
        Output(
            part.joints, part.given.type, part.when_stopped,
            partial(publish, part), partial(acknowledged, part),
        )
        for part in command
    ])  # fmt: skip
    watchdog = Watchdog(
        outputs,
        timeout=parameters.timeout,
        resume_within=parameters.resume_within,
        teleop_timeout=parameters.teleop.timeout,
        teleop_resumes=parameters.teleop.after == "resume",
    )
    anchor = Anchor(state, command, limited=bool(parameters.guards.max_change))
    join = partial(_join, policy.manifest.state_key)
    inputs = Inputs(topics, parameters.max_skew, parameters.max_repeats, join)
    statistics = Statistics()
    controller = Controller(policy, inputs, watchdog, statistics, anchor, sent)
    rate = control_rate(parameters, policy)
    policy.check_prediction_time(prediction_time(parameters.predict_within, rate))
    return Assembly(rate, topics, inputs, state, command, statistics, watchdog, controller)


def control_rate(parameters: Parameters, policy: EdgePolicy) -> float:
    """Steps per second: as given, else those of the demonstrations."""
    fps = policy.fps
    rate = parameters.rate or fps
    if rate is None:
        raise UsageError(
            "the parameter 'rate' is missing, and the bundle does not say how many steps a second "
            "the demonstrations have: set it to that (a LeRobot data set's fps)"
        )
    if fps is not None and not math.isclose(rate, fps, rel_tol=0.01):
        _LOG.warning(
            "rate is %g Hz, the demonstrations have %g: the robot will move %.2g times as fast",
            rate, fps, rate / fps,
        )  # fmt: skip
    return rate


def prediction_time(given: float, rate: float) -> float:
    """Seconds that a prediction may take: as given, else until the next step is due."""
    return float("inf") if given < 0 else given or 1 / rate


def _check_observed(policy: EdgePolicy) -> None:
    """The node makes a state of joints, and has nothing to make a goal of."""
    manifest = policy.manifest
    if all(feature.type != "STATE" for feature in manifest.input_features.values()):
        raise UsageError(
            f"the policy observes {list(manifest.observation_shapes)} and no state of joints, "
            "which this node moves a robot by; drive it with EdgePolicy.act instead "
            "(docs/robot-utility-models.md)"
        )


def make_inputs(parameters: Parameters, policy: EdgePolicy) -> dict[str, Input]:
    """Feature of the policy, or part of the state by its topic -> the topic."""
    manifest = policy.manifest
    keys, topics = parameters.cameras.keys, parameters.cameras.topics
    wanted = manifest.image_keys
    if not keys and len(wanted) == 1:  # one camera needs no key
        keys = wanted
    if sorted(keys) != sorted(wanted) or len(topics) != len(keys) or len(set(topics)) < len(topics):
        raise UsageError(
            f"expected cameras.keys of {list(wanted)} and one topic for each in cameras.topics, "
            f"got {list(keys)} and {list(topics)}"
        )
    inputs: dict[str, Input] = {}
    for key, topic in zip(keys, topics, strict=True):
        decode: Any = decode_image
        kind = "image"
        if topic.endswith(COMPRESSED):
            if importlib.util.find_spec("PIL") is None:
                raise UsageError(f"'{topic}' takes Pillow to decode: sudo apt install python3-pil")
            decode, kind = decode_compressed, "compressed"
        shape = manifest.image_shapes[key]
        inputs[key] = Input(topic, partial(decode, shape=shape), parameters.max_age, kind)
    by_topic: dict[str, list[StatePart]] = {}
    for part in state_parts(parameters, policy):
        by_topic.setdefault(part.given.topic, []).append(part)
    if shared := by_topic.keys() & set(topics):
        raise UsageError(f"{sorted(shared)} cannot be of a camera and of the state")
    for topic, parts in by_topic.items():
        # Types of joints are fields of one message, others are messages of their own.
        messages = {part.given.type if part.given.type in NUMBERS else "joints" for part in parts}
        if len(messages) > 1:
            raise UsageError(f"'{topic}' cannot have messages of {sorted(messages)} at once")
        decode = partial(_read_state, parts)
        inputs[topic] = Input(topic, decode, parameters.max_age, parts[0].given.type)
    return inputs


def _read_state(parts: list[StatePart], message: Any) -> _Pieces:
    """A message's pieces of the state, by where they begin."""
    return {part.places.start: part.joints.read(message, part.given.type) for part in parts}


def _join(key: str, values: dict[str, Any]) -> dict[str, Any]:
    """All pieces as the feature `key`, float64 (S,), beside the frames."""
    pieces: _Pieces = {}
    frames: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            pieces |= value
        else:
            frames[name] = value
    return {**frames, key: np.concatenate([pieces[start] for start in sorted(pieces)])}
