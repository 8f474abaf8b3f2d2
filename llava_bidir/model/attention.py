"""Registry of image attention masks: which tokens attend to each other beyond the causal mask.

``config.image_attention`` names a mask. A mask is a function that returns *block ids*: tokens with the same id >= 0
attend to each other in both directions, and -1 leaves a token causal. transformers builds the mask of every backend
from the ids (``create_causal_mask(block_sequence_ids=...)``) and adds padding and caches. Exported checkpoints contain
a copy of this file.

Shapes: B batch, N sequence.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BlockIds = Callable[[Tensor], Tensor]

IMAGE_ATTENTION: dict[str, BlockIds | None] = {}


def register_image_attention(name: str, block_ids: BlockIds | None) -> None:
    """Register a mask under `name`.

    Args:
        name: Value of ``config.image_attention``.
        block_ids: Maps bool[B, N] (True at image tokens) to block ids, long[B, N]. None means plain causal attention.

    Raises:
        ValueError: The name is taken, or the function returns invalid block ids for two short samples.
    """
    if name in IMAGE_ATTENTION:
        raise ValueError(f"image_attention {name!r} is already registered; choose another name")
    if block_ids is not None:
        _check_block_ids(name, block_ids)
    IMAGE_ATTENTION[name] = block_ids


def _check_block_ids(name: str, block_ids: BlockIds) -> None:
    """Call the function on "t i i t i t" and "t t t t t t" and check the ids.

    A bool tensor would be read as ids that put all text into one block. Text that attends to later tokens cannot be
    generated token by token, and readers of states could not drop the text after the images.
    """
    is_image = torch.tensor([[False, True, True, False, True, False], [False] * 6], device="cpu")
    ids = block_ids(is_image.clone())
    returned = f"{ids.dtype}{list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
    if returned != f"{torch.long}{list(is_image.shape)}":
        raise ValueError(
            f"image_attention {name!r} returned {returned}; expected block ids, torch.int64[B, N]"
        )
    if (ids[0, 5:] >= 0).any() or (ids[1] >= 0).any():
        raise ValueError(
            f"image_attention {name!r} puts text after the last image token into a block; such text must stay causal "
            "(-1), because it is generated token by token"
        )


def block_ids_of(name: str) -> BlockIds | None:
    """Return the block id function registered under `name`, None for causal attention."""
    if name not in IMAGE_ATTENTION:
        raise ValueError(
            f"unknown image_attention {name!r}; registered: {', '.join(sorted(IMAGE_ATTENTION))}; "
            "--import FILE.py registers your own"
        )
    return IMAGE_ATTENTION[name]


def bidirectional(is_image: Tensor) -> Tensor:
    """Return block ids that put all image tokens of a sample into one block.

    Source: Eq. 2, M(q, k) = (q in I and k in I) or q >= k. With t text and i image tokens:

    >>> bidirectional(torch.tensor([[False, True, True, False]]))   # t i i t
    tensor([[-1,  0,  0, -1]])

    Rows are queries, so the mask is::

        t 1 0 0 0
        i 1 1 1 0
        i 1 1 1 0
        t 1 1 1 1
    """
    return torch.where(is_image, 0, -1)


def prefix(is_image: Tensor) -> Tensor:
    """Return block ids that put all tokens up to the last image token into one block, system prompt included.

    Source: PaliGemma's prefix-LM mask. A sample without an image stays causal.

    Deviates: PaliGemma's block includes the question. LLaVA's conversations have several turns after the image, which
    stay causal here.

    >>> prefix(torch.tensor([[False, True, True, False]]))          # t i i t
    tensor([[ 0,  0,  0, -1]])
    """
    image_ahead = is_image.flip(-1).cumsum(-1).flip(-1) > 0
    return torch.where(image_ahead, 0, -1)


register_image_attention("causal", None)
register_image_attention("bidirectional", bidirectional)
register_image_attention("prefix", prefix)
