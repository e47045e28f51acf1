"""What the product tells people to type can be typed."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vqbet_edge.runtime import extras

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FROZEN = Path(__file__).with_name("frozen")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
COMMANDS = {
    "vqbet-bench": "bench", "vqbet-build": "cli", "vqbet-codes": "train",
    "vqbet-dataset": "train", "vqbet-doctor": "cli",
    "vqbet-eval": "train", "vqbet-export": "export", "vqbet-inspect": "cli",
    "vqbet-serve": "serve", "vqbet-train": "train", "vqbet-view": "view",
}  # fmt: skip
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
# Neither is on any package index.
OURS = {"vqbet-edge", "vqbet_edge", "lerobot_policy_vqbet_edge"}
# Beyond what an extra names.
OTHERS = {"huggingface_hub", "lerobot", "nvidia-ml-py", "pycuda", "tensorrt-rtx", "numpy"}
FLAGS = {"--upgrade", "--force-reinstall", "--no-deps", "-e"}
PRODUCT = [
    path
    for folder in (
        "vqbet_edge",
        "export",
        "calibration",
        "engines",
        "bench",
        "integrations",
        "examples",
        "docs",
    )
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".md", ".sh", ".yaml"} and "results" not in path.parts
] + [ROOT / "README.md", ROOT / "SECURITY.md"]


def wanted(extra: str) -> set[Requirement]:
    """An extra's requirements, those of the extras that it names among them."""
    found = set()
    for text in EXTRAS[extra]:
        requirement = Requirement(text)
        if requirement.name in OURS:
            found |= {each for name in requirement.extras for each in wanted(name)}
        else:
            found.add(requirement)
    return found


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_is_installed_by_what_it_needs(extra: str) -> None:
    command = shlex.split(extras.install_command(extra))
    assert command[:2] == ["pip", "install"]
    assert {Requirement(text) for text in command[2:]} == wanted(extra)


def test_from_its_sources_it_names_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", requires)
    command = extras.install_command("bench", "cpu")
    assert command == "pip install '.[bench,cpu]'  # in a clone of vqbet-edge"


def commands(start: str) -> Iterator[tuple[Path, str]]:
    """Every command in code and prose that begins so, up to what ends it there."""
    for path in PRODUCT:
        text = re.sub(r" \\\n\s*", " ", path.read_text())
        # Markdown: a line of code, or between backticks; Python: within a string.
        for line in text.splitlines():
            for found in re.finditer(rf"(?<![\w./'-]){start}[^`\n]*", line):
                code = line.startswith("    ") and path.suffix == ".md"
                command = found[0] if code else re.split(r'"|[;,)]( |$)| \(|: ', found[0])[0]
                yield path, command.rstrip(".")


def test_pip_can_install_what_is_named() -> None:
    known = {Requirement(text).name for texts in EXTRAS.values() for text in texts} | OTHERS
    seen = 0
    for path, command in commands("pip install "):
        if "{" in command:  # computed; what computes it is tested above
            continue
        for word in shlex.split(command.replace("\\", ""), comments=True)[2:]:
            said = f"{path.relative_to(ROOT)}: {command}"
            if word in FLAGS or word in {"...", "&&"}:
                continue
            local, _, named = word.partition("[")
            if local.startswith((".", "/path/to/")):
                assert set(named.rstrip("]").split(",")) - {""} <= EXTRAS.keys(), said
                assert local.startswith("/") or (ROOT / local).is_dir(), said
            else:
                name = Requirement(word).name
                assert name not in OURS, said
                assert name in known, said
            seen += 1
    assert seen > 30


def test_our_commands_have_the_flags_that_are_named() -> None:
    seen = 0
    for name in PROJECT["scripts"]:
        options = {word.rstrip(",") for row in json.loads((FROZEN / f"{name}.json").read_text())
                   for word in row.split() if word.startswith("-")}  # fmt: skip
        for path, command in commands(f"{name} "):
            for flag in re.findall(r"(?<=\s)--?[a-z](?:[\w.-]*\w)?", command.partition("&&")[0]):
                assert flag.replace("_", "-") in options, f"{path.relative_to(ROOT)}: {command}"
                seen += 1
    assert seen > 100


def test_the_hubs_client_has_the_commands() -> None:
    pytest.importorskip("huggingface_hub", minversion="1.0")
    for command in ("hf auth login", "hf upload"):
        assert any(commands(command))
        code = "import sys; from huggingface_hub.cli.hf import main; sys.argv = {}; main()"
        code = code.format([*command.split(), "--help"])
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_whose_libraries_are_missing_say_what_to_install(command: str) -> None:
    code = "import sys; sys.modules.update(tyro=None, rich=None)\nfrom {} import {} as main; main()"
    module, _, function = PROJECT["scripts"][command].partition(":")
    done = subprocess.run(
        [sys.executable, "-c", code.format(module, function), "x"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert re.search(r"this command needs '(tyro|rich)'", done.stderr)
    assert extras.install_command(COMMANDS[command]) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
