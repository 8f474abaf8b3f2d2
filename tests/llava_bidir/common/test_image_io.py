"""The opener of untrusted images: formats, bounds, and files that are not regular."""

import resource
import time
from types import SimpleNamespace

import hostile_images
import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_bidir.common.image_io import open_bounded, trim_strip
from llava_bidir.data.collate import to_pixels
from probes.ops.geometry import Geometry


@pytest.mark.parametrize("name", hostile_images.REJECTED)
def test_hostile_file_is_an_error(tmp_path, name):
    content, message = hostile_images.REJECTED[name]
    (tmp_path / name).write_bytes(content)
    kinds = (
        UnidentifiedImageError
        if message == hostile_images.UNKNOWN
        else (OSError, ValueError, Image.DecompressionBombError)
    )
    with pytest.raises(kinds, match=message), open_bounded(tmp_path / name) as image:
        image.load()


@pytest.mark.parametrize("name", hostile_images.NO_FILES)
def test_what_is_not_a_regular_file_is_not_read(tmp_path, name):
    make, message = hostile_images.NO_FILES[name]
    make(tmp_path / name)
    with pytest.raises(OSError, match=message):
        open_bounded(tmp_path / name)


def test_formats_can_be_restricted(tmp_path):
    hostile_images.noise().save(tmp_path / "a.gif")
    with pytest.raises(UnidentifiedImageError):
        open_bounded(tmp_path / "a.gif", ("PNG",))


def test_decompression_bomb_uses_no_memory_and_no_time(tmp_path):
    (tmp_path / "bomb.png").write_bytes(hostile_images.png(12_000, 12_000, colour=2))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError, match="decompression bomb"):
        open_bounded(tmp_path / "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, (
        "KiB; its pixels need 562,500"
    )
    assert time.perf_counter() - start < 5


PX = 24  # side of the model's square
NOISE = np.random.default_rng(0)


def middle_of_the_whole(image: Image.Image) -> Image.Image:
    """CLIP's processor: the whole image is resized, then cut."""
    width, height = (int(PX * length / min(image.size)) for length in image.size)
    left, top = (width - PX) // 2, (height - PX) // 2
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


@pytest.mark.parametrize("entrance", ["probes", "training and generate"])
def test_no_entrance_makes_more_pixels_than_the_square_needs(entrance, monkeypatch):
    """3,000 x 1 px became 3,000 x 336 x 336 px, 3.7 GB."""
    made, resize = [], Image.Image.resize
    record = lambda image, size, *args, **kwargs: (
        made.append(size[0] * size[1]) or resize(image, size, *args, **kwargs)
    )
    monkeypatch.setattr(Image.Image, "resize", record)
    strips = [Image.new("RGB", size) for size in ((3000, 1), (1, 3000), (9000, 2))]
    crop = {"size": {"shortest_edge": PX}, "crop_size": {"height": PX, "width": PX}}
    for strip in strips:
        if entrance == "probes":
            assert Geometry((2, 2), PX, PX, "center_crop").place(strip).size == (PX, PX)
        else:
            processor = SimpleNamespace(
                image_processor=LlavaImageProcessorPil(do_pad=False, **crop)
            )
            assert to_pixels(processor, [strip]).shape == (1, 3, PX, PX)
    assert len(made) == len(strips) and max(made) <= 18 * PX * PX
