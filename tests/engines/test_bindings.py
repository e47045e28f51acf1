"""What the code takes from TensorRT and from CUDA, in the real bindings over stub libraries."""

import ast
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from fake_driver import CUresult, FakeDriver

from vqbet_edge.runtime.backends.tensorrt_module import import_tensorrt, process_log

REPOSITORY = Path(__file__).parents[2]

# Who touches TensorRT, and which class its variables hold.
SOURCES = (
    "engines/vqbet_engines/worker.py",
    "vqbet_edge/runtime/backends/tensorrt.py",
    "vqbet_edge/runtime/backends/tensorrt_module.py",
)
CLASSES = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "error": "ParserError",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
}
# Behind a question to the module: TensorRT for RTX has them.
GUARDED = {
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}


def _chain(node: ast.expr) -> list[str]:
    """`a.b.c` as ["a", "b", "c"]; a call in between ends the chain."""
    match node:
        case ast.Attribute(value=value, attr=attr):
            inner = _chain(value)
            return [*inner, attr] if inner else []
        case ast.Name(id=name):
            return [name]
        case _:
            return []


def touched(source: str) -> set[str]:
    """Paths below the TensorRT module that a source file spells."""
    paths = set()
    for node in ast.walk(ast.parse(source)):
        chain = _chain(node) if isinstance(node, ast.Attribute) else []
        if len(chain) > 2 and chain[1] == "module":  # trt.module.X
            paths.add(".".join(chain[2:]))
        elif len(chain) > 1 and chain[0] == "module":
            paths.add(".".join(chain[1:]))
        elif len(chain) > 1 and chain[-2] in CLASSES:
            paths.add(f"{CLASSES[chain[-2]]}.{chain[-1]}")
        elif len(chain) > 1 and chain[0] == "flags":
            paths.add(f"NetworkDefinitionCreationFlag.{chain[1]}")
    return paths - {"__version__"}


@pytest.fixture(scope="module")
def paths() -> list[str]:
    found = set().union(*(touched((REPOSITORY / source).read_text()) for source in SOURCES))
    # The extraction itself must not silently find nothing.
    assert {"Builder.build_serialized_network", "MemoryPoolType.WORKSPACE"} <= found
    assert {"IExecutionContext.execute_async_v3", "Runtime.deserialize_cuda_engine"} <= found
    return sorted(found - GUARDED)


# What every supported release must answer; one process each, for importing takes long.
ASKED = """
import io, pathlib
from operator import attrgetter
from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.base import foreign_errors
from vqbet_edge.runtime.backends.tensorrt_module import create_logger, import_tensorrt, process_log
from vqbet_engines import worker
def error(call, *arguments):
    try:
        with foreign_errors("here"): call(*arguments)
    except BackendError as found: return str(found)
trt, seen, stdout = import_tensorrt("tensorrt"), [], sys.stdout
module, missing = trt.module, []
for path in PATHS:
    try: attrgetter(path)(module)
    except AttributeError: missing.append(path)
logger = create_logger(trt, lambda *line: seen.append(line))
logger.log(module.ILogger.Severity.INTERNAL_ERROR, "text")
monitor, sys.stdout = worker._create_monitor(trt), io.TextIOWrapper(io.BytesIO())
monitor.phase_start("Parsing", None, 2)
go_on = monitor.step_complete("Parsing", 0)
said, sys.stdout = sys.stdout.buffer.getvalue().decode().splitlines(), stdout
print(json.dumps({
    "version": trt.version,
    "missing": missing,
    "flag": 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
    "logged": [seen, go_on, said[-1]],
    "subclasses": [isinstance(logger, module.ILogger), isinstance(monitor, module.IProgressMonitor)],
    "ahead of time": error(worker._set_capability, trt, None, "sm86"),
    "factory": error(lambda: module.Runtime(process_log(trt).logger)),
    "builder": error(worker.build, pathlib.Path(FOLDER)),
    "types": [module.nptype(getattr(module.DataType, n)).__name__ for n in ("FLOAT", "UINT8", "INT64")],
}))
"""


