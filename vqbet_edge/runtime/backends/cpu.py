"""What the backends on the CPU share: the window and the four graphs over arrays in memory.

The GPT is causal, so the keys and values of every token but the newest observation's can be
computed before that observation comes; `prefill` does so.
"""

import time
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.backends import cpu_batches
from vqbet_edge.runtime.backends.base import (
    Backend,
    Floats,
    Frames,
    GptRun,
    HeadOutputs,
    Intermediate,
    Window,
)
from vqbet_edge.runtime.backends.cpu_batches import Arrays, Batches, Bound, Graph, Run
from vqbet_edge.runtime.backends.huge_pages import on_huge_pages
from vqbet_edge.runtime.bundle import CAUSAL_MASK, TOKEN_CONSTANTS, Bundle
from vqbet_edge.runtime.manifest import Manifest, StageName
from vqbet_edge.runtime.signatures import cached_gpt_signature, signature


class CpuBackend(Backend):
    """The graphs, loaded once, and the constants that the GPT takes as inputs."""

    default_prefetch = "thread"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.manifest: Manifest = bundle.manifest
        constants = next(
            t.shape for t in cached_gpt_signature(bundle.manifest).inputs if t.name == "constants"
        )
        tokens = constants[0] * constants[1]
        self.token_constants = bundle.array(TOKEN_CONSTANTS, constants)
        self.causal_mask = bundle.array(CAUSAL_MASK, (tokens, tokens))
        with on_huge_pages():
            self.graphs: dict[StageName, Graph] = {
                stage: self._load(stage, bundle.cpu_graph(stage)) for stage in bundle.stages_to_load
            }
        if self.graphs["gpt"].free_batch:
            self.most_together = cpu_batches.MOST_TOGETHER
            several = self.manifest.policy.n_obs_steps > 1
            self.shared_parts = ("window", "prefill", "newest") if several else ("window",)
        self._batches: dict[GptRun, Batches] = {}

    @abstractmethod
    def _load(self, stage: StageName, data: bytes) -> Graph:
        """Hand a graph to the library, which may refuse it with a BackendError."""

    def create_window(self) -> "CpuWindow":
        """Arrays of a window, and the graphs tied to them."""
        return CpuWindow(self)

    def run_together(self, part: GptRun, windows: Sequence[Window]) -> None:
        """See `Backend`; the first call of a part makes its arrays."""
        parts = [window.parts[part] for window in windows if isinstance(window, CpuWindow)]
        if part not in self._batches:
            self._batches[part] = Batches(self.graphs["gpt"], parts[0])
        self._batches[part].run(parts)

    def gpt_constants(self, steps: slice) -> Arrays:
        """What the GPT takes besides observations to run over some steps of a window."""
        per_step = self.token_constants.shape[1]
        rows = slice(steps.start * per_step, steps.stop * per_step)
        return {
            "constants": self.token_constants[steps].copy(),
            "mask": self.causal_mask[rows, : rows.stop].copy(),
        }

    def _free(self) -> None:
        self._batches.clear()
        self.graphs.clear()


