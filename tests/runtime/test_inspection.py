"""`vqbet-inspect`."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from workshop import Exported

from vqbet_edge import inspection
from vqbet_edge.runtime.manifest import encode_manifest
from vqbet_edge.runtime.manifest_reading import decode_manifest


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["vqbet-inspect", *arguments])
    with pytest.raises(SystemExit) as stopped:
        inspection.main()
    return stopped.value.code


def test_shows_a_bundle(tiny: Exported, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(monkeypatch, str(tiny.bundle)) == 0
    # Cells are wrapped where the terminal is narrow.
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for word in ("every digest is right", "observation.image", "vision_encoder", "LeRobot 0.4+"):
        assert word in shown
    assert run(monkeypatch, str(tiny.bundle), "--json") == 0
    manifest = (tiny.bundle / "manifest.json").read_text()
    assert json.loads(capsys.readouterr().out) == json.loads(manifest)


def test_what_a_bundle_says_is_shown_as_it_stands(
    tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    bundle = Path(shutil.copytree(tiny.bundle, tmp_path / "a.bundle"))
    manifest = decode_manifest((bundle / "manifest.json").read_bytes())
    named = msgspec.structs.replace(manifest.source, name="[/bold]mine")
    changed = encode_manifest(msgspec.structs.replace(manifest, source=named))
    (bundle / "manifest.json").write_bytes(changed)
    assert run(monkeypatch, str(bundle)) == 0
    assert "[/bold]mine" in capsys.readouterr().out
    (bundle / "manifest.json").write_bytes(changed.replace(b'"layout"', b'"\\u001b[31m"'))
    assert run(monkeypatch, str(bundle)) == 4
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert "\\x1b[31m" in error
    (bundle / "manifest.json").write_bytes(changed)
    (bundle / "report.md").write_text("all is well")
    assert run(monkeypatch, str(bundle)) == 4
    assert "'report.md' is not the file that was exported" in capsys.readouterr().err
