"""Figures of a report; each function returns a matplotlib figure and the rows of its CSV file."""
