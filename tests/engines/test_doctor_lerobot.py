"""Whether `vqbet-doctor` sees what LeRobot will not find."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from vqbet_engines.doctor import Finding, Machine, examine

# What LeRobot itself asks of a name, in every release that has plugins.
PREFIX = "lerobot_policy_"


def distribution(folder: Path, name: str) -> None:
    """Metadata as an installer leaves it, with the name as its author spelled it."""
    described = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


def found(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Finding]:
    """With nothing but these distributions."""
    from vqbet_engines import doctor

    there = list(importlib.metadata.distributions(path=[str(folder)]))
    versions = {d.metadata["Name"].replace("-", "_"): d.version for d in there}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor, "distributions", lambda: there)
    monkeypatch.setattr(doctor, "version", version)
    return [finding for finding in examine(Machine()) if finding.name == "LeRobot"]


@pytest.mark.parametrize(
    ("names", "states"),
    [
        ([], []),
        (["lerobot_policy_vqbet_edge"], []),
        (["lerobot"], ["note"]),
        (["lerobot", "lerobot-policy-vqbet-edge"], ["problem"]),
        (["lerobot", "lerobot_policy_vqbet_edge"], ["ok"]),
    ],
)
def test_looks_for_the_plugin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: list[str], states: list[str]
) -> None:
    for name in names:
        distribution(tmp_path, name)
    findings = found(monkeypatch, tmp_path)
    assert [finding.state for finding in findings] == states
    for finding in findings:
        assert (finding.fix is None) == (finding.state == "ok")
        if finding.fix is not None:
            assert "./integrations/lerobot  # in a clone" in finding.fix.command


@pytest.mark.parametrize("name", ["lerobot-policy-vqbet-edge", "lerobot_policy_vqbet_edge"])
def test_lerobot_goes_by_the_name(tmp_path: Path, name: str) -> None:
    """LeRobot's own discovery imports what the doctor calls ok, and only that."""
    pytest.importorskip("lerobot")
    distribution(tmp_path, name)
    (tmp_path / "lerobot_policy_vqbet_edge.py").write_text("print('imported')\n")
    code = (
        "from lerobot.utils.import_utils import register_third_party_plugins as register\n"
        "register()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("imported" in done.stdout) == name.startswith(PREFIX)
