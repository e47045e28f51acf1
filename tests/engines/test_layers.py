"""What TensorRT makes of the default policy's graphs: its real parser and builder decide."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from vqbet_engines.builder import Job, build_plan
from vqbet_engines.layers import Layer, parse_layers

pytest.importorskip("tensorrt_rtx")

TARGETS = ("sm86", "sm89", "sm120")
# Measured with tensorrt_rtx 1.7.1; fewer is progress, more is a graph that got worse.
MOST_LAYERS = {
    ("vision_encoder", "fp32"): 29,
    ("vision_encoder", "fp16"): 30,
    ("gpt", "fp32"): 130,
    ("gpt", "fp16"): 61,
    ("code_heads", "fp32"): 3,
    ("code_heads", "fp16"): 3,
    ("rvq_decoder", "fp32"): 4,
    ("rvq_decoder", "fp16"): 4,
}


def _one_worker(precision: str) -> Any:
    """That builds its engines for all tests."""
    return pytest.param(precision, marks=pytest.mark.xdist_group(f"layers {precision}"))


@pytest.fixture(scope="module", params=map(_one_worker, ("fp32", "fp16")))
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def layers(make_bundle: Any, precision: str) -> dict[tuple[str, str], tuple[Layer, ...]]:
    """Layers by (stage, compute capability) of the default policy, built ahead of time."""
    bundle = make_bundle(precision)
    keys = [(stage, target) for stage in bundle.manifest.stages for target in TARGETS]

    def build(key: tuple[str, str]) -> tuple[Layer, ...]:
        job = Job("tensorrt_rtx", compute_capability=key[1])
        return parse_layers(build_plan(bundle.graph(key[0]), job).layers)

    with ThreadPoolExecutor(2) as pool:  # each build is a process of its own
        return dict(zip(keys, pool.map(build, keys), strict=True))


def test_layer_counts_do_not_grow(layers: Any, precision: str) -> None:
    counts = {key: len(found) for key, found in layers.items()}
    assert all(counts.values())
    grown = {k: n for k, n in counts.items() if n > MOST_LAYERS[k[0], precision]}
    assert grown == {}


def test_every_convolution_has_the_precision_that_was_asked_for(
    layers: Any, precision: str
) -> None:
    for target in TARGETS:
        kinds = Counter(
            layer.precision for layer in layers["vision_encoder", target] if layer.is_convolution
        )
        # ResNet-18 has 20 convolutions, the spatial softmax one more.
        assert kinds == {precision.upper(): 21}


def test_nothing_stands_between_the_convolutions(layers: Any) -> None:
    """BatchNorm, ReLU and residual additions are part of the convolution that precedes them."""
    for target in TARGETS:
        kinds = [layer.kind for layer in layers["vision_encoder", target]]
        first, last = kinds.index("correlation"), len(kinds) - kinds[::-1].index("correlation")
        assert Counter(kinds[first:last]) == {"correlation": 21, "maxpool": 1}


def test_matrix_products_of_the_transformer(layers: Any, precision: str) -> None:
    """No matrix product of the FP16 transformer reads or writes FP32."""
    for target in TARGETS:
        products = [layer for layer in layers["gpt", target] if layer.kind == "gemm"]
        assert products
        assert {layer.precision for layer in products} == {precision.upper()}
