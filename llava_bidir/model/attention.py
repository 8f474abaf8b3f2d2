"""Image attention: which tokens of a sequence may attend to each other beyond the causal mask.

A mask is named by ``config.image_attention`` and described by *block ids*: tokens that share an id >= 0 see each other
in both directions, -1 leaves a token causal. transformers turns the ids into a mask for every backend
(``create_causal_mask(block_sequence_ids=...)``) and adds padding and caches. This file ships inside checkpoints.

Shapes: B batch, N sequence.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BlockIds = Callable[[Tensor], Tensor]

IMAGE_ATTENTION: dict[str, BlockIds | None] = {}


def register_image_attention(name: str, block_ids: BlockIds | None) -> None:
    """Adds a mask under `name`.

    Args:
        name: What goes into ``config.image_attention``.
        block_ids: bool[B, N] (True at image tokens) -> long[B, N] of block ids. None stands for plain causal attention.

    Raises:
        ValueError: The name is taken, or the function gives something else on two short samples.
    """
    if name in IMAGE_ATTENTION:
        raise ValueError(f"image_attention {name!r} is registered already; choose another name")
    if block_ids is not None:
        _check(name, block_ids)
    IMAGE_ATTENTION[name] = block_ids


def _check(name: str, block_ids: BlockIds) -> None:
    """Tries a function on "t i i t i t" and "t t t t t t". Bools, taken for ids, would make all text a block; text that
    saw what follows could not be generated, nor be left out by the probes where it stands behind the images."""
    is_image = torch.tensor([[False, True, True, False, True, False], [False] * 6], device="cpu")
    ids = block_ids(is_image.clone())
    given = f"{ids.dtype}{list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
    if given != f"{torch.long}{list(is_image.shape)}":
        raise ValueError(f"image_attention {name!r} makes {given} of bool[B, N]; expected block ids, torch.int64[B, N]")
    if (ids[0, 5:] >= 0).any() or (ids[1] >= 0).any():
        raise ValueError(
            f"image_attention {name!r} puts text into a block that has no image token behind it; such text stays "
            "causal (-1), since it is generated token by token"
        )


def image_attention(name: str) -> BlockIds | None:
    """Looks a registered mask up; the error lists what there is."""
    if name not in IMAGE_ATTENTION:
        raise ValueError(f"unknown image_attention {name!r}; registered: {', '.join(sorted(IMAGE_ATTENTION))}")
    return IMAGE_ATTENTION[name]


def bidirectional(is_image: Tensor) -> Tensor:
    """One block of all image tokens of a sample. Source: Eq. 2, M(q, k) = (q in I and k in I) or q >= k.

    With t text and i image tokens:

    >>> bidirectional(torch.tensor([[False, True, True, False]]))   # t i i t
    tensor([[-1,  0,  0, -1]])

    so that, rows being queries, the mask is::

        t 1 0 0 0
        i 1 1 1 0
        i 1 1 1 0
        t 1 1 1 1
    """
    return torch.where(is_image, 0, -1)


def prefix(is_image: Tensor) -> Tensor:
    """One block of everything up to the last image token, system prompt included. Source: PaliGemma's prefix-LM mask.

    Deviates: PaliGemma's block goes on over the question; LLaVA's conversations have many turns after the image, and
    those stay causal here. A sample without an image stays causal as a whole.

    >>> prefix(torch.tensor([[False, True, True, False]]))          # t i i t
    tensor([[ 0,  0,  0, -1]])
    """
    image_ahead = is_image.flip(-1).cumsum(-1).flip(-1) > 0
    return torch.where(image_ahead, 0, -1)


register_image_attention("causal", None)
register_image_attention("bidirectional", bidirectional)
register_image_attention("prefix", prefix)
