"""What the hardware can do: from a board's profile, or measured on the processor."""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from vqbet_bench.machine import limit_processors
from vqbet_bench.results import Ceilings

_REPEATS = 15
_GEMM_SIZE = 1024
# Operations per clock of one streaming multiprocessor without tensor cores: 128 lanes, a fused
# multiply-add each, on every board that has a profile.
_FP32_FLOPS_PER_SM_CLOCK = 256


def board_ceilings(name: str) -> Ceilings:
    """From `engines/boards.toml`; INT8 has twice FP16's dense rate on tensor cores.

    Raises:
        UsageError: there is no such board.
    """
    from vqbet_engines.boards import load_board  # noqa: PLC0415

    board = load_board(name)
    fp16 = board.fp16_tflops * 1e12
    fp32 = board.gpu_sms * board.gpu_mhz * 1e6 * _FP32_FLOPS_PER_SM_CLOCK
    return Ceilings(
        source=f"profile of {board.name}",
        bytes_per_second=board.bandwidth_gb_s * 1e9,
        flops={"fp32": fp32, "fp16": fp16, "int8": 2 * fp16},
    )


def measure_ceilings(weight_bytes: int, threads: int) -> Ceilings:
    """Best rate of several runs on this processor.

    Bandwidth is that of reading as many bytes as the weights have, again and again, because that
    is what predicting does; the part of them that stays in a cache counts in favour of the bound.
    Arithmetic is a float32 matrix product in NumPy's BLAS; there is no such measure for INT8, and
    FP16 is taken as float32, which is what ONNX Runtime computes it in.
    """
    flops = measure_gemm(threads)
    return Ceilings(
        source=f"measured on this processor with {threads} threads",
        bytes_per_second=measure_bandwidth(weight_bytes, threads),
        flops={"fp32": flops, "fp16": flops},
    )


def measure_bandwidth(size: int, threads: int) -> float:
    """Bytes per second of reading `size` bytes, each thread its part."""
    parts = [np.ones(max(1, size // 4 // threads), np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return size / _best(lambda: list(pool.map(lambda x: np.dot(x, x), parts)))


def measure_gemm(threads: int) -> float:
    """Operations per second of float32 products, one per thread at a time."""
    operands = [np.ones((_GEMM_SIZE, _GEMM_SIZE), np.float32) for _ in range(threads)]
    outputs = [np.empty_like(x) for x in operands]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best(lambda: list(pool.map(np.matmul, operands, operands, outputs)))
    return float(2 * _GEMM_SIZE**3 * threads / seconds)


def _best(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        start = time.monotonic()
        call()
        seconds.append(time.monotonic() - start)
    return min(seconds)


def main() -> None:
    """Arguments: bytes of the weights, threads. BLAS should have one thread."""
    weight_bytes, threads = map(int, sys.argv[1:])
    limit_processors(threads)
    measured = measure_ceilings(weight_bytes, threads)
    sys.stdout.buffer.write(msgspec.json.encode(measured) + b"\n")
