"""`vqbet-build` keeps an engine only when it computes the policy on this device.

The device is the fake one; its engines are computed by ONNX Runtime, rightly or wrongly.
"""

import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import miniature
import pytest
from fake_driver import FakeDriver
from fake_tensorrt import FakeTensorRT
from rich.console import Console
from vqbet_engines import build_command, doctor_command, engines
from vqbet_engines.builder import Built, Job
from workshop import once

from vqbet_edge import BundleError, EdgePolicy, VerificationError
from vqbet_edge.runtime.backends import tensorrt as backend_module
from vqbet_edge.runtime.backends.cuda import Cuda
from vqbet_edge.runtime.backends.engine_cache import BuildOptions, EngineCache
from vqbet_edge.runtime.backends.private_files import user_cache
from vqbet_edge.runtime.backends.tensorrt import engine_key
from vqbet_edge.runtime.backends.tensorrt_module import TensorRT
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cases import CASES_NAME
from vqbet_edge.runtime.manifest import StageName

pytest.importorskip("onnxruntime")

STAGES = ("vision_encoder", "gpt", "code_heads")
Graphs = Mapping[StageName, bytes]


@pytest.fixture(scope="session")
def other(shared: Path) -> Bundle:
    """The same sizes, other weights."""
    path = shared / "other-engines.bundle"
    policy = miniature.attentive(1)
    return Bundle.open(once(path, lambda: miniature.write(path, policy, steps=16)))


def graphs(bundle: Bundle) -> dict[StageName, bytes]:
    return {stage: bundle.graph(stage) for stage in bundle.stages_to_load}


class Device:
    """A fake board: what it computes engines with, and what was built on it."""

    def __init__(self, bundle: Bundle, computed: Graphs) -> None:
        self.driver = FakeDriver(integrated=True)
        self.module = FakeTensorRT(bundle, self.driver)
        self.module.compute(computed)
        self.tensorrt = TensorRT(self.module, "tensorrt", "10.3.0")
        self.built: list[str] = []
        self._names = {graph: stage for stage, graph in graphs(bundle).items()}

    def build(self, graph: bytes, _job: Job, _timing: bytes, _on_progress: Any) -> Built:
        assert self.driver.retained == 0, "the builder needs the memory"
        stage = self._names[graph]
        self.built.append(stage)
        return Built(stage.encode(), b"", "10.3.0", 1.0)


Install = Callable[[Graphs], Device]


