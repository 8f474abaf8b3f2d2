"""Check the side of an encoder's square input."""

from .errors import UserError

MAX_GRID_SIDE = 128  # patches per side; the largest encoders have 64


def check_image_px(image_px: int, patch_px: int, option: str) -> None:
    """Raise a UserError that names `option` unless a side in pixels is a usable multiple of the patch."""
    sides = f"a multiple of the patch, {patch_px} px, from {patch_px} to {MAX_GRID_SIDE * patch_px}"
    if isinstance(image_px, bool) or not isinstance(image_px, int):
        raise UserError(f"{option} {image_px!r}: expected {sides}")
    if image_px % patch_px or not 1 <= image_px // patch_px <= MAX_GRID_SIDE:
        lower = max(1, min(image_px // patch_px, MAX_GRID_SIDE - 1)) * patch_px
        raise UserError(
            f"{option} {image_px}: expected {sides}; the nearest are {lower} and {lower + patch_px}"
        )
