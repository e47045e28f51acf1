"""`lerobot-rollout` drives a simulated robot with a bundle."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import oracle
import pytest
from peers import PUSHT, Peer, Robot

from vqbet_edge import EdgePolicy

pytestmark = [pytest.mark.xdist_group("lerobot"), pytest.mark.extended]
NAME = "lerobot_robot_pusht_sim"


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the simulated robot is installed."""
    folder = tmp_path_factory.mktemp("arm")
    shutil.copy(Path(__file__).with_name("simulated_robot.py"), folder / f"{NAME}.py")
    described = folder / f"{NAME}-0.1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0.1.0\n")
    return folder


def command(robot: Robot, log: Path, *options: str) -> list[str]:
    said = f"""-m lerobot.scripts.lerobot_rollout --policy.path={robot.bundle}
        --policy.temperature=0 --robot.type=pusht_sim --robot.log={log} --fps=30
        --play_sounds=false --return_to_initial_position=false"""
    renamed = '--rename_map={"observation.images.top": "observation.image"}'
    return [*said.split(), renamed, *options]


def test_closed_loop(newest: Peer, robot: Robot, arm: Path, tmp_path: Path) -> None:
    """What the robot was told is what the policy says to what it saw."""
    log = tmp_path / "log.npz"
    done = newest.run(*command(robot, log, "--duration=4"), also=arm, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    seen, policy = np.load(log), EdgePolicy.load(robot.bundle, temperature=0)
    stats = oracle.make_statistics(PUSHT)[oracle.ACTION]
    limit = 1e-4 * float((stats["max"] - stats["min"]).min())
    assert len(seen["actions"]) >= 10
    for frame, state, action in zip(seen["frames"], seen["states"], seen["actions"], strict=True):
        expected = policy.act({"observation.image": frame, "observation.state": state})
        assert np.abs(action - expected).max() <= limit


def test_an_interrupt_ends_it_cleanly(
    newest: Peer, robot: Robot, arm: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.npz"
    process = subprocess.Popen(
        [newest.python, *command(robot, log)],
        env=newest.environment(arm),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "control loop started" in line:
            break
    time.sleep(1)  # it moves
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    text = "".join(lines) + rest
    assert process.returncode == 0, text[-3000:]
    assert "Traceback" not in text
    assert "Rollout finished" in text
    assert len(np.load(log)["actions"])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--robot.camera_size=120", "expected a batch of (3, 96, 96), got (1, 3, 120, 120)"),
        ("--policy.device=cuda", "expected --policy.device=cpu, got cuda"),
    ],
)
def test_what_it_refuses(
    newest: Peer, robot: Robot, arm: Path, tmp_path: Path, option: str, said: str
) -> None:
    options = command(robot, tmp_path / "log.npz", option, "--duration=4")
    done = newest.run(*options, also=arm, cwd=tmp_path)
    assert done.returncode != 0
    assert said in done.stderr
