"""Every entrance for images reads valid files as PIL does, and refuses hostile ones with an error that names them."""

import json
import resource
import time
from pathlib import Path

import hostile_images
import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_bidir.commands.verify_data import RecordFindings
from llava_bidir.common.errors import UserError
from llava_bidir.common.images import open_bounded, read_image, read_photo
from llava_bidir.data.collate import Collate
from llava_bidir.data.dataset import Instructions
from llava_bidir.model.build import build_processor
from probes.data.base import BadFile
from probes.data.folder import FolderDataset
from probes.data.verify import find_bad_files
from probes.lab.photos import Photos
from probes.ops.geometry import Geometry

GEOMETRY = Geometry(
    grid=(2, 2),
    image_px=8,
    covered_px=8,
)
TOO_DEEP = dict.fromkeys(hostile_images.DEEP, "more than 8 bits")
MESSAGES = {name: message for name, (_, message) in hostile_images.REJECTED.items()} | TOO_DEEP


def place(folder: Path, name: str) -> Path:
    """Write the file of a case into a folder."""
    path = folder / name
    contents = {key: content for key, (content, _) in hostile_images.REJECTED.items()}
    path.write_bytes((contents | hostile_images.DEEP | hostile_images.VALID)[name])
    return path


# ---------------------------------------------------------------------------------------------------- entrances
def read_record(path: Path, collate) -> Image.Image:
    """Read a record as training does, and check that `verify-data` finds the same."""
    record = {
        "id": "r",
        "image": path.name,
        "conversations": tiny_models.turns("<image>\nq", "a"),
    }
    file = path.parent / "data.json"
    file.write_text(json.dumps([record]))
    data = Instructions(file, path.parent)
    found = RecordFindings(data, collate)[0]
    try:
        image = data[0]["image"]
    except UserError as error:
        (finding,) = found
        assert finding["kind"] == "broken"
        assert str(error) == f"record 0 (id 'r'): {finding['detail']}"
        raise
    assert found == []
    return image


def read_sample(path: Path, kind: str) -> Image.Image:
    """Read a data set with this image or mask, and check that the preflight finds the same."""
    root = path.parent / "photos"
    tiny_models.write_segmentation(root, 1, 1, size=hostile_images.SIZE[::-1])
    for other in ("images", "annotations"):
        there = root / other / "validation/000.png"
        if other == kind:
            there.unlink()
        else:
            there.rename(there.with_name(f"{path.name.rpartition('.')[0]}.png"))
    path.rename(root / kind / "validation" / path.name)
    dataset = FolderDataset(root, "validation")
    try:
        return dataset[0]["image"]
    except BadFile as error:
        expected = [(error.kind, str(error))]
        assert find_bad_files(dataset, "", [0], 0, progress=False) == expected
        raise


def upload(path: Path) -> None:
    Photos([GEOMETRY]).add(path.read_bytes(), path.name)


ENTRANCES = {
    "record": read_record,
    "question": lambda path, _: read_photo(path),
    "image of a data set": lambda path, _: read_sample(path, "images"),
    "mask of a data set": lambda path, _: read_sample(path, "annotations"),
    "photo in the lab": lambda path, _: upload(path),
}
# How entrances call other formats and modes
REFUSALS = "it is not (one of )?(BMP|PNG)|has mode '"
MASK = "mask of a data set"
UPLOAD = "photo in the lab"
HOSTILE = [
    (entrance, name)
    for entrance in ENTRANCES
    for name in MESSAGES
    if not (entrance == MASK and not name.endswith(".png"))  # masks are PNG
]
UNUSUAL = [
    (entrance, name)
    for entrance in ("record", "image of a data set", UPLOAD)
    for name in hostile_images.VALID
    if entrance != "image of a data set"
    or name.endswith((".png", ".jpg"))  # as files are looked for
]