def test_what_a_release_answers(release: Any, paths: list[str], tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"flavour": "tensorrt", "options": {}}')
    told = release.run(f"PATHS, FOLDER = {json.dumps(paths)}, {str(tmp_path)!r}\n" + ASKED)
    assert release.root.name in told["version"]
    assert told["missing"] == []
    # The reason for never writing the number down.
    assert told["flag"] == (1 if told["version"].startswith("11.") else 2)
    # Logger and progress monitor derive from the bindings' own classes.
    assert told["logged"] == [[["INTERNAL_ERROR", "text"]], True, "vqbet-build: Parsing: 1 of 2"]
    assert told["subclasses"] == [True, True]
    # Only TensorRT for RTX can; the bindings lack the class that says so.
    assert "pip install tensorrt-rtx" in told["ahead of time"]
    # Stub libraries make nothing, as a library that fails; the bindings raise, and return no None.
    assert "TypeError: pybind11::init(): factory function returned nullptr" in told["factory"]
    assert told["builder"] == "TensorRT cannot start its builder: it gave no reason"
    # The check of an engine's I/O signature compares these names with ours.
    assert told["types"] == ["float32", "uint8", "int64"]


def test_cuda_over_a_driver_in_host_memory(tmp_path: Path) -> None:
    """The real `cuda-bindings`: every call of ours, the types of its arguments, what it frees."""
    pytest.importorskip("cuda.bindings.driver")
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is needed to build a driver")
    library = tmp_path / "libcuda.so.1"
    source = Path(__file__).with_name("fake_cuda.c")
    flags = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
    code = """
import ctypes, json
from dataclasses import astuple
from vqbet_edge.runtime.backends.cuda import create_cuda
from vqbet_edge.runtime.backends.cuda_stream import Stream
library = ctypes.CDLL("libcuda.so.1")
books = lambda: [library.fake_books(kind) for kind in range(7)]
said, cuda = [], create_cuda()
said += [astuple(cuda.device)[:2], books()]
stream = Stream(cuda)
with stream.active():
    near, far = stream.buffer(16, host=True), stream.buffer(16, host=False)
    near.host[:] = 7
    def work():
        stream.upload(near)
        stream.copy(far.address, near.address, 8)
        stream.copy(near.address + 8, far.address, 8)
        stream.download(near)
    work()
    stream.synchronize()
    said.append(near.host.tolist())
    launch = stream.capture(work)
    near.host[:] = range(16)
    launch()
    stream.synchronize()
    said.append(near.host.tolist())
    try: stream.capture(lambda: 1 / 0)
    except ZeroDivisionError: pass
    stream.capture(work)()
said += [books(), library.fake_current(), library.fake_flags()]
stream.close()
said += [books(), library.fake_current()]
print(json.dumps(said))
"""
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(tmp_path),
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    eight = list(range(8))
    assert json.loads(done.stdout) == [
        ["Orin", "8.7"],
        [0] * 7,  # no context for describing a device
        [7] * 16,
        eight + eight,
        [1, 1, 1, 2, 1, 0, 2],  # a context, a stream, an event, memory, two graphs that launch
        0,
        1,  # spinning
        [0] * 7,
        0,
    ]


def test_every_cuda_name_is_in_the_fake_and_in_the_bindings() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    texts = [
        (REPOSITORY / f"vqbet_edge/runtime/backends/{name}.py").read_text()
        for name in ("cuda", "cuda_stream")
    ]
    names = set(re.findall(r"\bcu[A-Z]\w+", "".join(texts)))
    assert len(names) > 25
    for name in names:
        assert hasattr(driver, name), name
        assert hasattr(FakeDriver, name), name
    for holder in ("CUctx_flags", "CUevent_flags", "CUstream_flags", "CUdevice_attribute"):
        for name, value in vars(getattr(FakeDriver, holder)).items():
            assert int(getattr(getattr(driver, holder), name)) == value
    for status in CUresult:
        assert getattr(driver.CUresult, status.name) == status


def test_the_logger_keeps_no_backend_alive() -> None:
    """With the real builder and runtime of TensorRT for RTX, which hold their logger for ever."""
    pytest.importorskip("tensorrt_rtx")
    trt = import_tensorrt("tensorrt_rtx")

    class Owner:
        def __init__(self) -> None:
            self.builder = trt.module.Builder(process_log(trt).logger)
            self.runtime = trt.module.Runtime(process_log(trt).logger)

    owner = Owner()
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None
    assert process_log(trt) is process_log(import_tensorrt("tensorrt_rtx"))
