"""Ranges against NumPy and against ONNX Runtime's own calibration."""

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization.calibrate import HistogramCollector
from vqbet_calibration.ranges import BINS, PERCENTILE, Histogram, collect


def histogram(values: np.ndarray) -> Histogram:
    """Through a graph, in batches, as calibration collects it."""
    names = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", *map(list, [names[:1], names[1:]])
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    feeds = [{"x": part} for part in np.split(values.astype(np.float32), 4)]
    return collect(model.SerializeToString(), feeds, ["y"])["y"]


def heavy_tailed() -> np.ndarray:
    return np.random.default_rng(0).standard_t(3, 400_000)


def test_min_max_is_the_extremes() -> None:
    values = heavy_tailed().astype(np.float32)
    found = histogram(values).range("min-max")
    assert (found.low, found.high) == pytest.approx((values.min(), values.max()))
    assert found.magnitude == pytest.approx(np.abs(values).max())


def test_the_range_holds_zero() -> None:
    assert histogram(np.linspace(3, 5, 400)).range("min-max").low == 0
    for method in ("percentile", "entropy"):
        assert histogram(np.linspace(-5, -3, 400)).range(method).high == 0


def test_percentile_is_numpys() -> None:
    values = heavy_tailed()
    expected = np.quantile(np.abs(values), PERCENTILE)
    width = 2 * np.abs(values).max() / BINS
    assert histogram(values).range("percentile").magnitude == pytest.approx(expected, abs=2 * width)


def test_entropy_is_close_to_onnxruntimes() -> None:
    """Both minimise a divergence over candidates; they differ in binning."""
    values = np.random.default_rng(1).laplace(size=400_000).astype(np.float32)
    collector = HistogramCollector("entropy", True, BINS, 128, 99.99, "same")
    collector.collect({"y": [values]})
    theirs = collector.compute_collection_result()["y"]
    limit = float(np.ravel(theirs.range_value if hasattr(theirs, "range_value") else theirs[1])[-1])
    ours = histogram(values).range("entropy").magnitude
    assert ours == pytest.approx(limit, rel=0.25)
    assert ours < np.abs(values).max()


def test_zeros_do_not_count() -> None:
    """Behind a Relu most values are 0, which every range represents exactly."""
    values = np.abs(np.random.default_rng(2).laplace(size=100_000))
    mostly_zero = np.concatenate([values, np.zeros(300_000)])
    for method in ("percentile", "entropy"):
        expected = histogram(values).range(method)
        assert histogram(mostly_zero).range(method).high == pytest.approx(expected.high)


def test_a_dead_tensor_has_a_range() -> None:
    found = histogram(np.zeros(400))
    for method in ("min-max", "percentile", "entropy"):
        assert found.range(method).magnitude == 0
