"""Whole studies: arms, analyses and report of one or two models on one dataset, with one command."""
