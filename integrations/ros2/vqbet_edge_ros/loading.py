"""From parameters to a policy that has acted once, and to what reads its inputs."""

from functools import partial
from typing import Any

import numpy as np

from vqbet_edge import EdgePolicy, UsageError
from vqbet_edge_ros.images import decode_compressed, decode_image
from vqbet_edge_ros.inputs import Input
from vqbet_edge_ros.joints import Joints
from vqbet_edge_ros.parameters import Command, Parameters

COMPRESSED = "/compressed"


def load_policy(parameters: Parameters) -> EdgePolicy:
    """The policy, checked, proven and warm.

    Raises:
        VQBeTEdgeError: it cannot be loaded, or does not do what its checkpoint did.
    """
    policy = EdgePolicy.load(
        parameters.bundle,
        parameters.backend,
        seed=parameters.seed,
        temperature=None if parameters.temperature < 0 else parameters.temperature,
        replan_every=parameters.replan_every or None,
        guards=parameters.guards.guards(parameters.max_age),
        prove=True,
    )
    try:
        _warm(policy)
    except BaseException:
        policy.close()
        raise
    return policy


def _warm(policy: EdgePolicy) -> None:
    """The first call is slower than all others, and would be late; a sibling leaves no trace."""
    manifest = policy.manifest
    shapes = manifest.image_shapes.items()
    blank: dict[str, Any] = {key: np.zeros(shape, np.uint8) for key, shape in shapes}
    blank[manifest.state_key] = np.zeros(manifest.state_dim, np.float32)
    with policy.sibling() as other:
        other.act_chunk(blank)


def state_joints(parameters: Parameters, policy: EdgePolicy) -> Joints:
    """The joints of the policy's state.

    Raises:
        UsageError: they do not fit.
    """
    state, dim = parameters.state, policy.manifest.state_dim
    if len(state.joints) != dim:
        raise UsageError(f"expected {dim} joints in state.joints, got {list(state.joints)}")
    return Joints(state.joints, state.units, state.scale, state.offset)


def command_joints(parameters: Parameters, policy: EdgePolicy) -> Joints:
    """The joints of commands: those of the state, unless others are given.

    Raises:
        UsageError: they do not fit.
    """
    given, state, dim = parameters.command, parameters.state, policy.manifest.action_dim
    if not given.joints:
        given = Command(joints=state.joints, units=state.units, scale=state.scale,
                        offset=state.offset)  # fmt: skip
    if len(given.joints) != dim:
        raise UsageError(f"expected {dim} joints in command.joints, got {list(given.joints)}")
    return Joints(given.joints, given.units or "as_is", given.scale, given.offset)


def camera_topics(parameters: Parameters, policy: EdgePolicy) -> dict[str, str]:
    """Feature of the policy -> topic; one camera needs no key.

    Raises:
        UsageError: they do not fit.
    """
    keys, topics = parameters.cameras.keys, parameters.cameras.topics
    wanted = policy.manifest.image_keys
    if not keys and len(wanted) == 1:
        keys = wanted
    if sorted(keys) != sorted(wanted) or len(topics) != len(keys) or len(set(topics)) < len(topics):
        raise UsageError(
            f"expected cameras.keys of {list(wanted)} and one topic for each in cameras.topics, "
            f"got {list(keys)} and {list(topics)}"
        )
    return {key: topics[keys.index(key)] for key in wanted}


def make_inputs(parameters: Parameters, policy: EdgePolicy) -> dict[str, Input]:
    """Feature of the policy -> its topic.

    Raises:
        UsageError: the parameters do not fit the policy.
    """
    manifest = policy.manifest
    inputs: dict[str, Input] = {}
    for key, topic in camera_topics(parameters, policy).items():
        decode: Any = decode_image
        if topic.endswith(COMPRESSED):
            _check_pillow(topic)
            decode = decode_compressed
        shape = manifest.image_shapes[key]
        inputs[key] = Input(topic, partial(decode, shape=shape), parameters.max_age)
    joints = state_joints(parameters, policy)
    inputs[manifest.state_key] = Input(parameters.state.topic, joints.read, parameters.max_age)
    return inputs


def _check_pillow(topic: str) -> None:
    try:
        import PIL.Image  # noqa: F401, PLC0415
    except ImportError as error:
        raise UsageError(
            f"'{topic}' takes Pillow to decode ({error}): sudo apt install python3-pil"
        ) from error
