"""The builder's process, over TensorRT's real parser and builder."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper
from vqbet_engines.builder import build_plan
from vqbet_engines.layers import parse_layers
from vqbet_engines.messages import Finished, Job, Progress

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.engine_cache import BuildOptions
from vqbet_edge.runtime.backends.tensorrt_module import import_tensorrt

pytest.importorskip("tensorrt_rtx")


def graph(*nodes: onnx.NodeProto, shape: tuple[int | str, ...] = (1, 4)) -> bytes:
    """A float32 graph from `x` to `y` with a constant `w` (4, 4)."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(shape)) for n in ("x", "y")]
    weights = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    body = helper.make_graph(list(nodes), "test", values[:1], values[1:], [weights])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def product(name: str = "product") -> onnx.NodeProto:
    return helper.make_node("MatMul", ["x", "w"], ["y"], name=name)


def job(data: bytes, **changes: Any) -> Job:
    fields = {
        "flavour": "tensorrt_rtx",
        "options": BuildOptions(),
        "compute_capability": "sm86",
        "timing_cache": b"",
    }
    return Job(graph=data, **(fields | changes))


def test_builds_with_progress() -> None:
    events: list[Any] = []
    finished = build_plan(job(graph(product())), events.append)
    assert isinstance(finished, Finished)
    assert len(finished.plan) > 1000
    assert finished.version == import_tensorrt("tensorrt_rtx").version
    assert parse_layers(finished.layers)
    building = [e for e in events if isinstance(e, Progress) and e.phase == "Building engine"]
    assert building[0].done == 0
    assert building[-1].done == building[-1].steps > 0


def test_dynamic_axes_are_built_for_one() -> None:
    finished = build_plan(job(graph(product(), shape=("batch", 4))))
    assert "OptShape: [1,4]" in finished.layers


def test_a_parser_error_names_the_node() -> None:
    node = helper.make_node("TfIdfVectorizer", ["x"], ["y"], name="odd_one", mode="TF",
                            min_gram_length=1, max_gram_length=1, max_skip_count=0,
                            ngram_counts=[0], ngram_indexes=[0])  # fmt: skip
    with pytest.raises(BackendError, match=r"cannot parse.*'odd_one' \(TfIdfVectorizer\)"):
        build_plan(job(graph(node)))


def test_a_type_error_names_the_node() -> None:
    """Strongly typed: nothing is cast that the graph does not cast."""
    node = helper.make_node("Cast", ["x"], ["half"], name="to_half", to=TensorProto.FLOAT16)
    mixed = helper.make_node("MatMul", ["half", "w"], ["y"], name="mixed")
    with pytest.raises(BackendError, match="mixed"):
        build_plan(job(graph(node, mixed)))


def test_bytes_that_are_no_graph() -> None:
    with pytest.raises(BackendError, match="cannot parse the graph"):
        build_plan(job(b"not an ONNX file"))


def test_an_unknown_compute_capability_lists_the_known() -> None:
    with pytest.raises(BackendError, match=r"cannot build for sm87; use one of .*sm86"):
        build_plan(job(graph(product()), compute_capability="sm87"))


def test_a_missing_flavour_says_how_to_install_it() -> None:
    with pytest.raises(BackendError, match="pip install tensorrt") as caught:
        build_plan(job(graph(product()), flavour="tensorrt"))
    assert caught.value.exit_code == 6


def test_the_last_words_of_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that dies while parsing, as TensorRT does on some graphs."""
    (tmp_path / "tensorrt_rtx.py").write_text(
        "import os, signal\nos.write(2, b'last words')\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", path)
    with pytest.raises(BackendError, match=r"crashed \(SIGSEGV\) in 'its start'(.|\n)*last words"):
        build_plan(job(graph(product())))


def test_killed_while_building() -> None:
    def kill(event: object) -> None:
        if isinstance(event, Progress) and event.phase == "Building engine":
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if "vqbet_engines.worker" in " ".join(child.cmdline()):
                        child.kill()

    with pytest.raises(BackendError, match=r"SIGKILL.*out of memory"):
        build_plan(job(graph(product())), kill)


def test_standard_output_does_not_disturb_the_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('noise before')\n")
    noisy = tmp_path / "tensorrt_rtx.py"
    noisy.write_text("import os\nos.write(1, b'noise from C')\nraise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path[1:]]))
    with pytest.raises(BackendError, match="not here"):
        build_plan(job(graph(product())))
