"""Finished probe runs, read back for the analyses."""
