"""One block per image, as in Gemma 3: `--model.image_attention per_image --import mask.py`."""

import torch

import llava_bidir


def per_image(is_image):
    """Return block ids, long[B, N], from bool[B, N]: tokens of one block see each other, -1 is causal.

    t i i t i t  ->  -1 0 0 -1 1 -1
    """
    starts = is_image & ~is_image.roll(1, -1)
    starts[:, 0] = is_image[:, 0]
    return torch.where(is_image, starts.cumsum(-1) - 1, -1)


llava_bidir.register_image_attention("per_image", per_image)
