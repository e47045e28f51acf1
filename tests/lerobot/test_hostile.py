"""Bundles whose files for LeRobot's loader are not ours: what they name is never run."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub
import pytest
from attacks.manifests import reseal
from peers import Peer, Robot

NAME = "ada/pusht-edge"
PROCESSORS = ("policy_preprocessor.json", "policy_postprocessor.json")


def evaluate(
    peer: Peer, source: str | Path, cwd: Path, *options: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`lerobot-eval --policy.path=SOURCE`, one episode of a few steps."""
    command = ["-m", "lerobot.scripts.lerobot_eval", f"--policy.path={source}", "--env.type=pusht"]
    size = ["--env.episode_length=3", "--eval.n_episodes=1", "--eval.batch_size=1"]
    return subprocess.run(
        [peer.python, *command, *size, f"--output_dir={cwd / 'evaluated'}", *options],
        env=peer.environment() | variables,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )


def running(content: dict[str, Any], mark: Path) -> dict[str, Any]:
    """A pipeline with a step that makes a file."""
    step = {"class": "subprocess.Popen", "config": {"args": ["touch", str(mark)]}}
    return {**content, "steps": [step, *content["steps"]]}


def planted(robot: Robot, folder: Path, name: str, mark: Path) -> Path:
    """The bundle, one of its files made hostile, its digests made to fit."""
    bundle = Path(shutil.copytree(robot.bundle, folder / "planted.bundle"))
    content = json.loads((bundle / name).read_text())
    if name in PROCESSORS:
        changed = running(content, mark)
    else:  # what nobody asked for: actions without limits
        changed = {**content, "guards": {"action_limits": None}}
    reseal(bundle, {name: json.dumps(changed).encode()})
    return bundle


@pytest.mark.parametrize("name", [*PROCESSORS, "config.json"])
def test_a_file_that_the_manifest_does_not_make(
    peer: Peer, robot: Robot, tmp_path: Path, name: str
) -> None:
    mark = tmp_path / "ran"
    done = evaluate(peer, planted(robot, tmp_path, name, mark), tmp_path)
    assert not mark.exists()
    assert done.returncode != 0
    assert f"{name} is not what its manifest makes it" in done.stderr.splitlines()[-1]
