"""Strips are cut before they are resized (tests/test_hostile_images.py has hostile files)."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_bidir.common.errors import UserError
from llava_bidir.common.image_io import read_photo, trim_strip
from llava_bidir.data.collate import to_pixels
from probes.ops.geometry import Geometry, ResizeRule

PX = 24  # side of the model's square
NOISE = np.random.default_rng(0)


def middle_of_the_whole(image: Image.Image) -> Image.Image:
    """CLIP's processor: the whole image is resized, then cut."""
    width, height = (int(PX * length / min(image.size)) for length in image.size)
    left = (width - PX) // 2
    top = (height - PX) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop(
        (left, top, left + PX, top + PX)
    )


@pytest.mark.parametrize("size", [(400, 1), (1, 401), (803, 3), (700, 4), (40, 30), (479, 30)])
def test_the_middle_of_a_strip_is_that_of_the_whole(size):
    strip = Image.fromarray(NOISE.integers(0, 256, (size[1], size[0], 3), np.uint8))
    expected = np.asarray(middle_of_the_whole(strip))
    assert np.array_equal(np.asarray(middle_of_the_whole(trim_strip(strip))), expected)
    assert (trim_strip(strip) is strip) == (max(size) < 18 * min(size))


def test_a_strip_whose_resized_length_is_rounded_is_shifted_by_less_than_a_32nd_of_a_pixel():
    """A wave with a period of 8 px rises by up to 23 levels in a pixel of the square."""
    worst = []
    for length in range(1990, 2004):
        columns = 127 + 100 * np.sin(np.arange(length) * 2 * np.pi / 8)
        strip = Image.fromarray(
            np.broadcast_to(columns[None, :, None], (7, length, 3)).round().astype(np.uint8)
        )
        whole, trimmed = (
            np.asarray(middle_of_the_whole(image)).astype(int)
            for image in (strip, trim_strip(strip))
        )
        worst.append(np.abs(trimmed - whole).max())
    assert max(worst) <= 2, "1/32 of 23 levels, and rounding"
    assert max(worst) > 0


def square_of(entrance: str, way: str, image: Image.Image) -> np.ndarray:
    """The model's square of an image, uint8[PX, PX, 3], by its way to make one."""
    if entrance == "probes":
        rule = ResizeRule(way, Image.Resampling.BICUBIC)
        geometry = Geometry(grid=(2, 2), image_px=PX, covered_px=PX, rule=rule)
        return np.asarray(geometry.place(image))
    size = {"size": {"shortest_edge": PX}, "crop_size": {"height": PX, "width": PX}}
    plain = {"do_normalize": False, "do_rescale": False}
    processor = LlavaImageProcessorPil(do_pad=way == "pad", **size, **plain)
    pixels = to_pixels(SimpleNamespace(image_processor=processor), [image])
    return pixels[0].movedim(0, -1).numpy()


@pytest.mark.parametrize("entrance", ["probes", "training and generate"])
def test_a_photo_counts_as_many_pixels_as_are_decoded_or_made(entrance, tmp_path, monkeypatch):
    """As 12,000 x 3,000 px under Pillow's limit: fewer in the file, more in a square of that side."""
    wide = Image.fromarray(NOISE.integers(0, 256, (30, 120, 3), np.uint8))
    wide.save(tmp_path / "wide.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    photo = read_photo(tmp_path / "wide.png")
    expected = np.asarray(middle_of_the_whole(wide))
    assert np.array_equal(square_of(entrance, "center_crop", photo), expected)
    with pytest.raises(
        UserError, match="120 x 30 px is padded to a square of 120 px, which exceeds"
    ):
        square_of(entrance, "pad", photo)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3599)
    with pytest.raises(UserError, match="wide.png .*120 x 30 px, more than the 3,599 of"):
        read_photo(tmp_path / "wide.png")


@pytest.mark.parametrize("entrance", ["probes", "training and generate"])
def test_no_entrance_makes_more_pixels_than_the_square_needs(entrance, monkeypatch):
    """3,000 x 1 px became 3,000 x 336 x 336 px, 3.7 GB."""
    made = []
    resize = Image.Image.resize

    def record(
        image,
        size,
        *args,
        **kwargs,
    ):
        return made.append(size[0] * size[1]) or resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", record)
    strips = [Image.new("RGB", size) for size in ((3000, 1), (1, 3000), (9000, 2))]
    crop = {"size": {"shortest_edge": PX}, "crop_size": {"height": PX, "width": PX}}
    for strip in strips:
        if entrance == "probes":
            assert Geometry((2, 2), PX, PX, ResizeRule("center_crop")).place(strip).size == (PX, PX)
        else:
            processor = SimpleNamespace(
                image_processor=LlavaImageProcessorPil(do_pad=False, **crop)
            )
            assert to_pixels(processor, [strip]).shape == (1, 3, PX, PX)
    assert len(made) == len(strips)
    assert max(made) <= 18 * PX * PX
