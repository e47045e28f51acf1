"""Every command that takes a bundle or a checkpoint takes its id on the Hub, with a revision.

What is meant lies at the tag `v1`; on the main branch lies what nothing could load.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub
import oracle
import pytest
from serve.serving import serving_process
from workshop import Exported

from vqbet_edge import EdgePolicy, UsageError
from vqbet_edge.runtime.hub import is_hub_id, local_bundle, parse_id, pinned

pytest.importorskip("huggingface_hub")
BUNDLE, CHECKPOINT = "ada/edge@v1", "ada/trained@v1"
ROS = {
    "bundle": BUNDLE, "backend": "onnxruntime", "cameras.topics": ["/camera"],
    "state.joints": ["a", "b"], "command.topic": "/out",
}  # fmt: skip
# Door -> its command, and what it prints of the bundle; the commands run one after the other.
DOORS: dict[str, tuple[list[str], str]] = {
    "inspect": (["vqbet_edge.inspection", BUNDLE], "every digest is right"),
    "doctor": (["vqbet_engines.doctor_command", BUNDLE], "proof on onnxruntime"),
    "build": (
        ["vqbet_engines.build_command", BUNDLE, "--flavour", "tensorrt"], "pip install tensorrt",
    ),
    "replay": (["vqbet_edge.training.evaluation.cli", BUNDLE, "--replay", "seen"], "decisions"),
    "replay, PyTorch": (
        ["vqbet_edge.training.evaluation.cli", CHECKPOINT, "--replay", "seen"], "decisions",
    ),
    "codes": (["vqbet_edge.training.codes.cli", BUNDLE, "-o", "b.html"], "b.html"),
    "codes, PyTorch": (["vqbet_edge.training.codes.cli", CHECKPOINT, "-o", "c.html"], "c.html"),
    "export": (["vqbet_export.cli", CHECKPOINT, "--verify-steps", "4"], "trained@v1-fp32.bundle"),
    "bench": (["vqbet_bench.cli", BUNDLE, "--seconds", "0.2", "--rounds", "1"], "edge@v1"),
    "ROS": (["vqbet_edge_ros", json.dumps(ROS)], "acts"),
}  # fmt: skip
RUN = """
import contextlib, importlib, io, json, sys
for name, (module, *arguments) in json.load(sys.stdin).items():
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            if module == "vqbet_edge_ros":
                from vqbet_edge_ros import loading, parameters
                loading.load_policy(parameters.parse(json.loads(arguments[0]))).close()
                print("acts")
            else:
                sys.argv = ["command", *arguments]
                importlib.import_module(module).main()
        except SystemExit as exit:
            code = exit.code
    print(json.dumps([name, code, said.getvalue()]), flush=True)
"""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def server(tiny: Exported) -> Iterator[hub.Hub]:
    with hub.serving() as found:
        for name, folder in (("ada/edge", tiny.bundle), ("ada/trained", tiny.checkpoint)):
            good = files(folder)
            found.add(name, good, "v1")
            found.add(name, dict.fromkeys(good, b"{}"))
        yield found


@pytest.fixture(scope="module")
def said(server: hub.Hub, tiny: Exported, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What every door says, in one process, which loads PyTorch once."""
    folder = tmp_path_factory.mktemp("doors")
    with EdgePolicy.load(tiny.bundle) as policy, policy.record(folder / "seen", decisions=True):
        for observation in oracle.observations(tiny.case, 8):
            policy.act(observation)
    commands = json.dumps({name: command for name, (command, _) in DOORS.items()})
    environment = os.environ | server.variables(folder / "cache") | {"COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=commands, env=environment, cwd=folder,
        capture_output=True, text=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    return {name: (code, text) for name, code, text in lines}


@pytest.mark.extended
@pytest.mark.parametrize("door", DOORS)
def test_a_door_takes_an_id(said: dict[str, tuple[int, str]], door: str) -> None:
    code, text = said[door]
    assert DOORS[door][1] in " ".join(text.split())
    # This machine may lack what building and the doctor's findings ask for.
    assert code in ({0, 6} if door in {"build", "doctor"} else {0}), text


@pytest.mark.extended
def test_a_server_takes_an_id(
    server: hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.variables(tmp_path).items():
        monkeypatch.setenv(name, value)
    with serving_process(Path(BUNDLE)) as (_, url):
        assert url.startswith("ws://")


def test_how_an_id_is_spelled(cwd: Path) -> None:
    for source in ("ada/edge", "ada/edge@v1.0", "ada/edge@refs/pr/3", "ada/edge@0123abc"):
        assert parse_id(source) == (source[:8], source[9:] or None)
    for source in ("./ada/edge", "ada/edge@", "ada/e@v1@v2", "ada/x.bundle@v1", "edge@v1", "a b/c"):
        assert not is_hub_id(source)
    with pytest.raises(UsageError, match=r"'ada/edge@v1' names one revision and revision='v2'"):
        local_bundle("ada/edge@v1", "v2")
    (cwd / "ada" / "edge").mkdir(parents=True)
    assert pinned("ada/edge", Path("ada/edge")) == str(cwd / "ada" / "edge")
    assert pinned("bob/edge@v1", Path("/hub/snapshots/0123")) == "bob/edge@0123"
