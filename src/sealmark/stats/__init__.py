"""Nulls, p-values, calibration, sequential tests."""
