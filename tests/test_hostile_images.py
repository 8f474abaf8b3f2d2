"""Every entrance for images reads valid files as PIL does, and refuses hostile ones with an error that names them."""

import io
import struct
import zlib
from itertools import product

import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from llava_bidir.common.errors import UserError
from llava_bidir.common.images import read_image, read_photo
from llava_bidir.data.collate import Collate
from llava_bidir.model.build import build_processor
from probes.data.folder import FolderDataset
from probes.data.image_dataset import open_png
from probes.lab.photos import Photos
from probes.ops.geometry import Geometry

SIZE = (12, 8)  # width and height, where there is a picture
GEOMETRY = Geometry(grid=(2, 2), image_px=8, covered_px=8)


def png(width: int, height: int, depth: int = 8, colour: int = 0, data: bytes = b"") -> bytes:
    """A PNG with this header; `data` may be too short for it."""
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0),
        b"IDAT": zlib.compress(data, 9),
        b"IEND": b"",
    }
    chunks = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(image: Image.Image, format: str, **kwargs) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **kwargs)
    return stream.getvalue()


def full(value, dtype) -> Image.Image:
    return Image.fromarray(np.full(SIZE[::-1], value, dtype))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8))
TURNED = Image.Exif()
TURNED[0x0112] = 6
UNKNOWN = "it is not (BMP|PNG)"
# name: (content, error)
REJECTED: dict[str, tuple[bytes, str]] = {
    "bomb.png": (png(20_000, 20_000), "decompression bomb"),
    "no_bytes.jpg": (b"", UNKNOWN),
    "cut_off.png": (encoded(NOISE, "PNG")[:-60], "truncated|broken"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", UNKNOWN),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n(%pipe%touch harm) (w) file\n%%EOF\n", UNKNOWN),
}
TOO_DEEP: dict[str, bytes] = {
    "grey16.png": encoded(full(4000, np.uint16), "PNG"),
    "grey32.tif.png": encoded(full(70_000, np.int32), "TIFF"),
    "float.png": encoded(full(0.5, np.float32), "TIFF"),
}
VALID: dict[str, bytes] = {
    "cmyk.jpg": encoded(NOISE.convert("CMYK"), "JPEG"),
    "rgba.png": encoded(NOISE.convert("RGBA"), "PNG"),
    "palette.png": encoded(NOISE.quantize(8), "PNG", transparency=bytes([0, 128, 255])),
    "grey.png": encoded(NOISE.convert("L"), "PNG"),
    "rgb16.png": png(*SIZE, 16, 2, (b"\0" + bytes(range(72))) * 8),
    "animated.gif": encoded(NOISE, "GIF", save_all=True, append_images=[full(9, np.uint8)]),
    "gif_called.jpg": encoded(NOISE, "GIF"),
    "turned.jpg": encoded(NOISE, "JPEG", exif=TURNED),
    "broken_exif.jpg": encoded(NOISE, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
}
ENTRANCES = {
    "image of a record or a data set": read_image,
    "photo": read_photo,
    "mask": open_png,
    "photo in the lab": lambda path: Photos([GEOMETRY]).add(path.read_bytes(), path.name),
}


HOSTILE = set(product([*REJECTED, *TOO_DEEP], ENTRANCES)) - {
    ("grey16.png", "mask")
}  # depth is of 16 bits


@pytest.mark.parametrize(("name", "entrance"), sorted(HOSTILE))
def test_hostile_image_is_an_error_that_names_it(name, entrance, tmp_path):
    content, message = REJECTED.get(name) or (TOO_DEEP[name], "more than 8 bits|it is not PNG")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        ENTRANCES[entrance](path)
    assert name in str(error.value)


@pytest.mark.parametrize("name", VALID)
def test_unusual_image_is_read_as_pil_reads_it(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(VALID[name])
    expected = np.asarray(Image.open(path).convert("RGB"))
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", SIZE)
    assert (np.asarray(image) == expected).all()
    assert (np.asarray(GEOMETRY.place(image)).shape) == (8, 8, 3)


def test_picture_of_more_than_8_bits_is_refused_where_it_comes_from_python():
    """PIL would cut it off at 255, which leaves most of it white."""
    with pytest.raises(ValueError, match="mode 'I;16', more than 8 bits"):
        GEOMETRY.place(full(4000, np.uint16))


def test_a_panorama_counts_as_many_pixels_as_it_has(parts, tmp_path, monkeypatch):
    """Photos of 12,000 x 3,000 px were refused, because a square of their longer side was counted."""
    Image.new("RGB", (120, 30), "red").save(tmp_path / "panorama.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120 * 30)
    sample = {"image": read_photo(tmp_path / "panorama.png")}
    collate = Collate(build_processor(*parts), tiny_models.TOKENS, "plain")
    ids = [collate.processor.image_token_id] * tiny_models.TOKENS
    assert len(collate.pixels([sample], [ids])) == 1


# ---------------------------------------------------------------------------------------------------- any bytes
WHOLE = [*VALID.values(), *TOO_DEEP.values(), *(content for content, _ in REJECTED.values())]
WHOLE += [encoded(NOISE, name) for name in ("BMP", "TIFF", "WEBP", "JPEG")]
CHANGE = st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=6), st.booleans())
MASKS = arrays.arrays(
    np.uint8,
    st.sampled_from([SIZE[::-1], (1, 1), (8, 12, 3), (8, 12, 4)]),
    elements=st.sampled_from([0, 1, 2]) | st.sampled_from([0, 1, 3, 254, 255]),
    fill=st.sampled_from([0, 1, 2, 255]),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return tiny_models.write_segmentation(folder, training=1, validation=1, size=SIZE[::-1])


@given(
    kind=st.sampled_from(["images", "annotations"]),
    content=st.binary(max_size=100) | st.sampled_from(WHOLE),
    changes=st.lists(CHANGE, max_size=4),
    end=st.none() | st.integers(0, 2**16),
)
def test_any_bytes_are_a_sample_or_an_error_that_names_the_file(root, kind, content, changes, end):
    for position, new, insert in changes:
        position %= max(len(content), 1)
        rest = content[position:] if insert else content[position + len(new) :]
        content = content[:position] + new + rest
    read_target(root, kind, content[:end])


@given(MASKS, st.sampled_from([np.uint8, np.uint16, np.bool_]))
def test_any_small_array_is_a_mask_or_an_error_that_names_the_file(root, array, dtype):
    if array.ndim == 2:
        array = array.astype(dtype)
    target = read_target(root, "annotations", encoded(Image.fromarray(array), "PNG"))
    is_mask = array.dtype in (np.uint8, np.uint16) and array.shape == SIZE[::-1]
    assert (target is not None) == (is_mask and set(np.unique(array)) <= {0, 1, 2, 255})
    assert target is None or (target == array).all()


def read_target(root, kind: str, content: bytes) -> np.ndarray | None:
    """Read a data set with these bytes as an image or a mask."""
    path = root / kind / "validation/000.png"
    before = path.read_bytes()
    try:
        path.write_bytes(content)
        sample = FolderDataset(root, "validation")[0]
    except UserError as error:
        assert str(path) in str(error) and not str(error).endswith(": ")
        return None
    finally:
        path.write_bytes(before)
    height, width = sample["target"].shape
    assert (sample["image"].mode, sample["image"].size) == ("RGB", (width, height))
    assert sample["target"].dtype == np.uint8
    assert set(np.unique(sample["target"])) <= {0, 1, 2, 255}
    return sample["target"]
