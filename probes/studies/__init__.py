"""Whole studies: arms, analyses and report of one or several models on one dataset, with one command."""
