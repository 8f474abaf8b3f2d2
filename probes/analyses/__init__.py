"""Analyses of finished probe runs: each reads a `ProbeRun` and writes JSON and tensors (see README.md)."""