class CpuWindow(Window):
    """Runs the graphs over arrays that are allocated once."""

    can_prefill = True

    def __init__(self, backend: CpuBackend) -> None:
        super().__init__(backend)
        # One array per tensor name: what leaves one graph and enters the next is shared.
        signatures = [signature(backend.manifest, stage) for stage in backend.graphs]
        tensors = [tensor for each in signatures for tensor in each.tensors]
        self._arrays = {t.name: np.zeros(t.shape, t.dtype) for t in tensors}
        self._window: Floats = self._arrays["image_tokens"]  # (1, N, K, D)
        nothing = np.zeros((*self._window.shape[:2], 0), np.float32)
        self._states: Floats = self._arrays.get("states", nothing)  # (1, N, S)
        # The newest observation's part of them, side by side for a graph.
        self._newest_state: Floats = np.zeros_like(self._states[:, -1:])
        self._newest_tokens: Floats = self._arrays["frame_tokens"][:, None]
        # What `prefill` sees: all but the oldest observation, one place further in the past.
        self._known_tokens: Floats = np.zeros_like(self._window[:, 1:])
        self._known_states: Floats = np.zeros_like(self._states[:, 1:])
        self._outputs = HeadOutputs(self._arrays["logits"][0], self._arrays["offsets"][0])
        self._runs: dict[str, Run] = {}
        #: What the GPT reads and writes in the runs that windows can share.
        self.parts: dict[GptRun, Bound] = {}
        for stage, graph in backend.graphs.items():
            if stage == "gpt":
                self._bind_gpt(graph, backend)
            else:
                inputs, outputs = signature(backend.manifest, stage)
                self._runs[stage] = graph.bind(
                    {tensor.name: self._arrays[tensor.name] for tensor in inputs},
                    {tensor.name: self._arrays[tensor.name] for tensor in outputs},
                )
        # Libraries compile and allocate in the first run of every shape; not while the robot moves.
        for run in self._runs.values():
            run()

    def _bind_gpt(self, graph: Graph, backend: CpuBackend) -> None:
        window, per_step, _ = backend.token_constants.shape
        *_, longest = cached_gpt_signature(backend.manifest).outputs
        blocks, batch, heads, _, part = longest.shape
        known = (window - 1) * per_step
        nothing = np.zeros((blocks, batch, heads, 0, part), np.float32)
        past = np.zeros((blocks, batch, heads, known, part), np.float32)
        feature = {"feature": self._arrays["feature"]}

        def over(images: Floats, states: Floats, first: int, seen: Floats) -> Arrays:
            constants = backend.gpt_constants(slice(first, first + images.shape[1]))
            vectors = {"states": states} if states.size else {}
            return {"image_tokens": images, **vectors, **constants, "past": seen}

        self.parts["window"] = Bound(over(self._window, self._states, 0, nothing), feature)
        if known:
            ahead = over(self._known_tokens, self._known_states, 0, nothing)
            newest = over(self._newest_tokens, self._newest_state, window - 1, past)
            self.parts["prefill"] = Bound(ahead, {"present": past})
            self.parts["newest"] = Bound(newest, feature)
        for name, bound in self.parts.items():
            self._runs[name] = graph.bind(*bound)

    def _free(self) -> None:
        self._runs.clear()

    def advance(self) -> None:
        """Move every row one step into the past."""
        self._window[:, :-1] = self._window[:, 1:]

    def encode(self, frames: Frames, row: int) -> None:
        """Encode frames (K, H, W, 3) into a row."""
        np.copyto(self._arrays["frames"], frames)
        self._run("vision_encoder")
        self._window[:, row] = self._arrays["frame_tokens"]

    def fill(self) -> None:
        """Repeat the newest row."""
        self._window[:, :-1] = self._window[:, -1:]

    def prefill(self, states: Floats) -> None:
        """Keys and values of the tokens that the next prediction will find in its past."""
        np.copyto(self._known_tokens, self._window[:, 1:])
        np.copyto(self._known_states, states[1:])
        self._run_part("prefill", "prefill")

    def predict(self, states: Floats) -> HeadOutputs:
        """GPT and heads over the window."""
        np.copyto(self._states, states)
        self._run_part("window", "gpt")
        self._run("code_heads")
        return self._outputs

    def replan(self, frames: Frames, states: Floats, *, prefilled: bool) -> HeadOutputs:
        """Encode the newest frames and predict; behind a prefill, by the newest tokens only."""
        self.encode(frames, len(states) - 1)
        if not prefilled:
            return self.predict(states)
        np.copyto(self._newest_state, states[-1:])
        self._run_part("newest", "gpt")
        self._run("code_heads")
        return self._outputs

    def decode(self, codes: NDArray[np.int64]) -> Floats:
        """A code pair (2,) -> a chunk (W, A) by the RVQ decoder's graph."""
        np.copyto(self._arrays["codes"], codes)
        self._run("rvq_decoder")
        decoded: Floats = self._arrays["decoded"][0]
        return decoded

    def read(self, tensor: Intermediate) -> Floats:
        """What a graph wrote last."""
        latest: Floats = self._arrays[tensor][0].copy()
        return latest

    def load(self, tokens: Floats) -> None:
        """Encoded frames (N, K, D), as the whole window."""
        self._window[0] = tokens

    def run_alone(self, part: GptRun) -> None:
        """See `Window`."""
        self._runs[part]()

    def _run(self, stage: StageName) -> None:
        start = time.perf_counter()
        self._runs[stage]()
        self.seconds[stage] = time.perf_counter() - start

    def _run_part(self, part: GptRun, report_as: str) -> None:
        start, run_shared = time.perf_counter(), self._backend.run_shared
        if run_shared is None:
            self.run_alone(part)
        else:
            run_shared(self, part)
        self.seconds[report_as] = time.perf_counter() - start
