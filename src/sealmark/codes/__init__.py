"""Collusion-resistant codes."""
