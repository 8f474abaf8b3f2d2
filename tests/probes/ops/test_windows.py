"""Windows of photos: logits that are averaged over them are those of crops that are composed by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from windows import compose

from llava_bidir.common.errors import UserError
from probes.ops.bilinear import upsample, upsampled_argmax
from probes.ops.geometry import Geometry, ResizeRule
from probes.ops.pixel_counts import count

GRID = (4, 4)
PX, STRIDE = 16, 11
GEOMETRY = Geometry(GRID, PX, PX, ResizeRule("slide", Image.Resampling.BILINEAR, stride_px=STRIDE))


@pytest.mark.parametrize("size", [(20, 40), (40, 20), (16, 16), (31, 33), (9, 50)])
def test_joined_grids_are_upsampled_to_the_composed_logits(size):
    windows = GEOMETRY.square_count(size)
    torch.manual_seed(0)
    outputs = torch.randn(2, windows, 3, *GRID, dtype=torch.float64)  # two probes, three classes
    joined = GEOMETRY.join(outputs, size)
    view = GEOMETRY.view(size)
    expected = torch.stack([compose(of_probe, size, PX, STRIDE) for of_probe in outputs])
    torch.testing.assert_close(upsample(joined, size, view), expected, rtol=0, atol=1e-12)
    assert torch.equal(upsampled_argmax(joined, size, view).long(), expected.argmax(1))


def test_counts_are_those_of_the_composed_classes():
    """And those under tokens are of as many parts of the photo as a window has tokens."""
    size = (20, 40)
    torch.manual_seed(0)
    outputs = torch.randn(1, 3, 3, *GRID)
    target = torch.randint(0, 3, (1, *size), dtype=torch.uint8)
    target[:, :3] = 255
    counts = count(GEOMETRY.join(outputs, size)[:, None], target, GEOMETRY.view(size))
    right = (compose(outputs[0], size, PX, STRIDE).argmax(0) == target[0]).numpy()
    for k in range(3):
        assert counts.intersection[0, 0, k] == (right & (target[0] == k).numpy()).sum()
    by_token = right.reshape(4, 5, 4, 10).sum((1, 3))
    assert counts.patch_right.view(4, 4).tolist() == by_token.tolist()


def test_windows_of_a_photo_are_its_pixels_after_it_was_resized():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 48, 3), np.uint8))
    resized = np.asarray(photo.resize((32, 16), Image.Resampling.BILINEAR))
    windows = [np.asarray(square) for square in GEOMETRY.squares(photo)]
    assert len(windows) == 3
    for window, left in zip(windows, (0, 11, 16), strict=True):
        assert np.array_equal(window, resized[:, left : left + 16])


def test_what_needs_one_square_refuses_windows():
    with pytest.raises(UserError, match=r"read in windows .* another image_resize: squash, pad"):
        GEOMETRY.place(Image.new("RGB", (20, 10)))
    with pytest.raises(UserError, match="read in windows"):
        GEOMETRY.patches(torch.zeros(10, 20, dtype=torch.bool))


def test_a_stride_without_windows_or_beyond_one_is_refused():
    rule = ResizeRule()
    with pytest.raises(UserError, match="stride_px 5: expected at most the side of a window"):
        rule.replaced_by("squash", stride_px=5)
    with pytest.raises(UserError, match="stride_px 20"):
        rule.replaced_by("slide", window_px=16, stride_px=20)