@pytest.fixture(scope="module")
def collate(parts):
    return Collate(build_processor(*parts), tiny_models.TOKENS, "vicuna_v1")


@pytest.mark.parametrize(("entrance", "name"), HOSTILE)
def test_hostile_image_is_an_error_that_names_it(
    entrance,
    name,
    collate,
    tmp_path,
):
    """In training the error also names the record, in a form that the command line shows in one line."""
    path = place(tmp_path, name)
    with pytest.raises(UserError, match=f"{MESSAGES[name]}|{REFUSALS}") as error:
        ENTRANCES[entrance](path, collate)
    assert name in str(error.value)


@pytest.mark.parametrize(("entrance", "name"), UNUSUAL)
def test_unusual_image_is_read_as_pil_reads_it(
    entrance,
    name,
    collate,
    tmp_path,
):
    path = place(tmp_path, name)
    expected = np.asarray(Image.open(path).convert("RGB"))
    image = ENTRANCES[entrance](path, collate)
    if entrance != UPLOAD:
        assert (image.mode, image.size) == ("RGB", hostile_images.SIZE)
        assert (np.asarray(image) == expected).all()


def test_picture_of_more_than_8_bits_is_refused_where_it_comes_from_python():
    """PIL would cut it off at 255, which leaves most of it white."""
    with pytest.raises(ValueError, match="mode 'I;16', more than 8 bits"):
        GEOMETRY.place(Image.fromarray(np.full((8, 12), 4000, np.uint16)))
    assert GEOMETRY.place(hostile_images.noise("CMYK")).mode == "RGB"


# ---------------------------------------------------------------------------------------------------- a bomb
def test_decompression_bomb_uses_no_memory_and_no_time(tmp_path):
    (tmp_path / "bomb.png").write_bytes(hostile_images.png(12_000, 12_000, colour=2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(ValueError, match="decompression bomb"):
        open_bounded(tmp_path / "bomb.png")
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 50_000, "its pixels need 562,500"
    assert time.process_time() - start < 5


# ---------------------------------------------------------------------------------------------------- any bytes
WHOLE = [*hostile_images.VALID.values()]
WHOLE += [
    hostile_images.encoded(hostile_images.noise(), name) for name in ("BMP", "TIFF", "WEBP", "JPEG")
]
CHANGE = st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=6), st.booleans())


@given(
    content=st.sampled_from(WHOLE),
    changes=st.lists(CHANGE, min_size=1, max_size=4),
    end=st.none() | st.integers(0, 2**16),
)
def test_any_change_of_an_image_is_an_image_or_an_error_that_names_the_file(
    tmp_path_factory,
    content,
    changes,
    end,
):
    for position, new, insert in changes:
        position %= len(content)
        rest = content[position:] if insert else content[position + len(new) :]
        content = content[:position] + new + rest
    path = tmp_path_factory.getbasetemp() / "any_change.png"
    path.write_bytes(content[:end])
    try:
        image = read_image(path)
    except UserError as error:
        assert str(error).startswith(f"{path} cannot be read as an image: ")
        assert not str(error).endswith(": ")
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= Image.MAX_IMAGE_PIXELS


def test_a_panorama_counts_as_many_pixels_as_it_has(parts, tmp_path, monkeypatch):
    """Photos of 12,000 x 3,000 px were refused, because a square of their longer side was counted."""
    Image.new("RGB", (120, 30), "red").save(tmp_path / "panorama.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120 * 30)
    sample = {"image": read_photo(tmp_path / "panorama.png")}
    collate = Collate(build_processor(*parts), tiny_models.TOKENS, "plain")
    ids = [collate.processor.image_token_id] * tiny_models.TOKENS
    assert len(collate.pixels([sample], [ids])) == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120 * 30 - 1)
    with pytest.raises(UserError, match="more than the 3,599 of PIL.Image.MAX_IMAGE_PIXELS"):
        read_photo(tmp_path / "panorama.png")
