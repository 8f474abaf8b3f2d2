"""Answers of the MLLM beside its probes at the same place, and under knockouts."""
