"""Images whose pixels say where they are, through the square and the token grid back to the mask."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference import IGNORED, make_case

from llava_bidir.common.errors import UserError
from probes.ops.bilinear import upsampled_argmax
from probes.ops.cross_entropy import upsampled_cross_entropy
from probes.ops.geometry import RESIZES, Geometry, ResizeRule
from probes.ops.pixel_counts import count

pytestmark = pytest.mark.numerics

# DINOv2 resizes the shorter side to 256 px, of which 224 are kept
RULES = [
    *map(ResizeRule, RESIZES),
    ResizeRule("center_crop", before_crop=Fraction(8, 7)),
    ResizeRule("squash", before_crop=Fraction(8, 7)),
]


def sampled(logits: torch.Tensor, geometry: Geometry, size: tuple[int, int]) -> torch.Tensor:
    """The logits at each pixel by torch's grid_sample, which knows nothing of views."""

    def fraction(length: int) -> torch.Tensor:  # of the square's side, at each pixel
        pixels = torch.arange(length, dtype=torch.float64) + 0.5
        side = max(size)
        px = geometry.image_px
        edge = round(px * geometry.rule.before_crop)
        if geometry.resize == "center_crop":
            resized = edge * length // min(size)
            return (pixels / length * resized - (resized - px) // 2) / px
        if geometry.resize == "letterbox":
            resized = round(px * length / side)
            return (pixels / length * resized + (px - resized) // 2) / px
        if geometry.rule.before_crop > 1:  # of a squashed image
            return (pixels / length * edge - (edge - px) // 2) / px
        return (
            pixels / length
            if geometry.resize == "squash"
            else (pixels + (side - length) // 2) / side
        )

    y, x = (2 * fraction(length) * geometry.image_px / geometry.covered_px - 1 for length in size)
    where = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[None]
    return F.grid_sample(
        logits,
        torch.cat([where] * len(logits)),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )


@pytest.mark.parametrize("size", [(33, 40), (64, 17), (21, 21)])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("covered_px", [56, 54])
def test_loss_and_prediction_under_a_view_equal_grid_sample(size, rule, covered_px):
    geometry = Geometry(grid=(4, 4), image_px=56, covered_px=covered_px, rule=rule)
    logits, target = make_case((1, 2, 5, 4, 4), size)
    logits = logits[0].requires_grad_()
    target[:, :3] = IGNORED
    up = sampled(logits, geometry, size)
    expected = F.cross_entropy(up, target, ignore_index=IGNORED)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    loss = upsampled_cross_entropy(logits, target, view=geometry.view(size), nodes=None)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert torch.equal(upsampled_argmax(logits, size, geometry.view(size)).long(), up.argmax(1))


def test_tokens_own_the_pixels_that_they_see():
    """A 2 x 4 image, padded to 4 x 4, under a 4 x 4 grid: its rows are the grid's rows 1 and 2."""
    view = Geometry(grid=(4, 4), image_px=56, covered_px=56, rule=ResizeRule("pad")).view((2, 4))
    target = torch.tensor([[[0, 1, 2, 255], [1, 1, 2, 0]]], dtype=torch.uint8)
    padding = [-1] * 4
    rows = [[0, 1, 2, -1], [1, 1, 2, 0]]
    counts = count(torch.zeros((1, 1, 3, 4, 4)), target, view)
    assert counts.patch_class[0].view(4, 4).tolist() == [padding, *rows, padding]
    assert counts.patch_valid[0].view(4, 4).tolist() == [[0] * 4, [1, 1, 1, 0], [1] * 4, [0] * 4]


def test_pixels_that_no_token_sees_count_for_the_image_alone():
    """3/4 of a 4 x 4 image are seen by a 3 x 3 grid: a pixel each, and none at the right and the bottom."""
    view = Geometry((3, 3), 4, 3).view((4, 4))
    target = torch.zeros(1, 4, 4, dtype=torch.uint8)
    counts = count(torch.zeros((1, 1, 1, 3, 3)), target, view)
    assert counts.patch_valid.tolist() == [[1] * 9]
    assert counts.labelled.tolist() == [[16]]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("size", [(180, 300), (300, 180), (240, 240)])
def test_patches_of_a_mask_are_those_of_its_picture(rule, size):
    """The brightness of each token in the square of a picture of the mask, white on black."""
    geometry = Geometry(grid=(6, 6), image_px=60, covered_px=60, rule=rule)
    mask = np.zeros(size, dtype=bool)
    mask[20:150, 35:160] = True
    picture = geometry.place(Image.fromarray(np.uint8(255 * mask)))
    tokens = np.asarray(picture)[..., 0].reshape((6, 10, 6, 10)).mean((1, 3)) / 255
    np.testing.assert_allclose(geometry.patches(torch.from_numpy(mask)), tokens, atol=0.12)
    assert geometry.patches(torch.ones(size, dtype=torch.bool)).max() == 1


@pytest.mark.parametrize(
    ("resize", "dtype"),
    [("squash", torch.uint8), ("pad", torch.int64), ("center_crop", torch.uint8)],
)
def test_patches_of_classes_are_those_of_most_labelled_pixels(resize, dtype):
    geometry = Geometry(grid=(6, 5), image_px=60, covered_px=60, rule=ResizeRule(resize))
    mask = make_case((1, 1, 4, 1, 1), (97, 61))[1][0].to(dtype)
    mask[:, 40:] = 7
    mask[70:] = 255
    patches = geometry.patches(mask)
    view = geometry.view((97, 61))
    rows = view.rows.token_of_pixel(6, 97)
    columns = view.cols.token_of_pixel(5, 61)
    for i, j in np.ndindex(6, 5):
        labels = mask[rows == i][:, columns == j].flatten().tolist()
        counts = Counter(label for label in labels if label != 255)
        most = max(counts.values(), default=0)
        expected = min((k for k, count in counts.items() if count == most), default=-1)
        assert patches[i, j] == expected
    assert (geometry.patches(torch.full((97, 61), 255)) == -1).all()


@pytest.mark.parametrize("mask", [torch.ones(1, 4, 4) > 0, torch.ones(4, 4), torch.ones(4, 4) + 0j])
def test_a_mask_has_two_axes_and_no_fractions(mask):
    with pytest.raises(UserError, match="must (have height and width|be truth values or integers)"):
        Geometry((2, 2), 4, 4).patches(mask)
