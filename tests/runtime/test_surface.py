"""What others script against: commands, their options, exit codes, the wheel's contents.

After a change that is meant, write the frozen lists anew:

    VQBET_EDGE_FREEZE=1 python -m pytest tests/runtime/test_surface.py
"""

import json
import os
import re
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FROZEN = Path(__file__).with_name("frozen")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMANDS: dict[str, str] = PROJECT["project"]["scripts"]
# Rooms of the repository -> packages of the wheel.
PACKAGES = [
    ROOT / path for path in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
]


def compare(name: str, found: object) -> None:
    """Compare with what is frozen, or freeze it."""
    path = FROZEN / f"{name}.json"
    if os.environ.get("VQBET_EDGE_FREEZE"):
        FROZEN.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    assert found == json.loads(path.read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_a_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    module, _, function = COMMANDS[command].partition(":")
    for name, value in {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as ended:
        getattr(import_module(module), function)()
    assert not ended.value.code
    # Names and what they take; the words that explain them may change.
    rows = re.findall(r"^│ ([^\s─].*?)(?:  |\s*│$)", capfd.readouterr().out, re.MULTILINE)
    assert len(rows) >= 2
    compare(command, sorted(" ".join(row.split()) for row in set(rows)))


def test_exit_codes() -> None:
    from vqbet_edge import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    public = [kind for kind in kinds if issubclass(kind, errors.VQBeTEdgeError)]
    compare("exit_codes", {kind.__name__: kind.exit_code for kind in sorted(public, key=str)})


def test_python_names() -> None:
    """What a robot's program may call: names, and of functions their parameters."""
    import inspect

    import vqbet_edge
    from vqbet_edge.runtime.guards import GuardCounts

    def described(kind: type) -> dict[str, list[str] | None]:
        ours = [base for base in reversed(kind.__mro__) if base.__module__.startswith("vqbet")]
        found = {name: member for base in ours for name, member in vars(base).items()}
        members = {name: member for name, member in found.items() if name[0] != "_"}
        functions = {name: getattr(member, "__func__", member) for name, member in members.items()}
        return {
            name: list(inspect.signature(member).parameters) if callable(member) else None
            for name, member in sorted(functions.items())
        }

    kinds = [vqbet_edge.EdgePolicy, vqbet_edge.Guards, GuardCounts]
    found = {kind.__name__: described(kind) for kind in kinds}
    compare("python_names", {"vqbet_edge": sorted(vqbet_edge.__all__), **found})


def test_the_wheel_has_what_it_should_and_nothing_else(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder
    (wheel,) = builder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    expected = {
        str(path.relative_to(package.parent))
        for package in PACKAGES
        for path in package.rglob("*.py")
    }
    expected |= {"vqbet_edge/py.typed", "vqbet_edge/view/page.html", "vqbet_engines/boards.toml"}
    expected |= {
        "vqbet_edge/runtime/backends/kernels.onnx",
        "vqbet_edge/training/codes/page.html",
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    described = {name for name in names if ".dist-info/" in name}
    assert names - described == expected
    kinds = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    assert {name.partition(".dist-info/")[2] for name in described} == kinds
