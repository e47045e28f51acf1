"""The environments that `vqbet-eval` knows.

An environment is a gymnasium one whose observations have the policy's keys: cameras as uint8
(H, W, 3), `observation.state` as float32 (S,); `info["is_success"]` says whether it is solved. To
add one, write such a class and name it in `TASKS`.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import gymnasium

from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.extras import install_command
from vqbet_edge.training.evaluation.detour import DetourEnv
from vqbet_edge.training.evaluation.metaworld import MetaWorldPush
from vqbet_edge.training.evaluation.pusht import PushT, PushTWithContact, PushTWithPose

Environment: TypeAlias = gymnasium.Env[dict[str, Any], Any]

TASKS: dict[str, Callable[[], Environment]] = {
    "detour": DetourEnv,
    "metaworld_push": MetaWorldPush,
    "pusht": PushT,
    "pusht_contact": PushTWithContact,
    "pusht_pose": PushTWithPose,
}

# What commands say of their --env.
ENV_HELP = f"The environment to drive in: {', '.join(TASKS)}."


def make_task(name: str) -> Callable[[], Environment]:
    """The environment's constructor, after one trial that its package is installed.

    Raises:
        UsageError: the name is unknown, or the environment is not installed.
    """
    if name not in TASKS:
        raise UsageError(f"--env {name} is unknown; use one of {', '.join(TASKS)}")
    try:
        TASKS[name]().close()
    except ImportError as e:
        raise UsageError(f"--env {name} needs {e.name}: {install_command('sim')}") from e
    return TASKS[name]
