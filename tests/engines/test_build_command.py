"""`vqbet-build` as a user runs it."""

import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from fake_driver import FakeDriver
from rich.console import Console
from sizes import SMALL
from vqbet_engines.builder import Job, build_plan
from vqbet_engines.engines import EngineBuilder

from vqbet_edge.runtime.backends.child import module_command
from vqbet_edge.runtime.backends.cuda import Cuda
from vqbet_edge.runtime.backends.engine_cache import BuildOptions, EngineCache
from vqbet_edge.runtime.backends.private_files import CACHE_VARIABLE
from vqbet_edge.runtime.backends.tensorrt import engine_key
from vqbet_edge.runtime.backends.tensorrt_module import import_tensorrt
from vqbet_edge.runtime.bundle import Bundle

pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def bundle(make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return make_bundle("fp16", **SMALL)


def run(*arguments: object) -> Any:
    command = module_command("vqbet_engines.build_command", *map(str, arguments))
    return subprocess.run(command, capture_output=True, text=True)


def test_ahead_of_time(bundle: Bundle) -> None:
    done = run(bundle.path, "--ahead-of-time", "sm86", "sm120", "--json")
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    found = [(r["stage"], r["target"], r["precision"], r["path"]) for r in reports]
    assert found == [
        (stage, target, "fp16", None)
        for target in ("sm86", "sm120")
        for stage in bundle.stages_to_load
    ]
    assert all(report["size"] > 1000 for report in reports)
    assert not (bundle.path / "engines").exists()


def test_the_table(bundle: Bundle) -> None:
    done = run(bundle.path, "--ahead-of-time", "sm86")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not kept") == len(bundle.stages_to_load)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--ahead-of-time", "sm87"], 6, "use one of sm120"),
        (["--board", "toaster"], 2, "unknown board 'toaster'"),
        (["--flavour", "tensorrt"], 6, "pip install tensorrt"),
        (["--optimization-level", "much"], 2, "optimization-level"),
    ],
)
def test_errors(bundle: Bundle, arguments: list[str], code: int, text: str) -> None:
    done = run(bundle.path, *arguments)
    assert done.returncode == code
    assert text in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_no_bundle(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 4
    assert "is not a bundle" in done.stderr


CUDA = Cuda(FakeDriver(integrated=True))


@pytest.fixture
def builder(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> EngineBuilder:
    """For a device that is not here: TensorRT builds ahead of time in its place.

    What was built so runs nowhere, so nothing proves it; `test_proven_engines` does that.
    """
    from vqbet_engines import engines

    def build(graph: bytes, job: Job, timing_cache: bytes, on_progress: Any) -> Any:
        ahead = Job(job.flavour, job.options, "sm86")
        return build_plan(graph, ahead, timing_cache, on_progress)

    monkeypatch.setattr(engines, "build_plan", build)
    monkeypatch.setattr(engines, "prove_plans", mock.MagicMock())
    monkeypatch.setattr(engines.ReferenceCases, "of", lambda _bundle: None)
    console = Console(file=io.StringIO(), width=1000)
    return EngineBuilder(bundle, import_tensorrt("tensorrt_rtx"), BuildOptions(512), console)


def test_engines_are_built_once(builder: EngineBuilder) -> None:
    bundle, tensorrt = builder.bundle, builder.tensorrt

    def reports(workspace: int, *, force: bool = False) -> list[Any]:
        changed = replace(builder, options=BuildOptions(workspace))
        return changed.build_for(CUDA, force=force)

    first, second, third = reports(512), reports(512), reports(256)
    assert [bool(r.seconds) for r in first + second + third] == [True] * 4 + [False] * 4 + [
        True
    ] * 4
    notices = builder.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert sum("no engine has been built" in text for text in notices) == 4
    assert sum("built for options" in text for text in notices) == 4
    for stage, report in zip(bundle.stages_to_load, third, strict=True):
        found = EngineCache().find(engine_key(bundle, stage, tensorrt, CUDA.device))
        assert str(found.path) == report.path
        assert len(found.plan or b"") == report.size
    assert all(report.seconds for report in reports(256, force=True))


AS_A_SERVICE = """
import msgspec, os, sys
from vqbet_edge.runtime.backends.engine_cache import EngineCache, EngineKey
os.setgid(1000), os.setuid(1000)
keys = msgspec.json.decode(sys.argv[1], type=tuple[EngineKey, ...])
print(msgspec.json.encode([len(EngineCache().find(key).plan or b"") for key in keys]).decode())
"""


def test_root_builds_into_an_image(builder: EngineBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the robot's service, a user of its own, loads what was built."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setenv(CACHE_VARIABLE, folder)
        reports = builder.build_for(CUDA, force=False)
        keys = [
            engine_key(builder.bundle, report.stage, builder.tensorrt, CUDA.device)
            for report in reports
        ]
        done = subprocess.run(
            [sys.executable, "-c", AS_A_SERVICE, msgspec.json.encode(keys).decode()],
            capture_output=True,
            text=True,
        )
    assert json.loads(done.stdout) == [report.size for report in reports], done.stderr
    assert len(reports) == 4
