"""`bench/gpu.py`'s checks of a real GPU, on the fake one: that they pass, and that they can fail."""

import ctypes
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
import torch
from fake_driver import OTHERS, FakeDriver

from vqbet_edge.errors import VerificationError
from vqbet_edge.runtime.backends.cuda import Cuda
from vqbet_edge.runtime.backends.cuda_stream import Launch, Stream
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.signatures import TensorSpec


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    environment = dict(os.environ)
    yield importlib.import_module("gpu_checks")
    os.environ.clear()
    os.environ.update(environment)


class FakeGpu:
    """PyTorch on the CPU, over the memory and the streams of the fake driver."""

    name = "cpu"

    def __init__(self) -> None:
        self.driver = FakeDriver()
        self.driver.stack.append(OTHERS)
        self.cuda = Cuda(self.driver)

    def view(self, address: int, tensor: TensorSpec) -> torch.Tensor:
        size = int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return torch.from_numpy(memory.view(tensor.dtype).reshape(tensor.shape))

    def put(self, stream: int, run: Launch) -> None:
        self.driver.put(stream, run)

    def free(self) -> int:
        return -sum(memory.nbytes for memory in self.driver.memory.values())

    def elsewhere(self) -> Any:
        return list(self.driver.stack)

    def fault(self) -> None:
        self.driver.check_memory(0, 8)


@pytest.mark.parametrize("name", ["copies", "captures", "contexts"])
def test_a_good_device_passes(checks: Any, name: str) -> None:
    device = FakeGpu()
    assert checks.CHECKS[name](device)
    assert not any(device.driver.books.values())
    assert device.driver.misuses == []


def test_loads_lose_nothing(checks: Any) -> None:
    assert checks.loads(FakeGpu(), 50) == "50 loads, 0 bytes lost"


@pytest.mark.parametrize(
    ("name", "broken", "what"),
    [
        ("copies", ("upload", lambda *_: None), "copies with"),
        ("captures", ("capture", lambda _, work: work), "taken for a good one|inside the capture"),
        ("loads", ("close", lambda _: None), "loads lost"),
    ],
)
def test_a_bad_one_does_not(
    checks: Any, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, what: str
) -> None:
    monkeypatch.setattr(Stream, *broken)
    device, kept = FakeGpu(), []
    opened = Stream.__init__

    def keep(self: Stream, cuda: Cuda) -> None:
        opened(self, cuda)
        kept.append(self)

    monkeypatch.setattr(Stream, "__init__", keep)
    with pytest.raises(VerificationError, match=what):
        checks.CHECKS[name](device, *([20] if name == "loads" else []))


def test_a_context_that_stays_is_noticed(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDriver, "cuCtxPopCurrent", lambda _: (0, 0))
    with pytest.raises(VerificationError, match="another library's work"):
        checks.contexts(FakeGpu())


@pytest.fixture(scope="module")
def policy() -> Any:
    return miniature.checkpoint(n_obs_steps=3)


@pytest.fixture(scope="module")
def bundle(mini_of_3: Path) -> Bundle:
    return Bundle.open(mini_of_3)


def test_the_whole_policy(checks: Any, bundle: Bundle, policy: Any) -> None:
    device = FakeGpu()
    said = checks.policy(bundle, policy, device)
    assert said.startswith("CUDA graphs; torch, fp32, 16 predictions")
    assert "agreement 100.00%" in said
    assert not any(device.driver.books.values())
    assert device.driver.misuses == []


def test_a_wrong_policy_is_noticed(checks: Any, bundle: Bundle) -> None:
    other = miniature.checkpoint(n_obs_steps=3)
    for tensor in other.network.parameters():
        tensor.mul_(1.1)
    with pytest.raises(VerificationError, match="does not compute the policy"):
        checks.policy(bundle, other, FakeGpu())


def test_faults_on_the_device(checks: Any, bundle: Bundle, policy: Any) -> None:
    said = checks.faults(bundle, policy, FakeGpu())
    assert "ILLEGAL_ADDRESS" in said


def test_the_script_goes_on_and_reports(
    checks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command once, by the options that it has; what fails is told at the end."""
    script = importlib.import_module("gpu")
    commands: list[tuple[str, ...]] = []

    def command(module: str, *arguments: object) -> str:
        commands.append((module, *map(str, arguments)))
        if "--int8" in commands[-1]:
            raise RuntimeError("no INT8 today")
        return "{}"

    monkeypatch.setattr(script, "command", command)
    monkeypatch.setattr(script, "policy_checks", lambda *_: None)
    monkeypatch.setattr(checks, "Gpu", FakeGpu)
    results = tmp_path / "results"
    arguments = ["data", str(results), "--minutes", "0", "--loads", "10"]
    monkeypatch.setattr("sys.argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 1
    steps = json.loads((results / "gpu.json").read_text())
    assert [name for name, step in steps.items() if step["failed"]] == ["export int8"]
    assert steps["check: loads"]["outcome"] == "10 loads, 0 bytes lost"
    assert {"train", "evaluate the checkpoint", "evaluate fp16"} <= set(steps)
    for module, *options in commands:
        frozen = {"cli": "train", "evaluation": "eval", "vqbet_export": "export"}
        name = next(v for k, v in reversed(frozen.items()) if k in module.split("."))
        path = Path(__file__).parents[1] / f"runtime/frozen/vqbet-{name}.json"
        known = " ".join(json.loads(path.read_text()))
        assert all(o in known for o in options if o.startswith("-"))
