"""What the backends on the CPU share: the window and the four graphs over arrays in memory.

The GPT is causal, so the keys and values of every token but the newest observation's can be
computed before that observation comes; `prefill` does so.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.backends.base import Backend, Floats, Frames, HeadOutputs
from vqbet_edge.runtime.bundle import CAUSAL_MASK, TOKEN_CONSTANTS, Bundle
from vqbet_edge.runtime.manifest import StageName, StageSpec

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Run: TypeAlias = Callable[[], object]


class Graph(Protocol):
    """A loaded graph."""

    def bind(self, inputs: Arrays, outputs: Arrays) -> Run:
        """Tie it to fixed arrays; every call of the result runs it from and to them.

        An output that is not named is not wanted.
        """


class CpuBackend(Backend):
    """Runs the graphs over arrays that are allocated once."""

    can_prefill = True
    default_idle = "thread"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self._create_arrays(bundle)
        self._runs: dict[str, Run] = {}
        for stage in bundle.stages_to_load:
            spec = bundle.cpu_stage(stage)
            graph = self._load(stage, bundle.contents[spec.file], spec)
            if stage == "gpt":
                self._bind_gpt(graph, bundle)
            else:
                self._runs[stage] = graph.bind(
                    {tensor.name: self._arrays[tensor.name] for tensor in spec.inputs},
                    {tensor.name: self._arrays[tensor.name] for tensor in spec.outputs},
                )
        # Libraries compile and allocate in the first run of every shape; not while the robot moves.
        for run in self._runs.values():
            run()

    @abstractmethod
    def _load(self, stage: StageName, data: bytes, spec: StageSpec) -> Graph:
        """Hand a graph to the library.

        Raises:
            BackendError: the library refuses it.
        """

    def _create_arrays(self, bundle: Bundle) -> None:
        """One array per tensor name: what leaves one graph and enters the next is shared."""
        specs = [bundle.manifest.stages[stage] for stage in bundle.stages_to_load]
        tensors = [tensor for spec in specs for tensor in (*spec.inputs, *spec.outputs)]
        self._arrays = {t.name: np.zeros(t.shape, t.dtype) for t in tensors}
        self._window: Floats = self._arrays["image_tokens"]  # (B, N, K, D)
        self._states: Floats = self._arrays["states"]  # (B, N, S)
        # The newest observation's part of them, side by side for a graph.
        self._newest_state: Floats = np.zeros_like(self._states[:, -1:])
        self._newest_tokens: Floats = self._arrays["frame_tokens"][:, None]
        # What `prefill` sees: all but the oldest observation, one place further in the past.
        self._known_tokens: Floats = np.zeros_like(self._window[:, 1:])
        self._known_states: Floats = np.zeros_like(self._states[:, 1:])
        self._outputs = HeadOutputs(self._arrays["logits"], self._arrays["offsets"])

    def _bind_gpt(self, graph: Graph, bundle: Bundle) -> None:
        (batch, window, _, width), per_step = self._window.shape, self._window.shape[2] + 2
        tokens, known = window * per_step, (window - 1) * per_step
        constants = bundle.array(TOKEN_CONSTANTS, (window, per_step, width))
        mask = bundle.array(CAUSAL_MASK, (tokens, tokens))
        blocks, _, heads, _, part = bundle.cpu_stage("gpt").outputs[-1].shape
        nothing = np.zeros((blocks, batch, heads, 0, part), np.float32)
        past = np.zeros((blocks, batch, heads, known, part), np.float32)
        feature = {"feature": self._arrays["feature"]}

        def inputs(images: Floats, states: Floats, first: int, seen: Floats) -> Arrays:
            rows = slice(first * per_step, (first + images.shape[1]) * per_step)
            columns = slice(0, rows.stop)
            return {
                "image_tokens": images,
                "states": states,
                "constants": constants[first : first + images.shape[1]].copy(),
                "mask": mask[rows, columns].copy(),
                "past": seen,
            }

        self._runs["gpt"] = graph.bind(inputs(self._window, self._states, 0, nothing), feature)
        if known:
            ahead = inputs(self._known_tokens, self._known_states, 0, nothing)
            self._runs["prefill"] = graph.bind(ahead, {"present": past})
            last = inputs(self._newest_tokens, self._newest_state, window - 1, past)
            self._runs["gpt_last"] = graph.bind(last, feature)

    def advance(self) -> None:
        """Move every row one step into the past."""
        self._window[:, :-1] = self._window[:, 1:]

    def encode(self, frames: Frames, row: int) -> None:
        """Encode frames (B, K, H, W, 3) into a row."""
        np.copyto(self._arrays["frames"], frames)
        self._run("vision_encoder")
        self._window[:, row] = self._arrays["frame_tokens"]

    def fill(self) -> None:
        """Repeat the newest row."""
        self._window[:, :-1] = self._window[:, -1:]

    def prefill(self, states: Floats) -> None:
        """Keys and values of the tokens that the next prediction will find in its past."""
        np.copyto(self._known_tokens, self._window[:, 1:])
        np.copyto(self._known_states, states[:, 1:])
        self._run("prefill")

    def predict(self, states: Floats) -> HeadOutputs:
        """GPT and heads over the window."""
        np.copyto(self._states, states)
        self._run("gpt")
        self._run("code_heads")
        return self._outputs

    def replan(self, frames: Frames, states: Floats, *, prefilled: bool) -> HeadOutputs:
        """Encode the newest frames and predict; behind a prefill, by the newest tokens only."""
        self.encode(frames, states.shape[1] - 1)
        if not prefilled:
            return self.predict(states)
        np.copyto(self._newest_state, states[:, -1:])
        self._run("gpt_last", "gpt")
        self._run("code_heads")
        return self._outputs

    def decode(self, codes: NDArray[np.int64]) -> Floats:
        """Code pairs -> chunks by the RVQ decoder's graph."""
        np.copyto(self._arrays["codes"], codes)
        self._run("rvq_decoder")
        return self._arrays["decoded"]

    def _run(self, name: str, report_as: str | None = None) -> None:
        start = time.perf_counter()
        self._runs[name]()
        self.seconds[report_as or name] = time.perf_counter() - start
