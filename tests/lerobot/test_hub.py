"""A bundle's way over the Hub: exported and uploaded here, run by LeRobot there."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub
import pytest
from command import run
from peers import Peer, Robot

from vqbet_edge.runtime.bundle import Bundle

NAME = "ada/pusht-edge"


@pytest.fixture
def server() -> Iterator[hub.Hub]:
    with hub.serving() as found:
        yield found


def export(
    robot: Robot, variables: dict[str, str], cwd: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """`vqbet-export` in a process of its own: the Hub's client reads its settings once."""
    command = [sys.executable, "-c", "from vqbet_export.cli import main; main()"]
    arguments = [robot.checkpoint, "-o", cwd / "p.bundle", "--force", "--verify-steps", "8"]
    return subprocess.run(
        [*command, *arguments, *options],
        env=os.environ | variables,
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def test_uploads_the_bundle_and_its_card(server: hub.Hub, robot: Robot, tmp_path: Path) -> None:
    variables = server.variables(tmp_path / "home")
    done = export(robot, variables, tmp_path, "--push-to-hub", NAME, "--private")
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {server.address}/{NAME}" in " ".join(done.stderr.split())
    repository = server.repositories[NAME]
    assert repository.private is True
    found = dict(repository.commits[repository.references["main"]])
    card = found.pop("README.md").decode()
    assert found.pop(".gitattributes")
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "p.bundle").iterdir()}
    card_says_what_it_is(card, tmp_path / "p.bundle")
    # A second time, the repository is there.
    again = export(robot, variables, tmp_path, "--push-to-hub", NAME)
    assert again.returncode == 0, again.stderr
    assert repository.private is True
    refused(server, robot, tmp_path)


def card_says_what_it_is(card: str, bundle: Path) -> None:
    from huggingface_hub import ModelCard

    read = ModelCard(card)
    assert read.data.license == "mit"
    assert read.data.library_name == "lerobot"
    assert "vqbet_edge" in read.data.tags
    assert f"--policy.path={NAME}" in card
    assert f'EdgePolicy.load("{NAME}")' in card
    assert "| `observation.image` | VISUAL | (3, 96, 96) |" in card
    for line in (bundle / "report.md").read_text().splitlines():
        assert line in card
    headings = re.findall(r"^#+(?= )", card, re.MULTILINE)
    assert headings.count("#") == 1


def refused(server: hub.Hub, robot: Robot, folder: Path) -> None:
    """Without the right token; the bundle stays, and the error says how to go on."""
    variables = {**server.variables(folder / "home"), "HF_TOKEN": "hf_of_somebody_else"}
    done = export(robot, variables, folder, "--push-to-hub", "ada/other")
    assert done.returncode == 1
    assert "cannot upload to 'ada/other'" in done.stderr
    assert f"hf upload ada/other '{folder / 'p.bundle'}'" in done.stderr
    assert "Traceback" not in done.stderr
    Bundle.open(folder / "p.bundle")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push-to-hub", "pusht"], "takes a repository's id, user/name"),
        (["--push-to-hub", "ada/pusht.bundle"], "not ending in .bundle"),
        (["--private"], "--private is for --push-to-hub"),
    ],
)
def test_refuses_before_it_exports(
    cwd: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, "nothing", *options) == 2
    assert message in capsys.readouterr().err
    assert list(cwd.iterdir()) == []


@pytest.mark.xdist_group("lerobot")
def test_lerobot_runs_a_repository(
    server: hub.Hub, newest: Peer, robot: Robot, tmp_path: Path
) -> None:
    """`--policy.path=user/name`: configuration, processors and bundle all come from there."""
    server.add(NAME, {path.name: path.read_bytes() for path in robot.bundle.iterdir()})
    options = [
        f"--policy.path={NAME}",
        "--env.type=pusht",
        "--env.episode_length=5",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        f"--output_dir={tmp_path / 'evaluated'}",
    ]
    done = subprocess.run(
        [newest.python, "-m", "lerobot.scripts.lerobot_eval", *options],
        env=newest.environment() | server.variables(tmp_path / "home"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    info = json.loads((tmp_path / "evaluated" / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 1
    fetched = {request.rpartition("/")[2] for request in server.requests if "resolve" in request}
    assert fetched >= {path.name for path in robot.bundle.iterdir()}
