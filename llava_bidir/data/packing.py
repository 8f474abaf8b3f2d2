"""Packing of a micro-batch's samples into rows with less padding.

Packing changes the layout of a micro-batch, not its samples. Steps, order, loss and resumption are those of one sample
per row, and a packed micro-batch never holds more tokens.
"""

import math


def pack_samples(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Return the indices of the samples of each row.

    For each number of rows, samples are assigned longest first to the shortest row. The layout with the fewest tokens
    wins, padding included; of equal ones that with the shortest rows, because attention costs the square of a row.

    >>> pack_samples([9, 5, 4, 2], max_tokens=11)  # 22 tokens; one sample per row would be 36
    [[0, 3], [1, 2]]

    Args:
        lengths: Tokens per sample.
        max_tokens: Maximum length of a row. If a sample is longer, its length is the maximum.
    """
    limit = max(max_tokens, *lengths)
    layouts = [_spread(lengths, rows) for rows in range(len(lengths), 0, -1)]
    widths = [max(sum(lengths[i] for i in row) for row in rows) for rows in layouts]
    tokens = [len(rows) * width if width <= limit else math.inf for rows, width in zip(layouts, widths, strict=True)]
    return layouts[tokens.index(min(tokens))]


def _spread(lengths: list[int], count: int) -> list[list[int]]:
    """Return `count` rows of about equal length; samples of a row, and rows by their first sample, stay in order."""
    totals, rows = [0] * count, [[] for _ in range(count)]
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        shortest = totals.index(min(totals))
        rows[shortest].append(sample)
        totals[shortest] += lengths[sample]
    return sorted(sorted(row) for row in rows)
