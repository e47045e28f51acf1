"""`vqbet-export --int8` as a person runs it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import int8
import numpy as np
import onnx
import onnxruntime
import pytest
from command import run
from onnx import numpy_helper
from vqbet_calibration.blocks import METHODS
from vqbet_calibration.quantize import Goal, quantize
from vqbet_export.onnx_graphs import TensorRTGraphs
from vqbet_export.quantization import quantize_bundle
from workshop import Workshop, once

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import BackendError, VerificationError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import STAGES, Target
from vqbet_edge.runtime.proof import prove
from vqbet_edge.training.dataset import LeRobotDataset

# Every search for what INT8 costs takes minutes; a small one is in the mutations' bundle.
pytestmark = pytest.mark.extended

STEPS = 128


@pytest.fixture(scope="module")
def checkpoint(workshop: Workshop) -> Path:
    return workshop.checkpoint(int8.CASE)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, shared: Path) -> Path:
    """An INT8 bundle for both targets."""
    bundle = shared / "pusht-int8.bundle"

    def make() -> None:
        arguments = ["--calibration-data", str(int8.PUSHT), "--calibration-steps", str(STEPS)]
        with pytest.MonkeyPatch.context() as patch:
            assert run(patch, str(checkpoint), "--int8", *arguments, "-o", str(bundle)) == 0

    return once(bundle, make)


def operators(graph: bytes) -> set[str]:
    return {node.op_type for node in onnx.load_from_string(graph).graph.node}


def test_both_kinds_of_graph_are_in_one_bundle(exported: Path) -> None:
    """TensorRT's are signed with float16 around, the CPU's unsigned and in blocks with float32."""
    bundle = Bundle.open(exported)
    manifest = bundle.manifest
    for stage in ("vision_encoder", "gpt"):
        assert manifest.stages[stage].precision == manifest.cpu_stages[stage].precision == "int8"
        assert "QuantizeLinear" in operators(bundle.graph(stage))
    cpu_encoder, cpu_gpt = (bundle.cpu_graph(stage) for stage in ("vision_encoder", "gpt"))
    assert "QuantizeLinear" in operators(cpu_encoder)
    assert "MatMulNBits" in operators(cpu_gpt)
    assert manifest.stages["code_heads"].precision == "fp16"
    assert manifest.cpu_stages["code_heads"].precision == "fp32"


def test_it_is_verified_on_other_episodes_than_the_samples_that_its_digest_names(
    exported: Path,
) -> None:
    calibration = Bundle.open(exported).manifest.calibration
    assert calibration is not None
    samples = int8.samples_for(Bundle.open(exported), int8.PUSHT, STEPS)
    assert (calibration.observations, calibration.sha256) == (STEPS, samples.digest)
    report = json.loads((exported / "report.json").read_text())
    found = [(r["observations"], r["target"]) for r in report["results"]]
    assert found == [("held-out", "tensorrt"), ("held-out", "cpu")]
    for result in report["results"]:
        assert min(stage["cosine"] for stage in result["stages"].values()) >= 0.99
        assert result["whole"]["policy"]["code_agreement"] >= 0.97
    assert report["limits"]["cosine"] == 0.99


def test_the_report_says_what_every_layer_cost(exported: Path) -> None:
    report = json.loads((exported / "report.json").read_text())
    for found in report["quantization"]:
        layers = {(entry["stage"], entry["layer"]) for entry in found["ranking"]}
        assert ("vision_encoder", "backbone.0") in layers
        assert ("gpt", "blocks.0.query") in layers
        assert ("gpt", "lm_head") in layers
        damage = [
            e["outcome"]["action_error"] + e["outcome"]["total_variation"] for e in found["ranking"]
        ]
        assert damage == sorted(damage, reverse=True)
        assert damage[0] > 0
        assert "gpt.lm_head" in found["kept"]
        assert set(found["by_method"]["vision_encoder"]) == {"min-max"}
    assert set(report["quantization"][1]["by_method"]["gpt"]) == set(METHODS)
    markdown = (exported / "report.md").read_text()
    assert "## INT8 for tensorrt" in markdown
    assert "| gpt.lm_head (kept) |" in markdown


def test_both_kinds_act_alike(exported: Path) -> None:
    bundle = Bundle.open(exported)
    policies = [
        EdgePolicy.load(exported, "onnxruntime"),
        EdgePolicy(bundle, TensorRTGraphs(bundle)),
    ]
    ours, theirs = ([p.act_chunk(o, codes=(1, 2)) for o in observations()] for p in policies)
    np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(ours).max())


def first_scale_for_all(graph: bytes) -> bytes:
    """As an optimiser computes it that takes a scale per channel for one per tensor."""
    model = onnx.load_from_string(graph)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".weight_scale"):
            scale = numpy_helper.to_array(tensor)
            assert scale.dtype == np.float16
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(scale, scale[0]), tensor.name))
    return model.SerializeToString()


def test_float16_scales_that_an_optimiser_computes_wrongly_are_caught(exported: Path) -> None:
    """On the graphs for TensorRT, by the bundle's own cases; they are right as they are written."""
    bundle = Bundle.open(exported)
    assert prove(bundle, TensorRTGraphs(bundle)).precision == "int8"
    file = bundle.manifest.stages["vision_encoder"].file
    contents = {**bundle.contents, file: first_scale_for_all(bundle.contents[file])}
    wrong = replace(bundle, contents=contents)
    with pytest.raises(VerificationError, match="vision_encoder: cosine"):
        prove(wrong, TensorRTGraphs(wrong))


