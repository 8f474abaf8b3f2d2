"""Colours of classes."""

from colorsys import hsv_to_rgb

import numpy as np

GOLDEN = 0.381966  # step between hues, after which they stay distinct for any number of classes


def palette_of(dataset) -> np.ndarray:
    """Return the colours of the dataset, uint8[K, 3]; by default distinct hues in three brightnesses."""
    if getattr(dataset, "palette", None):
        return np.array(dataset.palette, np.uint8)
    shades = ((0.55, 0.95), (0.8, 0.8), (0.7, 0.6))  # saturation and brightness
    colours = [hsv_to_rgb(k * GOLDEN % 1, *shades[k % 3]) for k in range(len(dataset.classes))]
    return (255 * np.array(colours)).round().astype(np.uint8)
