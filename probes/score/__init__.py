"""Scores of probes, their confidence intervals, and statistics of the states."""
