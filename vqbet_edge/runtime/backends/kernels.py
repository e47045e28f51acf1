"""Whether ONNX Runtime has a kernel for weights in blocks of eight bits on this processor.

Where it has none it still computes: it unpacks the weights to float32 for every product, which
takes several times as long as a transformer that is float32 from the start. It tells nobody, and
how long something takes says little where others use the processor. But what it computes tells: a
kernel rounds its inputs to eight bits too.
"""

import functools
from pathlib import Path
from types import ModuleType

import numpy as np

# One product (1, 128) x (128, 1) in one block, of weights that are all 1, as the exporter's
# quantiser writes it: tests/runtime/test_kernels.py makes the same.
PROBE = Path(__file__).with_name("kernels.onnx")
# Beside a large input, whose eight bits step by a half at least, small ones are 0. Every block has
# one, whatever its size.
_LARGE, _SMALL, _INPUTS, _SMALLEST_BLOCK = 127.0, 0.2, 128, 16


@functools.cache
def has_kernel_for_blocks(ort: ModuleType) -> bool:
    """Whether an ONNX Runtime is fast with weights in blocks of eight bits here."""
    return rounds_inputs(ort, PROBE.read_bytes())


def rounds_inputs(ort: ModuleType, graph: bytes) -> bool:
    """Whether a graph such as the probe's is computed in eight bits."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        graph, options, providers=["CPUExecutionProvider"], enable_fallback=0
    )
    x = np.full((1, _INPUTS), _SMALL, np.float32)
    x[:, ::_SMALLEST_BLOCK] = _LARGE
    (y,) = session.run(None, {"x": x})
    rounded, exact = x[x == _LARGE].sum(), x.sum()
    return bool(y[0, 0] < (rounded + exact) / 2)
