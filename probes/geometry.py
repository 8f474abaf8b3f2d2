"""How an image, its token grid and its segmentation mask lie on each other."""

from PIL import Image


def squash(image: Image.Image, side_px: int) -> Image.Image:
    """The whole image resized to a square, aspect given up.

    Token (i, j) of an h x w grid then covers exactly the pixels of row i and column j of an h x w division of the image
    and of its mask, whatever their size: logits on the grid, upsampled to the mask's size, lie right. No crop.
    """
    return image.convert("RGB").resize((side_px, side_px), Image.Resampling.BICUBIC)
