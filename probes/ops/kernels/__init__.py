"""Triton kernels of the upsampled argmax and counts, equivalent to the chunked torch code for a CPU.

One program processes one *cell* of one grid: the pixels between two adjacent grid rows and two adjacent grid columns.
It reads the four corner nodes once, keeps the logits of its pixels in registers and writes its result once, so that no
tensor of K * H * W numbers exists. Results do not depend on the order of the programs: atomics count integers only.
Tests run the kernels with `TRITON_INTERPRET=1` on a CPU.

What depends on the device is chosen here: kernels or torch code, and the size of its chunks.
"""

import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

# the logits of a pixel fit into the registers of one warp; labels are uint8, 255 is ignored
MAX_CLASSES = 255


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which a device multiplies matrices fastest: bfloat16 where there are instructions for it."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    # older versions of torch do not tell
    capabilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def sum_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype in which losses and pixels are summed: float64, which a Mac's GPU does not have."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def limit_on(device: torch.device, limits: dict[str, int]) -> int:
    """Return the limit of a device, from limits by type of device; accelerators without one have that of CUDA."""
    return limits.get(device.type, limits["cuda"])


def use_triton(logits: Tensor) -> bool:
    """Return True if logits f[..., K, h, w] are on a GPU, not float64, and have at most 255 classes."""
    return (
        logits.is_cuda
        and logits.dtype != torch.float64
        and logits.shape[-3] <= MAX_CLASSES
        and _installed()
    )


@lru_cache(maxsize=1)
def _installed() -> bool:
    if find_spec("triton") is None:
        warnings.warn(
            "triton is not installed; using chunked torch code, several times slower", stacklevel=3
        )
        return False
    return True