def test_a_robot_without_the_kernels_is_told(
    exported: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Too old an ONNX Runtime refuses the graph; a processor without a kernel is only slow."""
    from vqbet_edge.runtime.backends import onnxruntime as backend

    warning = "no fast kernel for it on this processor; pip install --upgrade"
    for there in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(backend, "has_kernel_for_blocks", lambda _, there=there: there)
            EdgePolicy.load(exported, "onnxruntime").sibling()
        assert caplog.text.count(warning) == (not there)

    class Old:
        __version__ = "1.21.1"
        SessionOptions = onnxruntime.SessionOptions

        @staticmethod
        def InferenceSession(*_: Any, **__: Any) -> Any:  # noqa: N802
            raise RuntimeError("Only 4b quantization is supported")

    monkeypatch.setattr(backend, "import_onnxruntime", lambda: Old)
    graph = Bundle.open(exported).cpu_graph("gpt")
    with pytest.raises(BackendError, match=r"4b.*needs ONNX Runtime 1\.22.*1\.21\.1: pip install"):
        backend._Session("gpt", graph)


@pytest.fixture(scope="module")
def floating(workshop: Workshop) -> Bundle:
    return Bundle.open(workshop.bundle(int8.CASE, "fp32").bundle)


def observations() -> list[dict[str, np.ndarray]]:
    episode = LeRobotDataset.open(int8.PUSHT).episode(1)
    keys = ("observation.image", "observation.state")
    return [{key: episode[key][step] for key in keys} for step in range(6)]


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_one_target_alone(
    floating: Bundle, workshop: Workshop, exported: Path, target: Target
) -> None:
    """Its graphs are the same ones, and the other's are not there."""
    half = Bundle.open(workshop.bundle(int8.CASE, "fp16").bundle) if target == "tensorrt" else None
    samples = int8.samples_for(floating, int8.PUSHT, STEPS)
    found, _ = quantize_bundle(floating, half, samples, (target,), lambda _: None)
    both = Bundle.open(exported)
    assert found.manifest.targets == (target,)
    for stage in STAGES:
        if target == "cpu":
            assert found.cpu_graph(stage) == both.cpu_graph(stage)
        else:
            assert found.graph(stage) == both.graph(stage)
    files = {spec.file for spec in found.manifest.graphs(target).values()}
    assert found.contents.keys() == files | {"runtime.safetensors"}


@pytest.mark.parametrize("precision", ["--fp32", "--int8"])
def test_a_bundle_for_cpus_alone_acts_as_one_for_both(
    checkpoint: Path, exported: Path, floating: Bundle, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, precision: str,
) -> None:  # fmt: skip
    alone = tmp_path / "cpu.bundle"
    data = ["--calibration-data", str(int8.PUSHT), "--calibration-steps", str(STEPS)]
    more = data if precision == "--int8" else []
    command = [str(checkpoint), precision, "--target", "cpu", *more, "-o", str(alone)]
    assert run(monkeypatch, *command) == 0
    both = exported if precision == "--int8" else floating.path
    policies = [EdgePolicy.load(path, "onnxruntime", seed=3, prove=True) for path in (alone, both)]
    for seen in observations():
        assert policies[0].act(seen).tobytes() == policies[1].act(seen).tobytes()
    assert not (alone / "gpt.onnx").exists()
    assert Bundle.open(alone).manifest.targets == ("cpu",)
    size = {path: sum(f.stat().st_size for f in path.glob("*.onnx")) for path in (alone, both)}
    assert size[alone] < size[both]


def test_a_bundle_for_tensorrt_alone_says_so_on_a_cpu(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = tmp_path / "tensorrt.bundle"
    arguments = ["--fp16", "--target", "tensorrt", "-o", str(alone)]
    assert run(monkeypatch, str(checkpoint), *arguments) == 0
    assert not (alone / "gpt_cached.onnx").exists()
    report = json.loads((alone / "report.json").read_text())
    assert {result["target"] for result in report["results"]} == {"tensorrt"}
    for backend in ("auto", "onnxruntime"):
        with pytest.raises(BackendError, match=r"graphs for tensorrt only.*--target cpu"):
            EdgePolicy.load(alone, backend)


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_a_stricter_goal_treats_the_most_harmful_layers_more_exactly(
    floating: Bundle, target: Target
) -> None:
    """As few as reach it: in floating point; on CPUs the transformer's by smaller blocks before."""
    samples = int8.samples_for(floating, int8.PUSHT, STEPS)
    goal = Goal(cosine=0.5, code_agreement=0, total_variation=1)
    loose = quantize(floating, samples, (target,), goal=goal)[0]
    assert loose.kept == ("gpt.lm_head",)
    assert {m for plan in loose.plan.values() for m in plan.values()} <= {"min-max", METHODS[0]}
    # Half of what is off when the cheapest method is good enough for all layers.
    strict = replace(goal, cosine=1 - (1 - min(loose.outcome.cosine.values())) / 2)
    assert not strict.reached(loose.outcome)
    found = quantize(floating, samples, (target,), goal=strict)[0]
    assert strict.reached(found.outcome)
    harmful = [entry for entry in found.ranking if entry.layer != "lm_head"]
    if target == "tensorrt":
        kept = found.kept[:-1]
        assert 0 < len(kept) < len(harmful)
        assert kept == tuple(f"{e.stage}.{e.layer}" for e in harmful[: len(kept)])
    else:
        exactness, plan = [*METHODS, None], found.plan["gpt"]
        chosen = [exactness.index(plan.get(e.layer)) for e in harmful if e.stage == "gpt"]
        assert chosen == sorted(chosen, reverse=True)
        assert chosen[0] > chosen[-1] == 0
    with pytest.raises(VerificationError, match="export with --fp16, or calibrate on more"):
        quantize(floating, samples, (target,), goal=Goal(cosine=1.1))
