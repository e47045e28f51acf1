"""The environments that `vqbet-eval` and `vqbet-train --eval-env` know, and other people's.

An environment is a gymnasium one, made without arguments, whose observations have the policy's
keys: `observation_space` is a `Dict` of cameras as uint8 (H, W, 3) and `observation.state` as
float32 (S,), `action_space` a `Box` (A,). `info["is_success"]` says at an episode's end whether it
is solved. Somebody's own is named as `module:Class`, from the working directory or installed.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium
from gymnasium import spaces

from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.extras import install_command
from vqbet_edge.training.config import STATE_KEY
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
ENV_HELP = f"The environment to drive in: {', '.join(TASKS)}, or your own as module:Class."


def make_task(name: str) -> Callable[[], Environment]:
    """The environment's constructor, after one trial that it is there and fits.

    Args:
        name: of `TASKS`, or "module:Class".

    Raises:
        UsageError: the name is unknown, the environment is not installed, or no such environment.
    """
    make = _own(name) if ":" in name else TASKS.get(name)
    if make is None:
        raise UsageError(
            f"the environment {name} is unknown; use one of {', '.join(TASKS)}, or your own as "
            "module:Class"
        )
    try:
        trial = make()
    except ImportError as e:
        what = install_command("sim") if name in TASKS else f"install {e.name or 'it'}"
        raise UsageError(f"the environment {name} needs {e.name}: {what}") from e
    except TypeError as e:
        raise UsageError(f"{name} cannot be made without arguments: {e}") from e
    lacking = _lacking(trial)
    if hasattr(trial, "close"):
        trial.close()
    if lacking:
        raise UsageError(
            f"{name} is no environment for a policy: {lacking}; "
            "vqbet_edge/training/evaluation/tasks.py says what one has to offer"
        )
    return make


def _own(name: str) -> Callable[[], Environment]:
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` has it
        sys.path.insert(0, here)
    try:
        made: Callable[[], Environment] = getattr(importlib.import_module(module), attribute)
    except ImportError as e:
        raise UsageError(
            f"the environment {name} cannot be imported: {e}; the module has to be in this folder "
            "or installed"
        ) from e
    except (AttributeError, TypeError, ValueError) as e:  # a path is no module
        raise UsageError(f"the environment {name}: {e}; expected module:Class") from e
    if not callable(made):
        raise UsageError(f"the environment {name} is {made!r}, expected a class")
    return made


def _lacking(env: object) -> str:
    """What keeps an object from being an environment for policies; empty if nothing does."""
    if not isinstance(env, gymnasium.Env):
        return f"it is {type(env).__name__}, expected a gymnasium.Env"
    observations: object = getattr(env, "observation_space", None)
    if not isinstance(observations, spaces.Dict):
        return f"observation_space is {observations}, expected a gymnasium.spaces.Dict"
    if not isinstance(getattr(env, "action_space", None), spaces.Box):
        return "action_space is no gymnasium.spaces.Box"
    for key, space in observations.items():
        shape, dtype = space.shape or (), str(space.dtype)
        camera = len(shape) == 3 and shape[2] == 3 and dtype == "uint8"
        if key.startswith("observation.image") and not camera:
            return f"'{key}' is {dtype} {shape}, expected uint8 (height, width, 3)"
    if STATE_KEY not in observations.spaces:
        return f"it shows {', '.join(observations)}, and no '{STATE_KEY}'"
    return ""


def check_task(
    name: str, make: Callable[[], Environment], shapes: Mapping[str, tuple[int, ...]], actions: int
) -> None:
    """Refuse an environment that a policy cannot be driven in.

    Args:
        name: of the environment.
        make: its constructor.
        shapes: by key what the policy observes: (H, W, 3) of cameras, (S,) of the state.
        actions: the width of an action.

    Raises:
        UsageError: says what differs.
    """
    env = make()
    shown = {key: space.shape for key, space in env.observation_space.items()}  # type: ignore[attr-defined]
    taken = env.action_space.shape
    env.close()
    for key, shape in shapes.items():
        if shown.get(key) != shape:
            raise UsageError(
                f"the policy observes '{key}' of shape {shape}, and {name} shows "
                f"{shown.get(key, 'none')}; it has {', '.join(shown)}"
            )
    if taken != (actions,):
        raise UsageError(f"the policy's actions are ({actions},), and {name} takes {taken}")
