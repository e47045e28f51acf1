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

NAME = "ada/pusht-edge"


@pytest.fixture
def server() -> Iterator[hub.Hub]:
    with hub.serving() as found:
        yield found


# The Hub's client reads its settings once, so a process of its own exports: with a wrong token, for
# the first time, and where the repository is there.
EXPORTS = """
import os, sys
from vqbet_edge.runtime.bundle import Bundle
from vqbet_export.cli import main
token = os.environ["HF_TOKEN"]
command = ["vqbet-export", sys.argv[1], "-o", "p.bundle", "--force", "--verify-steps", "8"]
for name, *options in (["ada/other"], ["ada/pusht-edge", "--private"], ["ada/pusht-edge"]):
    os.environ["HF_TOKEN"] = "hf_of_somebody_else" if name == "ada/other" else token
    sys.argv = [*command, "--push-to-hub", name, *options]
    try:
        main()
    except SystemExit as exit:
        print("exit", exit.code)
    Bundle.open("p.bundle")
"""


@pytest.mark.extended  # three exports
def test_uploads_the_bundle_and_its_card(server: hub.Hub, robot: Robot, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXPORTS, robot.checkpoint],
        env=os.environ | server.variables(tmp_path / "home"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^exit (\d)$", done.stdout, re.MULTILINE) == ["1", "0", "0"]
    said, bundle = " ".join(done.stderr.split()), tmp_path / "p.bundle"
    assert "cannot upload to 'ada/other'" in said
    assert "hf upload ada/other 'p.bundle'" in said
    assert "Traceback" not in said
    assert said.count(f"uploaded to {server.address}/{NAME}") == 2
    repository = server.repositories[NAME]
    assert repository.private is True
    found = dict(repository.commits[repository.references["main"]])
    card = found.pop("README.md").decode()
    assert found.pop(".gitattributes") == b""  # the Hub's own
    assert found == {path.name: path.read_bytes() for path in bundle.iterdir()}
    card_says_what_it_is(card, bundle)


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
    assert re.findall(r"^#+(?= )", card, re.MULTILINE).count("#") == 1


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


@pytest.mark.extended
@pytest.mark.xdist_group("lerobot")
def test_lerobot_runs_a_repository(
    server: hub.Hub, newest: Peer, robot: Robot, tmp_path: Path
) -> None:
    """`--policy.path=user/name`: configuration, processors and bundle all come from there."""
    server.add(NAME, {path.name: path.read_bytes() for path in robot.bundle.iterdir()})
    options = f"""-m lerobot.scripts.lerobot_eval --policy.path={NAME} --env.type=pusht
        --env.episode_length=5 --eval.n_episodes=1 --eval.batch_size=1 --output_dir=evaluated"""
    done = subprocess.run(
        [newest.python, *options.split()],
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
