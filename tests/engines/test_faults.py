"""Every call to CUDA and to TensorRT fails once, from loading to closing.

All must end in our error or in the right numbers, and nothing may be left on the GPU.
"""

import gc
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_driver import CUresult, FakeDriver
from fake_tensorrt import FakeTensorRT

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.cuda import Cuda
from vqbet_edge.runtime.backends.engine_cache import BuildOptions, EngineCache
from vqbet_edge.runtime.backends.tensorrt import TensorRTBackend, engine_key
from vqbet_edge.runtime.backends.tensorrt_module import TensorRT
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.signatures import signature

# What frees something; when it fails, that one thing stays, and its memory with the context's end.
_FREEING = ("Free", "Destroy", "Release")
# Without the context, nothing that was created in it can be freed.
_CONTEXT = ("cuCtxPushCurrent", "cuCtxPopCurrent")


@pytest.fixture
def built(untabulated: Bundle, cache: Path) -> Bundle:
    del cache
    device, tensorrt = Cuda(FakeDriver()).device, TensorRT(None, "tensorrt", "10.3.0")
    for stage in untabulated.stages_to_load:
        key = engine_key(untabulated, stage, tensorrt, device, BuildOptions())
        EngineCache().store(key, stage.encode(), 1.0)
    return untabulated


def act(bundle: Bundle, driver: FakeDriver, *, raises: bool) -> Iterator[Any]:
    """Load, act with two robots, close: what they were given."""
    module = FakeTensorRT(bundle, driver)
    module.raises = raises
    driver.module = module  # type: ignore[attr-defined]
    random = np.random.default_rng(0)
    frames = signature(bundle.manifest, "vision_encoder").inputs[0].shape[1:]
    states = signature(bundle.manifest, "gpt").inputs[1].shape[1:]
    backend = TensorRTBackend(
        bundle, build=False, cuda=Cuda(driver), tensorrt=TensorRT(module, "tensorrt", "10.3.0")
    )
    try:
        windows = [backend.create_window() for _ in range(2)]
        newest = states[0] - 1
        for step, window in itertools.product(range(3), windows):
            if step == 0:
                window.encode(random.integers(0, 256, frames, np.uint8), newest)
                window.fill()
                outputs = window.predict(random.standard_normal(states, np.float32))
            else:
                window.advance()
                outputs = window.replan(
                    random.integers(0, 256, frames, np.uint8),
                    random.standard_normal(states, np.float32),
                    prefilled=False,
                )
            yield outputs.logits.copy()
            yield outputs.offsets.copy()
            yield window.decode(np.array([step, 1]))
    finally:
        backend.close()


def _statuses() -> list[Any]:
    """The driver's whole list of errors, where the bindings are installed."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return list(CUresult)[1:]
    return [status for status in driver.CUresult if int(status)]


@pytest.fixture
def quick_collection(built: Bundle) -> Iterator[None]:
    """Garbage is looked for after every fault, and not in what was there before."""
    del built
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_collection")
@pytest.mark.parametrize(
    ("raises", "every"),
    [
        (False, False),
        *(pytest.param(raises, True, marks=pytest.mark.extended) for raises in (False, True)),
    ],
)
def test_every_call_fails_once(
    built: Bundle, caplog: pytest.LogCaptureFixture, *, raises: bool, every: bool
) -> None:
    """In every run, the first and the last of each kind."""
    caplog.set_level(logging.CRITICAL)
    healthy = FakeDriver()
    expected = list(act(built, healthy, raises=raises))
    calls, statuses = list(healthy.log), _statuses()
    assert len(calls) > 400
    refused = unharmed = 0
    numbered = [*enumerate(calls, 1)]
    if not every:
        first_and_last = (
            {name: (n, name) for n, name in reversed(numbered)},
            {name: (n, name) for n, name in numbered},
        )
        numbered = sorted({pair for some in first_and_last for pair in some.values()})
    for number, name in numbered:
        driver = FakeDriver()
        driver.faults = {number: statuses[number % len(statuses)]}
        given: list[Any] = []
        try:
            given.extend(act(built, driver, raises=raises))
            unharmed += 1
            assert len(given) == len(expected), f"{name} was not missed, and yet nothing came"
        except BackendError:
            refused += 1
        for mine, right in zip(given, expected, strict=False):
            np.testing.assert_array_equal(mine, right, err_msg=f"call {number}: {name}")
        gc.collect()
        assert driver.misuses == [], f"call {number}: {name}"
        if name in _CONTEXT:
            continue
        freeing = any(word in name for word in _FREEING)
        assert sum(driver.books.values()) == freeing, f"call {number}: {name}"
        assert driver.stack == [], f"call {number}: {name}"
        assert not driver.module.living, f"call {number}: {name}"  # type: ignore[attr-defined]
    assert refused + unharmed == len(numbered)
    assert min(refused, unharmed) > (50 if every else 5)
