"""A bundle's graphs in ONNX Runtime, whichever target they are for."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from vqbet_calibration.graphs import Session
from vqbet_calibration.targets import Target

from vqbet_edge.runtime.backends.base import Backend, Floats, Frames, HeadOutputs
from vqbet_edge.runtime.bundle import CAUSAL_MASK, TOKEN_CONSTANTS, Bundle
from vqbet_edge.runtime.manifest import StageName

Array = NDArray[Any]


class StageSession:
    """One graph, fed by position.

    Args:
        bundle: where it is.
        stage: which.
        target: whose graph; None is the portable one, which TensorRT builds from.
    """

    def __init__(self, bundle: Bundle, stage: StageName, target: Target | None = None) -> None:
        spec = bundle.cpu_stage(stage) if target == "cpu" else bundle.manifest.stages[stage]
        self._names = [tensor.name for tensor in spec.inputs]
        # The CPU's GPT can continue behind tokens that it has seen; here it never has.
        self._rest = _nothing_seen(bundle, spec.inputs[-1].shape) if "past" in self._names else []
        # With float16 scales, ONNX Runtime's optimiser computes something else than the graph.
        exact = spec.precision == "int8" and target != "cpu"
        self._session = Session(bundle.contents[spec.file], optimize=not exact)

    def run(self, *inputs: Array) -> list[Array]:
        """The outputs; inputs in the graph's order."""
        values = [*inputs, *self._rest]
        return self._session.run(dict(zip(self._names, values, strict=True)))


def _nothing_seen(bundle: Bundle, past: tuple[int, ...]) -> list[Array]:
    blocks, batch, heads, _, part = past
    nothing = np.zeros((blocks, batch, heads, 0, part), np.float32)
    return [bundle.arrays[TOKEN_CONSTANTS], bundle.arrays[CAUSAL_MASK], nothing]


class PortableBackend(Backend):
    """The portable graphs, which no CPU backend takes, end to end: for verification only."""

    name = "portable"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self._sessions = {stage: StageSession(bundle, stage) for stage in bundle.stages_to_load}
        shape = bundle.manifest.stages["gpt"].inputs[0].shape
        self._window: Floats = np.zeros(shape, np.float32)  # (B, N, K, D)

    def advance(self) -> None:
        """See `Backend`."""
        self._window[:, :-1] = self._window[:, 1:]

    def encode(self, frames: Frames, row: int) -> None:
        """See `Backend`."""
        self._window[:, row] = self._sessions["vision_encoder"].run(frames)[0]

    def fill(self) -> None:
        """See `Backend`."""
        self._window[:, :-1] = self._window[:, -1:]

    def predict(self, states: Floats) -> HeadOutputs:
        """See `Backend`."""
        feature = self._sessions["gpt"].run(self._window, states)[0]
        return HeadOutputs(*self._sessions["code_heads"].run(feature))

    def decode(self, codes: NDArray[np.int64]) -> Floats:
        """See `Backend`."""
        decoded: Floats = self._sessions["rvq_decoder"].run(codes)[0]
        return decoded
