"""Whom INT8 graphs are for: their kernels want different ones."""

from typing import Literal

Target = Literal["tensorrt", "cpu"]
TARGETS: tuple[Target, ...] = ("tensorrt", "cpu")
