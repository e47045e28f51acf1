"""`bench/gpu.py`'s checks of a real GPU, on the fake one: that they pass, and that they can fail."""

import ctypes
import importlib
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
    yield importlib.import_module("gpu")
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

    def use(self) -> Any:
        return list(self.driver.stack)

    def fault(self) -> None:
        self.driver.check_memory(0, 8)


def test_a_good_device_passes(
    checks: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(checks, "load_checkpoint", lambda _: miniature.attentive(0))
    monkeypatch.setattr(checks.loads, "__defaults__", (50,))
    assert checks.main(str(bundle.path), "miniature", FakeGpu()) == 0
    said = capsys.readouterr().out
    assert "loads: 50 loads, 0 bytes lost" in said
    assert said.count("torch, fp32, 16 predictions") == said.count("agreement 100.00%") == 4
    assert "ILLEGAL_ADDRESS" in said
    device = FakeGpu()  # the other one is spoiled
    checks.policy(bundle, miniature.attentive(0), device)
    assert not any(device.driver.books.values())
    assert device.driver.misuses == []


def test_what_is_wrong_is_noticed(
    checks: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another policy's weights, copies that are not made, a context that stays, memory lost."""
    right, other = miniature.attentive(0), miniature.attentive(1)
    with pytest.raises(VerificationError, match="does not compute the policy"):
        checks.policy(bundle, other, FakeGpu())
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "upload", lambda *_: None)
        with pytest.raises(VerificationError, match="does not compute the policy"):
            checks.policy(bundle, right, FakeGpu())
    with monkeypatch.context() as patch:
        patch.setattr(FakeDriver, "cuCtxPopCurrent", lambda _: (0, 0))
        with pytest.raises(VerificationError, match="another library's work"):
            checks.policy(bundle, right, FakeGpu())
    kept, opened = [], Stream.__init__
    monkeypatch.setattr(Stream, "__init__", lambda s, cuda: (opened(s, cuda), kept.append(s))[0])
    monkeypatch.setattr(Stream, "close", lambda _: None)
    with pytest.raises(VerificationError, match="loads lost"):
        checks.loads(FakeGpu(), 20)
