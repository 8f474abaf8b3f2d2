"""The figures of a report. Each function returns a matplotlib figure and the rows behind it."""
