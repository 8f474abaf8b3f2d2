"""Triton twins of what `cross_entropy.py`, `bilinear.py` and `metrics.py` do in chunks on a CPU.

One program works on one *cell* of one grid: the pixels between the same two grid rows and the same two grid columns.
Its four corner nodes are read once, its pixels' logits live in registers, and what it finds leaves it once. So no
tensor of K * H * W numbers exists, not even in parts, and nothing depends on the order in which programs run:
gradients are written by corner and then added up in a fixed order, and only integers are counted with atomics.

`cross_entropy.py` and `argmax_counts.py` hold the kernels, `grid_cells.py` what they share. They run compiled on a
GPU and, with `TRITON_INTERPRET=1`, interpreted on a CPU, which is how the tests compare them with the chunked forms.
"""

import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

MAX_CLASSES = 255  # a pixel's logits are in the registers of one warp; labels are uint8, 255 of them ignored


def use_triton(logits: Tensor) -> bool:
    """Whether logits f[..., K, h, w] go to the kernels: on a GPU, up to 255 classes, not in float64."""
    return logits.is_cuda and logits.dtype != torch.float64 and logits.shape[-3] <= MAX_CLASSES and _installed()


@lru_cache(maxsize=1)
def _installed() -> bool:
    if find_spec("triton") is None:
        warnings.warn("triton is not installed; probes run in torch's chunked form, several times slower", stacklevel=3)
        return False
    return True
