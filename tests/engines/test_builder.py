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
from vqbet_engines.builder import Built, Job, build_plan

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.tensorrt_module import import_tensorrt

pytest.importorskip("tensorrt_rtx")


def graph(*nodes: onnx.NodeProto) -> bytes:
    """A float32 graph from `x` to `y` with a constant `w` (4, 4)."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
    weights = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    body = helper.make_graph(list(nodes), "test", values[:1], values[1:], [weights])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


PRODUCT = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")


def build(data: bytes | None = None, on_progress: Any = None, **changes: Any) -> Built:
    job = Job(**({"flavour": "tensorrt_rtx", "compute_capability": "sm86"} | changes))
    return build_plan(graph(PRODUCT) if data is None else data, job, on_progress=on_progress)


def test_builds_with_progress() -> None:
    lines: list[str] = []
    built = build(on_progress=lines.append)
    assert len(built.plan) > 1000
    assert built.version == import_tensorrt("tensorrt_rtx").version
    assert any(line.startswith("Parsing node: product [MatMul]") for line in lines)
    building = [line for line in lines if line.startswith("Building engine: ")]
    steps = int(building[0].removeprefix("Building engine: 0 of "))
    assert building[-1] == f"Building engine: {steps} of {steps}"
    assert steps > 0


def test_what_tensorrt_refuses_names_the_node() -> None:
    node = helper.make_node("TfIdfVectorizer", ["x"], ["y"], name="odd_one", mode="TF",
                            min_gram_length=1, max_gram_length=1, max_skip_count=0,
                            ngram_counts=[0], ngram_indexes=[0])  # fmt: skip
    with pytest.raises(BackendError, match=r"cannot parse.*'odd_one' \(TfIdfVectorizer\)"):
        build(graph(node))
    # Strongly typed: nothing is cast that the graph does not cast.
    half = helper.make_node("Cast", ["x"], ["half"], name="to_half", to=TensorProto.FLOAT16)
    mixed = helper.make_node("MatMul", ["half", "w"], ["y"], name="mixed")
    with pytest.raises(BackendError, match="mixed"):
        build(graph(half, mixed))
    with pytest.raises(BackendError, match="cannot parse the graph"):
        build(b"not an ONNX file")


def test_killed_while_building() -> None:
    def kill(line: str) -> None:
        if line.startswith("Building engine"):
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if "vqbet_engines.worker" in " ".join(child.cmdline()):
                        child.kill()

    with pytest.raises(BackendError, match=r"SIGKILL.* in '.*out of memory"):
        build(on_progress=kill)


CRASH = """
from vqbet_engines.worker import say
say("Parsing node:\\n  odd\\u2028one")
for line in range(100): os.write(1, b"line %d\\n" % line)
os.write(2, b"no new line, ")
say("Building engine: 3 of 7")
os.kill(os.getpid(), signal.SIGABRT)
"""


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("os.write(2, b'last words'); os.kill(os.getpid(), signal.SIGSEGV)",
         ["crashed (SIGSEGV) in 'its start'", "last words"]),
        ("os._exit(3)", ["crashed (exit code 3) in 'its start'"]),
        ("raise MemoryError('all gone')", ["MemoryError: all gone"]),
        ("os.write(1, b'noise from C'); raise ImportError('not here')", ["not here"]),
        (CRASH, ["crashed (SIGABRT) in 'Building engine: 3 of 7'", "line 99\nno new line,"]),
    ],
)  # fmt: skip
def test_an_end_without_an_engine_says_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, told: list[str]
) -> None:
    """A module that dies when it is imported, as TensorRT does on some graphs."""
    (tmp_path / "sitecustomize.py").write_text("print('noise before')\n")
    (tmp_path / "tensorrt_rtx.py").write_text("import os, sys, signal\n" + code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with pytest.raises(BackendError) as caught:
        build()
    for text in told:
        assert text in str(caught.value)
    assert "line 0\n" not in str(caught.value)


def test_a_crash_at_the_very_end_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's destructors run when the interpreter ends."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, signal, sys\n"
        "if 'vqbet_engines.worker' in ' '.join(sys.orig_argv):\n"
        "    atexit.register(lambda: os.kill(os.getpid(), signal.SIGSEGV))\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    assert len(build().plan) > 1000


def test_the_monitor_never_cancels_a_build(capfdbinary: Any) -> None:
    """TensorRT cancels where it raises: at a step of a phase that has ended or never began."""
    from vqbet_engines.worker import _create_monitor

    monitor = _create_monitor(import_tensorrt("tensorrt_rtx"))
    monitor.phase_start("Tactics", None, 4)
    monitor.phase_start("Tactics", "Tactics", 2)
    monitor.phase_finish("Tactics")
    assert monitor.step_complete("Tactics", 0)
    monitor.phase_finish("Tactics")
    assert monitor.step_complete("never began", 6)
    monitor.phase_finish("never began")
    said = capfdbinary.readouterr().out.decode().splitlines()
    assert said[-2:] == ["vqbet-build: never began: 7 of ?", "vqbet-build: never began: ? of ?"]
