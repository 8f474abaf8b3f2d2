"""The opener of untrusted images: formats, bounds, and files that are not regular."""

import resource
import time

import hostile_images
import pytest
from PIL import Image, UnidentifiedImageError

from llava_bidir.common.image_io import open_bounded


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