@pytest.fixture
def install(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make this machine a board that computes engines with these graphs."""
    del cache

    def install(computed: Graphs) -> Device:
        device = Device(bundle, computed)
        for module in (build_command, backend_module):
            monkeypatch.setattr(module, "import_tensorrt", lambda *_: device.tensorrt)
            monkeypatch.setattr(module, "create_cuda", lambda: Cuda(device.driver))
        monkeypatch.setattr(engines, "build_plan", device.build)
        return device

    return install


def run(
    monkeypatch: pytest.MonkeyPatch,
    *arguments: object,
    main: Callable[[], None] = build_command.main,
) -> Any:
    """The exit code of `vqbet-build`, or of another command."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def kept(bundle: Bundle, device: Device) -> list[StageName]:
    """The stages whose engines are in the cache."""
    describes = Cuda(device.driver).device
    return [
        stage
        for stage in bundle.stages_to_load
        if EngineCache().find(engine_key(bundle, stage, device.tensorrt, describes)).plan
    ]


def test_what_is_right_is_kept_with_its_figures(
    bundle: Bundle, install: Install, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    device = install(graphs(bundle))
    assert run(monkeypatch, bundle.path, "--json") == 0
    shown = capsys.readouterr()
    reports = json.loads(shown.out)
    assert [report["stage"] for report in reports] == list(STAGES)
    assert all(0 < report["proof"]["relative_error"] < 2e-5 for report in reports)
    assert all(report["proof"]["cosine"] > 0.999999 for report in reports)
    assert "of those agreement 100.00%" in shown.err
    assert kept(bundle, device) == list(STAGES)
    assert not any(device.driver.books.values())
    assert device.driver.misuses == []
    EdgePolicy.load(bundle.path, "tensorrt").close()


@pytest.mark.parametrize("stage", [*STAGES, "noise"])
def test_a_wrong_engine_is_not_kept(
    bundle: Bundle, other: Bundle, install: Install, monkeypatch: pytest.MonkeyPatch, capsys: Any,
    stage: Any,
) -> None:  # fmt: skip
    """Nor are those that were built with it. Or the device is wrong: its kernels compute anything."""
    noise = stage == "noise"
    device = install({} if noise else graphs(bundle) | {stage: other.graph(stage)})
    assert run(monkeypatch, bundle.path) == 3
    said = capsys.readouterr().err
    assert f"{'gpt' if noise else stage}: relative error" in said
    for name in (*STAGES, "action", "codes"):  # all figures, whatever is wrong
        assert f"\n{name}: " in said
    assert "no engine that was built now is kept" in said
    assert kept(bundle, device) == []
    assert not list(user_cache().rglob("*.plan"))
    assert not any(device.driver.books.values())


def test_what_was_kept_is_proven_anew_and_stays_when_a_rebuild_fails(
    bundle: Bundle, other: Bundle, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run builds nothing, and still shows what this device computes today."""
    install(graphs(bundle))
    assert run(monkeypatch, bundle.path) == 0
    before = {path: path.read_bytes() for path in user_cache().rglob("engines/*/*")}
    assert len(before) == 2 * len(STAGES)  # a plan and its record each
    for computed, code, options in ((bundle, 0, ()), (other, 3, ()), (other, 3, ["--force"])):
        device = install(graphs(computed))
        assert run(monkeypatch, bundle.path, *options) == code
        assert device.built == list(STAGES) * bool(options)
        assert {path: path.read_bytes() for path in user_cache().rglob("engines/*/*")} == before


def test_a_bundle_without_cases_is_refused_before_anything_is_built(
    bundle: Bundle, install: Install
) -> None:
    device = install(graphs(bundle))
    contents = {name: data for name, data in bundle.contents.items() if name != CASES_NAME}
    builder = engines.EngineBuilder(
        replace(bundle, contents=contents),
        device.tensorrt,
        BuildOptions(),
        Console(file=io.StringIO()),
    )
    with pytest.raises(BundleError, match="no reference cases"):
        builder.build_for(Cuda(device.driver), force=False)
    assert device.built == []


def test_loading_builds_and_says_when_the_proof_failed(
    bundle: Bundle, other: Bundle, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`EdgePolicy.load` runs the command; its exit code is the reason."""
    install(graphs(other))
    monkeypatch.setattr(
        "vqbet_edge.runtime.backends.tensorrt.subprocess.run",
        lambda *_, **__: type("Done", (), {"returncode": run(monkeypatch, bundle.path)}),
    )
    with pytest.raises(VerificationError, match="none was kept"):
        EdgePolicy.load(bundle.path, "tensorrt")


def test_the_doctor_proves_every_backend_that_is_here(
    bundle: Bundle, other: Bundle, install: Install, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It builds nothing, and leaves nothing on the GPU."""

    def examined(device: Device) -> tuple[int, dict[str, Any]]:
        code = run(monkeypatch, bundle.path, "--json", main=doctor_command.main)
        assert not any(device.driver.books.values())
        findings = json.loads(capsys.readouterr().out)
        return code, {f["name"]: f for f in findings if f["name"].startswith("proof on ")}

    device = install(graphs(bundle))
    code, proofs = examined(device)
    assert code in (0, 6)  # as without a bundle
    assert proofs["proof on onnxruntime"]["state"] == "ok"
    assert "gpt: relative" in proofs["proof on onnxruntime"]["value"]
    missing = proofs["proof on tensorrt"]
    assert (missing["state"], missing["fix"]["command"]) == ("note", f"vqbet-build '{bundle.path}'")
    assert device.built == []

    assert run(monkeypatch, bundle.path, "--json") == 0
    capsys.readouterr()
    assert examined(device)[1]["proof on tensorrt"]["state"] == "ok"
    code, proofs = examined(install(graphs(other)))
    assert code == 3
    assert proofs["proof on onnxruntime"]["state"] == "ok"
    assert proofs["proof on tensorrt"]["state"] == "problem"
    assert "vision_encoder: relative error" in proofs["proof on tensorrt"]["value"]
    assert proofs["proof on tensorrt"]["fix"]["command"].endswith("--force")
