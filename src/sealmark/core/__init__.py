"""Contracts: schemes, suspects, secrets, evidence, tasks, training, attacks."""
