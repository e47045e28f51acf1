"""One run of the CPU's GPT for several windows.

What it costs is mostly reading its weights, and they are read once. The encoder, whose weights are
small beside its arithmetic, gains a tenth at most and is not batched (docs/performance.md).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Run: TypeAlias = Callable[[], object]

# More gain little, and everyone waits for the last one's arithmetic.
MOST_TOGETHER = 8
# Where the batch axis is, if there is one and it is not the first.
_CONSTANT, _CACHES = {"constants", "mask"}, {"past", "present"}


class Graph(Protocol):
    """A loaded graph, which any number of windows may be tied to and run at the same time."""

    @property
    def free_batch(self) -> bool:
        """Whether it takes several windows at once."""

    def bind(self, inputs: Arrays, outputs: Arrays) -> Run:
        """Tie it to fixed arrays; every call of the result runs it from and to them.

        An output that is not named is not wanted.
        """


class Bound(NamedTuple):
    """The arrays that a graph is tied to."""

    inputs: Arrays
    outputs: Arrays


class Batches:
    """Runs one part of the GPT for 2 to `MOST_TOGETHER` windows; one call at a time.

    Args:
        graph: the GPT.
        like: arrays of one window.
    """

    def __init__(self, graph: Graph, like: Bound) -> None:
        self._arrays: dict[int, Bound] = {}
        self._runs: dict[int, Run] = {}
        # Of the largest batch, which the smaller ones use too.
        memory = {
            name: np.zeros(MOST_TOGETHER * array.size, array.dtype)
            for each in like
            for name, array in each.items()
        }
        for batch in range(2, MOST_TOGETHER + 1):
            inputs, outputs = (
                {name: _batched(name, array, memory[name], batch) for name, array in each.items()}
                for each in like
            )
            self._arrays[batch] = Bound(inputs, outputs)
            self._runs[batch] = graph.bind(inputs, outputs)
            # What is allocated in the first run of every shape.
            self._runs[batch]()

    def run(self, windows: Sequence[Bound]) -> None:
        """From and to the windows' own arrays."""
        batch = self._arrays[len(windows)]
        for name, array in batch.inputs.items():
            if name not in _CONSTANT:
                for row, window in enumerate(windows):
                    np.copyto(_row(name, array, row), _row(name, window.inputs[name], 0))
        self._runs[len(windows)]()
        for name, array in batch.outputs.items():
            for row, window in enumerate(windows):
                np.copyto(_row(name, window.outputs[name], 0), _row(name, array, row))


def _batched(name: str, like: NDArray[Any], memory: NDArray[Any], batch: int) -> NDArray[Any]:
    if name in _CONSTANT:
        return like
    shape = list(like.shape)
    shape[_batch_axis(name)] = batch
    return memory[: batch * like.size].reshape(shape)


def _row(name: str, array: NDArray[Any], row: int) -> NDArray[Any]:
    """One window's part of an array."""
    part: NDArray[Any] = np.moveaxis(array, _batch_axis(name), 0)[row]
    return part


def _batch_axis(name: str) -> int:
    return 1 if name in _CACHES else 0
