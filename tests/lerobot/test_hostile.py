"""Bundles whose files for LeRobot's loader are not ours: what they name is never run."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub
import oracle
import pytest
from attacks.manifests import reseal
from peers import Peer, Robot

from vqbet_edge import BundleError, UsageError

oracle.lerobot("policies.factory")

from lerobot.configs.policies import PreTrainedConfig  # noqa: E402
from lerobot_policy_vqbet_edge import VqbetEdgePolicy  # noqa: E402

CONFIG = "config.json"
PROCESSORS = ("policy_preprocessor.json", "policy_postprocessor.json")
# Tells what LeRobot has parsed, waits while the repository changes, and goes on as LeRobot does.
PINNING = """
import sys
from lerobot.configs.policies import PreTrainedConfig
from lerobot.utils.import_utils import register_third_party_plugins
register_third_party_plugins()
for name in sys.argv[1:]:
    config = PreTrainedConfig.from_pretrained(name)
    print("parsed")
    sys.stdin.readline()
    try:
        config.pretrained_path = name
        print(config.pretrained_path)
    except Exception as error:
        print(type(error).__name__, error)
"""


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        content = json.loads(data)
        change(content)
        return json.dumps(content).encode()

    return edit


def running(mark: Path) -> Callable[[bytes], bytes]:
    """A pipeline with a step that makes a file."""
    step = {"class": "subprocess.Popen", "config": {"args": ["touch", str(mark)]}}
    return edited(lambda content: content["steps"].insert(0, step))


def planted(robot: Robot, folder: Path, name: str, edit: Callable[[bytes], bytes]) -> Path:
    """The bundle, one of its files changed, its digests made to fit."""
    bundle = Path(shutil.copytree(robot.bundle, folder / "planted.bundle"))
    reseal(bundle, {name: edit((bundle / name).read_bytes())})
    return bundle


@pytest.mark.extended
def test_lerobots_own_command_runs_nothing(peer: Peer, robot: Robot, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    bundle = planted(robot, tmp_path, PROCESSORS[0], running(mark))
    command = ["-m", "lerobot.scripts.lerobot_eval", f"--policy.path={bundle}", "--env.type=pusht"]
    size = ["--env.episode_length=3", "--eval.n_episodes=1", "--eval.batch_size=1"]
    done = peer.run(*command, *size, f"--output_dir={tmp_path / 'evaluated'}", cwd=tmp_path)
    assert not mark.exists()
    assert done.returncode != 0
    assert f"{PROCESSORS[0]} is not what its manifest makes it" in done.stderr.splitlines()[-1]


LOOSE: dict[str, Any] = {"guards": {"action_limits": None}, "temperature": 0, "seed": 3}


@pytest.mark.parametrize("name", [PROCESSORS[1], CONFIG])
def test_files_that_the_manifest_does_not_make(robot: Robot, cwd: Path, name: str) -> None:
    edit = running(Path("ran")) if name != CONFIG else edited(lambda c: c.update(LOOSE))
    bundle = planted(robot, cwd, name, edit)
    config = PreTrainedConfig.from_pretrained(bundle)
    with pytest.raises(BundleError, match=f"{name} is not what its manifest makes it"):
        config.pretrained_path = bundle  # as LeRobot's commands do, before they read processors
    with pytest.raises(BundleError, match=f"{name} is not what its manifest makes it"):
        VqbetEdgePolicy.from_pretrained(bundle)
    assert not (cwd / "ran").exists()


@pytest.mark.parametrize("said", [{"use_peft": True}, {"pretrained_path": "ada/other"}])
def test_a_configuration_names_no_other_policy(robot: Robot, cwd: Path, said: object) -> None:
    bundle = planted(robot, cwd, CONFIG, edited(lambda content: content.update(said)))  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="expected neither use_peft nor pretrained_path"):
        PreTrainedConfig.from_pretrained(bundle)


def test_a_checkpoint_of_lerobots_with_our_manifest_is_no_bundle(robot: Robot, cwd: Path) -> None:
    """LeRobot goes by the type, and would run its own policy; we refuse it on every road."""
    bundle = planted(robot, cwd, CONFIG, lambda _: (robot.checkpoint / CONFIG).read_bytes())
    with pytest.raises(UsageError, match="checkpoint of type vqbet, expected a bundle"):
        VqbetEdgePolicy.from_pretrained(bundle)


@pytest.mark.extended
def test_one_snapshot_is_parsed_checked_and_loaded(
    installed: Path, robot: Robot, tmp_path: Path
) -> None:
    """Whatever the repository becomes in between."""
    good = {path.name: path.read_bytes() for path in robot.bundle.iterdir()}
    evil = planted(robot, tmp_path, PROCESSORS[0], running(tmp_path / "ran"))
    loose = edited(lambda content: content.update(LOOSE))(good[CONFIG])
    stages: dict[str, tuple[dict[str, bytes], dict[str, bytes]]] = {
        "ada/evil": ({path.name: path.read_bytes() for path in evil.iterdir()}, {}),
        "ada/loose": ({**good, CONFIG: loose}, good),
        "ada/good": (good, {}),
    }
    found, peer, pipe = [], Peer(sys.executable, installed), subprocess.PIPE
    with hub.serving() as server:
        environment = peer.environment() | server.variables(tmp_path / "home")
        command = [peer.python, "-uc", PINNING, *stages]
        for name, (first, _) in stages.items():
            server.add(name, first)
        with subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, text=True
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            for name, (_, second) in stages.items():
                assert child.stdout.readline() == "parsed\n"
                if second:
                    server.add(name, second)
                child.stdin.write("\n")
                child.stdin.flush()
                found.append(child.stdout.readline().strip())
    assert found[0].startswith(f"BundleError {PROCESSORS[0]} is not what")
    assert found[1].startswith(f"BundleError {CONFIG} is not what")
    assert {path.name: path.read_bytes() for path in Path(found[2]).iterdir()} == good
