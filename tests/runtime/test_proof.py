"""A bundle proves itself where it runs, and notices what is wrong there."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import onnx
import pytest
from mutations import with_graph
from onnx import numpy_helper
from safetensors.numpy import load, save
from workshop import once

from vqbet_edge import BundleError, EdgePolicy, VerificationError
from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.backends.cpu import CpuWindow
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cases import CASES_NAME, ReferenceCases
from vqbet_edge.runtime.manifest import StageName
from vqbet_edge.runtime.proof import Proof, act_out, prove

STAGES: tuple[StageName, ...] = ("vision_encoder", "gpt", "code_heads")


@pytest.fixture(scope="module")
def bundle(shared: Path) -> Bundle:
    path = shared / "proof-a.bundle"

    def make() -> None:
        policy = miniature.attentive(1)
        # So that frames matter as after training; INT8 could not be calibrated on such a network.
        policy.network.vqbet.rgb_feature_projector[0].weight.mul_(10)
        miniature.write(path, policy, steps=64)

    return Bundle.open(once(path, make))


def proven(bundle: Bundle) -> Proof:
    return prove(bundle, create_backend("onnxruntime", bundle))


def with_file(bundle: Bundle, name: str, data: bytes) -> Bundle:
    return replace(bundle, contents={**bundle.contents, name: data})


def with_weight(
    bundle: Bundle, stage: StageName, index: int, change: Callable[[np.ndarray], np.ndarray]
) -> Bundle:
    model = onnx.load_from_string(bundle.cpu_graph(stage))
    tensor = model.graph.initializer[index]
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(values).astype(values.dtype), tensor.name))
    return with_graph(bundle, stage, model.SerializeToString())


def test_what_was_exported_is_proven_with_room_to_spare(bundle: Bundle) -> None:
    proof = proven(bundle)
    assert proof.precision == "fp32"
    assert proof.steps == 48
    assert max(result.relative_error for result in proof.stages.values()) < 2e-5
    assert proof.policy.largest_action < 2e-5
    assert proof.policy.code_agreement == 1
    # The cases show more codes than pieces would by chance, each from an empty history.
    cases = ReferenceCases.of(bundle).cases
    assert [len(case.states) for case in cases] == [8] * 3
    codes = np.concatenate([case.outputs.codes for case in cases])
    assert len({(layer, code) for pair in codes.tolist() for layer, code in enumerate(pair)}) > 4
    for word in ("onnxruntime", "vision_encoder", "cosine 1.0000000", "agreement 100.00%"):
        assert word in str(proof)


@pytest.mark.parametrize("method", ["advance", "prefill", "predict", "fill"])
def test_a_window_that_is_off_by_one_is_caught(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    original = getattr(CpuWindow, method)

    def late(self: CpuWindow, *arguments: Any) -> Any:
        match method:
            case "advance":  # the oldest row stays
                self._window[:, 1:-1] = self._window[:, 2:]
            case "fill":  # only one row is filled
                self._window[:, -2] = self._window[:, -1]
            case _:  # the states before these
                return original(self, np.roll(arguments[0], 1, axis=0))
        return None

    monkeypatch.setattr(CpuWindow, method, late)
    with pytest.raises(VerificationError, match="gpt: relative error"):
        proven(bundle)


def test_overflow_is_caught(bundle: Bundle) -> None:
    with pytest.raises(VerificationError, match="not finite"):
        proven(with_weight(bundle, "code_heads", 0, lambda weight: weight * np.inf))


@pytest.mark.extended
def test_one_percent_of_any_layer_is_caught(bundle: Bundle) -> None:
    """The catalogue of mutations changes all layers of a graph at once."""
    missed, count = [], 0
    for stage in STAGES:
        for index, tensor in enumerate(
            onnx.load_from_string(bundle.cpu_graph(stage)).graph.initializer
        ):
            # Shapes; and what is too small to be a layer's, such as biases before a softmax, which
            # change nothing.
            if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < 16:
                continue
            count += 1
            changed = with_weight(bundle, stage, index, lambda weight: weight * 1.01)
            backend = create_backend("onnxruntime", changed)
            if not act_out(changed, backend, ReferenceCases.of(bundle)).violations:
                missed.append(f"{stage}: {tensor.name}")
    assert count > 20
    assert missed == []


def test_near_ties_do_not_decide(bundle: Bundle) -> None:
    """What rounding may exchange does not count for the agreement of codes."""
    arrays = load(bundle.contents[CASES_NAME])
    assert arrays["clear"].any()
    arrays["logits"] = arrays["logits"][:, :, ::-1].copy()
    arrays["clear"] = np.zeros_like(arrays["clear"])
    reversed_codes = with_file(bundle, CASES_NAME, save(arrays))
    backend = create_backend("onnxruntime", bundle)
    proof = act_out(reversed_codes, backend, ReferenceCases.of(reversed_codes))
    assert proof.policy.code_agreement == 1
    assert any("code logits" in line for line in proof.violations)


@pytest.mark.extended
def test_the_file_stays_small_whatever_the_camera(tmp_path: Path) -> None:
    path = miniature.write(tmp_path / "a.bundle", steps=48, size=(480, 640), crop_shape=None)
    bundle = Bundle.open(path)
    assert len(bundle.contents[CASES_NAME]) < 1_000_000
    assert ReferenceCases.of(bundle).magnification == 6
    assert not proven(bundle).violations


@pytest.fixture
def damaged(bundle: Bundle) -> Callable[..., Bundle]:
    def damage(**changes: Any) -> Bundle:
        arrays = load(bundle.contents[CASES_NAME])
        for name, change in changes.items():
            arrays[name] = np.ascontiguousarray(change(arrays[name]))
        return with_file(bundle, CASES_NAME, save(arrays))

    return damage


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lengths", lambda x: x * 0),
        ("lengths", lambda x: x * (1 << 62)),
        ("geometry", lambda x: x - 5),
        # The whole frame would have to be so large.
        ("geometry", lambda x: [*x[:4], 1 << 40]),
        ("frames", lambda x: x[:, :, :5]),
        ("states", lambda x: x[:-1]),
        ("feature", lambda x: x.astype(np.float64)),
        ("codes", lambda x: x + 1000),
    ],
)
def test_cases_that_do_not_fit_are_refused(damaged: Any, name: str, change: Any) -> None:
    with pytest.raises(BundleError, match=f"{name}.*export again"):
        proven(damaged(**{name: change}))


def test_no_cases_or_no_safetensors(bundle: Bundle) -> None:
    contents = {name: data for name, data in bundle.contents.items() if name != CASES_NAME}
    with pytest.raises(BundleError, match="no reference cases"):
        proven(replace(bundle, contents=contents))
    with pytest.raises(BundleError, match="damaged"):
        proven(with_file(bundle, CASES_NAME, b"{}"))


def test_load_proves_before_it_hands_out_a_policy(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    observation = miniature.observation(np.random.default_rng(0))
    plain, policy = (EdgePolicy.load(bundle.path, "onnxruntime", prove=p) for p in (False, True))
    np.testing.assert_array_equal(policy.act(observation), plain.act(observation))
    monkeypatch.setattr(CpuWindow, "fill", lambda _: None)
    with pytest.raises(VerificationError, match="does not compute the policy"):
        EdgePolicy.load(bundle.path, "onnxruntime", prove=True)


def test_the_command_shows_the_figures(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from vqbet_edge import inspection

    def run() -> Any:
        arguments = [str(bundle.path), "--prove", "--backend", "onnxruntime"]
        monkeypatch.setattr(sys, "argv", ["vqbet-inspect", *arguments])
        with pytest.raises(SystemExit) as stopped:
            inspection.main()
        return stopped.value.code

    assert run() == 0
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("proven on onnxruntime", "48 predictions", "agreement 100.00%"):
        assert word in shown
    monkeypatch.setattr(CpuWindow, "fill", lambda _: None)
    assert run() == 3
    assert "gpt: relative error" in capsys.readouterr().err
