"""Calibration samples and INT8 graphs."""

import vqbet_edge  # noqa: F401 - before ONNX Runtime, whose telemetry it turns off
