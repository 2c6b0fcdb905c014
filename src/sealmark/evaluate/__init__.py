"""Metrics, figures and the report."""
