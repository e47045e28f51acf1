"""A bundle's ONNX graphs in ONNX Runtime, whichever target they are for: for verification only."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vqbet_calibration.graphs import GraphSession

from vqbet_edge.runtime.backends.base import (
    Backend,
    Floats,
    Frames,
    HeadOutputs,
    Intermediate,
    Window,
)
from vqbet_edge.runtime.bundle import CAUSAL_MASK, TOKEN_CONSTANTS, Bundle
from vqbet_edge.runtime.manifest import Manifest, StageName, Target
from vqbet_edge.runtime.signatures import cached_gpt_signature, signature

Array = NDArray[Any]


class StageSession:
    """One graph, fed by position.

    Args:
        bundle: where it is.
        stage: which.
        target: whose graph; None is the one for TensorRT.
    """

    def __init__(self, bundle: Bundle, stage: StageName, target: Target | None = None) -> None:
        manifest, for_cpu = bundle.manifest, target == "cpu"
        cached = for_cpu and stage == "gpt"
        inputs = (cached_gpt_signature(manifest) if cached else signature(manifest, stage)).inputs
        # The CPU's GPT can continue behind tokens that it has seen; here it never has.
        self._rest: list[Array] = []
        if cached:
            blocks, batch, heads, _, part = inputs[-1].shape
            nothing = np.zeros((blocks, batch, heads, 0, part), np.float32)
            self._rest = [bundle.arrays[TOKEN_CONSTANTS], bundle.arrays[CAUSAL_MASK], nothing]
        # With float16 scales, ONNX Runtime's optimiser computes something else than the graph.
        exact = not for_cpu and manifest.stages[stage].precision == "int8"
        graph = bundle.cpu_graph(stage) if for_cpu else bundle.graph(stage)
        self._session = GraphSession(graph, optimize=not exact)

    def run(self, *inputs: Array) -> list[Array]:
        """The outputs for each of M inputs (M, ...), which are in the graph's order.

        States of no width are none of its inputs.
        """
        given = [x for x in inputs if x.size]
        rows = ([*(x[i : i + 1] for x in given), *self._rest] for i in range(len(given[0])))
        outputs = zip(*self._session.run_all(rows), strict=True)
        return [np.concatenate(parts) for parts in outputs]


class TensorRTGraphs(Backend):
    """The ONNX graphs for TensorRT end to end, which no CPU backend takes."""

    name = "tensorrt-graphs"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self._manifest = bundle.manifest
        self._sessions = {stage: StageSession(bundle, stage) for stage in bundle.stages_to_load}

    def create_window(self) -> "_Window":
        """See `Backend`."""
        return _Window(self, self._manifest, self._sessions)


class _Window(Window):
    def __init__(
        self, backend: Backend, manifest: Manifest, sessions: Mapping[StageName, StageSession]
    ) -> None:
        super().__init__(backend)
        self._sessions = sessions
        shape = signature(manifest, "gpt").inputs[0].shape
        self._window: Floats = np.zeros(shape, np.float32)  # (1, N, K, D)
        self._latest: dict[str, Floats] = {}

    def advance(self) -> None:
        self._window[:, :-1] = self._window[:, 1:]

    def encode(self, frames: Frames, row: int) -> None:
        tokens = self._window[:, row] = self._sessions["vision_encoder"].run(frames[None])[0]
        self._latest["frame_tokens"] = tokens[0]

    def fill(self) -> None:
        self._window[:, :-1] = self._window[:, -1:]

    def predict(self, states: Floats) -> HeadOutputs:
        feature = self._sessions["gpt"].run(self._window, states[None])[0]
        logits, offsets = self._sessions["code_heads"].run(feature)
        self._latest |= {"feature": feature[0], "logits": logits[0], "offsets": offsets[0]}
        return HeadOutputs(logits[0], offsets[0])

    def decode(self, codes: NDArray[np.int64]) -> Floats:
        decoded: Floats = self._sessions["rvq_decoder"].run(codes[None])[0][0]
        return decoded

    def read(self, tensor: Intermediate) -> Floats:
        return self._latest[tensor]
