"""Every attribute and enum that the code takes from TensorRT resolves in the real bindings."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]

# Who touches TensorRT, and which class its variables hold.
SOURCES = (
    "engines/vqbet_engines/worker.py",
    "vqbet_edge/backends/tensorrt.py",
    "vqbet_edge/backends/tensorrt_module.py",
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
# Behind a question to the module: TensorRT 8 has the first two and TensorRT for RTX the rest.
GUARDED = {
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
    "BuilderFlag.FP16",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}
# Behind a question too; TensorRT 8.6 is what the question is for.
ASKED_OF_TENSORRT_8 = {
    "IBuilderConfig.progress_monitor",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "ParserError.node_name",
    "ParserError.node_operator",
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
        elif len(chain) > 1 and chain[0] in CLASSES:
            paths.add(f"{CLASSES[chain[0]]}.{chain[1]}")
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


def test_every_attribute_resolves(release: Any, paths: list[str]) -> None:
    code = f"""
from operator import attrgetter
missing = []
for path in {json.dumps(paths)}:
    try: attrgetter(path)(tensorrt_bindings)
    except AttributeError: missing.append(path)
print(json.dumps(missing))
"""
    assert release.run(code) == []


def test_the_module_is_accepted(release: Any) -> None:
    code = """
from vqbet_edge.runtime.backends.tensorrt_module import import_tensorrt
trt = import_tensorrt("tensorrt")
flag = 1 << int(trt.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
print(json.dumps([trt.version, trt.strongly_typed, flag]))
"""
    version, strongly_typed, flag = release.run(code)
    assert release.root.name in version
    assert strongly_typed
    # The reason for never writing the number down.
    assert flag == (1 if version.startswith("11.") else 2)


def test_our_subclasses_are_taken(release: Any) -> None:
    """Logger and progress monitor derive from the bindings' own classes."""
    code = """
import io, sys
from vqbet_edge.runtime.backends.tensorrt_module import create_logger, import_tensorrt
from vqbet_engines.worker import _create_monitor
trt, seen, stdout = import_tensorrt("tensorrt"), [], sys.stdout
logger = create_logger(trt, lambda *line: seen.append(line))
logger.log(trt.module.ILogger.Severity.INTERNAL_ERROR, "text")
monitor, sys.stdout = _create_monitor(trt), io.TextIOWrapper(io.BytesIO())
monitor.phase_start("Parsing", None, 2)
go_on = monitor.step_complete("Parsing", 0)
said, sys.stdout = sys.stdout.buffer.getvalue().decode().splitlines(), stdout
assert isinstance(logger, trt.module.ILogger) and isinstance(monitor, trt.module.IProgressMonitor)
print(json.dumps([seen, go_on, said[-1]]))
"""
    said = "vqbet-build: Parsing: 1 of 2"
    assert release.run(code) == [[["INTERNAL_ERROR", "text"]], True, said]


def test_building_ahead_of_time_is_refused(release: Any) -> None:
    """Only TensorRT for RTX can; the bindings lack the class that says so."""
    code = """
from vqbet_edge.runtime.backends.tensorrt_module import import_tensorrt
from vqbet_edge.errors import BackendError
from vqbet_engines.worker import _set_capability
try: _set_capability(import_tensorrt("tensorrt"), None, "sm86")
except BackendError as error: print(json.dumps(str(error)))
"""
    assert "pip install tensorrt-rtx" in release.run(code)


def test_tensorrt_8_is_recognised(old_release: Any, paths: list[str]) -> None:
    """Not strongly typed; what the code needs then is there, and what it asks for may not be."""
    code = f"""
from operator import attrgetter
from vqbet_edge.runtime.backends.tensorrt_module import import_tensorrt
trt, missing = import_tensorrt("tensorrt"), []
for path in {json.dumps([*paths, "NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "BuilderFlag.FP16"])}:
    try: attrgetter(path)(trt.module)
    except AttributeError: missing.append(path)
print(json.dumps([trt.strongly_typed, missing]))
"""
    strongly_typed, missing = old_release.run(code)
    assert not strongly_typed
    assert set(missing) == ASKED_OF_TENSORRT_8


def test_types_have_numpys_names(release: Any) -> None:
    """The check of an engine's borders compares these names with the manifest's."""
    code = """
trt = tensorrt_bindings
types = (trt.DataType.FLOAT, trt.DataType.UINT8, trt.DataType.INT64)
print(json.dumps([trt.nptype(dtype).__name__ for dtype in types]))
"""
    assert release.run(code) == ["float32", "uint8", "int64"]


def test_every_cuda_call_resolves() -> None:
    """In the installed cuda-python; importing it needs no driver."""
    driver = pytest.importorskip("cuda.bindings.driver")
    source = (REPOSITORY / "vqbet_edge/backends/cuda_python.py").read_text()
    aliases = {"attribute": driver.CUdevice_attribute, "events": driver.CUevent_flags}
    holders: dict[str, Any] = {"driver": driver, "_driver": driver, **aliases}
    found = 0
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id=name) | ast.Attribute(attr=name), attr=attr):
                if name in holders and attr != "_driver":
                    found += 1
                    assert hasattr(holders[name], attr), f"{name}.{attr}"
    assert found > 25
