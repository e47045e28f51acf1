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
from vqbet_engines import build_command, engines
from vqbet_engines.builder import Built, Job, build_plan
from vqbet_engines.engines import EngineBuilder

from vqbet_edge.runtime.backends.cuda import Cuda
from vqbet_edge.runtime.backends.engine_cache import BuildOptions, EngineCache
from vqbet_edge.runtime.backends.private_files import CACHE_VARIABLE
from vqbet_edge.runtime.backends.tensorrt import engine_key
from vqbet_edge.runtime.backends.tensorrt_module import import_tensorrt
from vqbet_edge.runtime.bundle import Bundle

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.usefixtures("cache")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["vqbet-build", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        build_command.main()
    return stopped.value.code


def test_ahead_of_time(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: Any, cache: Path
) -> None:
    assert run(monkeypatch, bundle.path, "--ahead-of-time", "sm86", "sm120", "--json") == 0
    reports = json.loads(capsys.readouterr().out)
    found = [(r["stage"], r["target"], r["precision"], r["path"]) for r in reports]
    assert found == [
        (stage, target, "fp32", None)
        for target in ("sm86", "sm120")
        for stage in bundle.stages_to_load
    ]
    assert all(report["size"] > 1000 for report in reports)
    assert not cache.exists()
    assert run(monkeypatch, bundle.path, "--ahead-of-time", "sm86") == 0
    assert capsys.readouterr().out.count("not kept") == len(bundle.stages_to_load)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--ahead-of-time", "sm87"], 6, "use one of sm120"),
        (["--board", "toaster"], 2, "unknown board 'toaster'"),
        (["--flavour", "tensorrt"], 6, "pip install tensorrt"),
        (["--optimization-level", "much"], 2, "optimization-level"),
    ],
)
def test_errors(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], code: int,
    text: str,
) -> None:  # fmt: skip
    assert run(monkeypatch, bundle.path, *arguments) == code
    assert text in " ".join(capsys.readouterr().err.split())


CUDA = Cuda(FakeDriver(integrated=True))
# A build takes seconds, and what is kept of it is what these tests are about.
BUILT: dict[bytes, Built] = {}


@pytest.fixture
def builder(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> EngineBuilder:
    """For a device that is not here: TensorRT builds ahead of time in its place.

    What was built so runs nowhere, so nothing proves it; `test_proven_engines` does that.
    """

    def build(graph: bytes, job: Job, timing_cache: bytes, on_progress: Any) -> Any:
        if graph not in BUILT:
            ahead = Job(job.flavour, job.options, "sm86")
            BUILT[graph] = build_plan(graph, ahead, timing_cache, on_progress)
        return BUILT[graph]

    monkeypatch.setattr(engines, "build_plan", build)
    monkeypatch.setattr(engines, "prove_plans", mock.MagicMock())
    console = Console(file=io.StringIO(), width=1000)
    return EngineBuilder(bundle, import_tensorrt("tensorrt_rtx"), BuildOptions(512), console)


def test_engines_are_built_once(builder: EngineBuilder) -> None:
    def built(workspace: int, *, force: bool = False) -> list[bool]:
        changed = replace(builder, options=BuildOptions(workspace))
        reports = changed.build_for(CUDA, force=force)
        for stage, report in zip(builder.bundle.stages_to_load, reports, strict=True):
            key = engine_key(builder.bundle, stage, builder.tensorrt, CUDA.device)
            found = EngineCache().find(key)
            assert str(found.path) == report.path
            assert len(found.plan or b"") == report.size
        return [bool(report.seconds) for report in reports]

    every, none = [True] * 3, [False] * 3
    assert [built(512), built(512), built(256), built(256, force=True)] == [
        every,
        none,
        every,
        every,
    ]
    notices = builder.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    for reason in ("no engine has been built", "built for options", "as you asked"):
        assert sum(reason in text for text in notices) == 3


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
        sizes = {report.stage: report.size for report in builder.build_for(CUDA, force=False)}
        keys = [engine_key(builder.bundle, s, builder.tensorrt, CUDA.device) for s in sizes]
        done = subprocess.run(
            [sys.executable, "-c", AS_A_SERVICE, msgspec.json.encode(keys).decode()],
            capture_output=True,
            text=True,
        )
    assert json.loads(done.stdout) == [*sizes.values()], done.stderr
    assert min(sizes.values()) > 1000
