"""Calibration samples and INT8 graphs."""
