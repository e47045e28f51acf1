"""The ways to quantise one stage, behind one face."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx

from vqbet_calibration.graphs import layers
from vqbet_calibration.placement import (
    quantize_dynamic,
    quantize_signed,
    quantize_unsigned,
    signed_sites,
    unsigned_sites,
)
from vqbet_calibration.ranges import METHODS, Feed, Histogram, Method, collect
from vqbet_calibration.targets import Target


class Quantizer(Protocol):
    """One stage and one way of placing Q/DQ in it."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that can be quantised, from the input on."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The ways of choosing ranges."""

    def quantize(self, names: Collection[str], method: str, twin: bytes | None = None) -> bytes:
        """The stage's float32 graph, or another one with the same layers, quantised.

        Args:
            names: the layers to quantise.
            method: one of `methods`.
            twin: the graph to quantise instead, such as the float16 one.
        """


@dataclass(frozen=True)
class Static:
    """Ranges from calibration samples.

    Attributes:
        graph: float32 ONNX.
        target: which placement.
        histograms: by site.
    """

    graph: bytes
    target: Target
    histograms: dict[str, Histogram]
    layers: tuple[str, ...]
    methods: tuple[Method, ...] = METHODS

    @classmethod
    def calibrate(cls, graph: bytes, target: Target, feeds: Sequence[Feed]) -> "Static":
        """Run the graph over samples."""
        model = onnx.load_from_string(graph)
        sites = (signed_sites if target == "tensorrt" else unsigned_sites)(model)
        found = collect(graph, feeds, sites.values())
        # Unsigned kernels quantise their output too, and a softmax's logits need more than 8 bits.
        names = [x.name for x in layers(model) if target == "tensorrt" or not x.feeds_softmax]
        return cls(graph, target, {s: found[t] for s, t in sites.items()}, tuple(names))

    def quantize(self, names: Collection[str], method: str, twin: bytes | None = None) -> bytes:
        """See `Quantizer`."""
        chosen = next(known for known in METHODS if known == method)
        ranges = {site: h.range(chosen) for site, h in self.histograms.items()}
        place = quantize_signed if self.target == "tensorrt" else quantize_unsigned
        return place(twin or self.graph, names, ranges)


@dataclass(frozen=True)
class Dynamic:
    """Ranges taken at every run."""

    graph: bytes
    methods: tuple[str, ...] = ("dynamic",)

    @property
    def layers(self) -> tuple[str, ...]:
        """See `Quantizer`."""
        return tuple(layer.name for layer in layers(onnx.load_from_string(self.graph)))

    def quantize(
        self,
        names: Collection[str],
        method: str,  # noqa: ARG002
        twin: bytes | None = None,
    ) -> bytes:
        """See `Quantizer`."""
        return quantize_dynamic(twin or self.graph, names)
