"""Folder datasets, and the errors of broken ones."""

import base64
import json
import shutil

import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from json_values import json_values
from PIL import Image

from llava_bidir.common.errors import UserError
from probes.data.folder import FolderDataset


@pytest.fixture
def root(tmp_path):
    return tiny_models.write_segmentation(tmp_path)


def mask_path(root, split="validation"):
    return root / "annotations" / split / "000.png"


# greyscale, 20 x 24 px, label 1 everywhere, as writers that do not scale values make it
PNG_OF_4_BITS = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAABQAAAAYBAAAAAAa0G+rAAAAD0lEQVR4nGMQhAOGkcwEADlAD/F981m/AAAAAElFTkSuQmCC"
)


def facts(**kwargs):
    return json.dumps({"classes": ["a", "b"], **kwargs})


def test_image_and_mask_come_back_as_written(root):
    data = FolderDataset(root, "validation")
    sample = data[0]
    assert len(data) == 5
    assert sample["name"] == "000"
    assert data.classes == tiny_models.CLASSES
    assert sample["image"].mode == "RGB"
    assert sample["target"].dtype == np.uint8
    assert (sample["target"] == np.asarray(Image.open(mask_path(root)))).all()
    assert (sample["target"][0, :2] == 255).all()


def test_reduce_zero_label_ignores_zero_and_shifts_the_rest(root):
    (root / "classes.json").write_text(
        json.dumps({"classes": ["a", "b"], "reduce_zero_label": True})
    )
    raw = np.asarray(Image.open(mask_path(root)))
    target = FolderDataset(root, "validation")[0]["target"]
    assert (target[raw == 0] == 255).all()
    assert (target[raw == 1] == 0).all()
    assert (target[raw == 2] == 1).all()


def test_byte_order_mark_is_let_through(root):
    (root / "classes.json").write_bytes(
        b"\xef\xbb\xbf" + facts(classes=["größe", "b", "c"]).encode()
    )
    assert FolderDataset(root, "validation").classes[0] == "größe"


any_json = json_values(st.integers() | st.floats(), st.text(max_size=4))
any_facts = any_json | st.fixed_dictionaries(
    {"classes": st.lists(st.text(max_size=3), max_size=4) | any_json},
    optional={
        "ignore_index": st.integers(-1, 256) | any_json,
        "reduce_zero_label": st.booleans() | any_json,
        "palette": st.lists(st.lists(st.integers(0, 256), min_size=2, max_size=3), max_size=4)
        | any_json,
    },
)


@given(any_facts)
def test_any_classes_json_is_a_dataset_or_an_error_that_names_it(segmentation, facts):
    before = (segmentation / "classes.json").read_text()
    try:
        (segmentation / "classes.json").write_text(json.dumps(facts))
        data = FolderDataset(segmentation, "validation")
    except ValueError as error:
        assert str(segmentation / "classes.json") in str(error)
    else:
        assert data.classes == facts["classes"]
        assert len(data.palette or data.classes) == len(data.classes)
    finally:
        (segmentation / "classes.json").write_text(before)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-200])


def turned_photo(root, orientation, size=(24, 20)):
    """A JPEG in place of the first image, with an EXIF tag."""
    (root / "images/validation/000.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(
        root / "images/validation/000.jpg", exif=exif
    )


def test_masks_of_less_than_8_bits_are_an_error(root):
    mask_path(root).write_bytes(PNG_OF_4_BITS)
    with pytest.raises(
        ValueError, match=r"000.png has 4 bits per pixel, .* multiples of 17; save it as 8-bit PNG"
    ):
        FolderDataset(root, "validation")[0]


def test_palette_png_is_read_by_index(root):
    mask = np.zeros((24, 20), np.uint8)
    mask[3:] = 2
    image = Image.fromarray(mask).convert("P")
    image.putpalette(sum(([i, 255 - i, 7] for i in range(256)), []))
    image.save(mask_path(root))
    assert set(np.unique(FolderDataset(root, "validation")[0]["target"])) <= {0, 2}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda root: (root / "classes.json").unlink(),
            "classes.json is missing; expected the names of the classes",
        ),
        (lambda root: (root / "classes.json").write_text("{"), "classes.json is not JSON"),
        (
            lambda root: (root / "annotations").rename(root / "masks"),
            "no folder .*annotations/validation",
        ),
        (
            lambda root: mask_path(root).unlink(),
            "1 files have no mask, .*images/validation/000.png",
        ),
        (
            lambda root: (root / "images/validation/000.png").unlink(),
            "have no image, .*annotations/validation/000.png",
        ),
        (
            lambda root: shutil.copy(
                root / "images/validation/000.png", root / "images/validation/000.jpg"
            ),
            "000.jpg and .*000.png have the same name",
        ),
        (lambda root: [p.unlink() for p in root.glob("*/validation/*")], "validation: no images"),
        (
            lambda root: (root / "classes.json").write_text(
                facts(classes=[str(i) for i in range(255)], reduce_zero_label=True)
            ),
            "classes.json has 255 classes; an 8-bit mask allows at most 254",
        ),
        (
            lambda root: (root / "classes.json").write_text('{"classes": ["a"]}'),
            "classes.json has one class, which is",
        ),
    ],
)
def test_missing_parts_are_named_before_any_work(root, break_it, message):
    break_it(root)
    with pytest.raises(ValueError, match=message):
        FolderDataset(root, "validation")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        # a JPEG under the name of a PNG: its labels would be those of a lossy picture
        (
            lambda root: Image.new("L", (20, 24)).save(mask_path(root), "JPEG"),
            "000.png cannot be read as an image: it is not PNG",
        ),
        (
            lambda root: cut_off(root / "images/validation/000.png"),
            "000.png cannot be read as an image: .*truncated",
        ),
        # a mask of the turned picture's size
        (
            lambda root: turned_photo(root, 6, size=(20, 24)),
            r"000.jpg has EXIF orientation 6.*000.png has the size of the",
        ),
        # nothing in the sizes tells what the mask was drawn on
        (
            lambda root: turned_photo(root, 3),
            r"000.jpg has EXIF orientation 3.* may have been drawn on",
        ),
    ],
)
def test_broken_pictures_are_named(root, break_it, message):
    break_it(root)
    with pytest.raises(ValueError, match=message):
        FolderDataset(root, "validation")[0]


def test_photo_whose_mask_fits_only_the_stored_pixels_is_read_as_stored(root):
    turned_photo(root, 6)
    sample = FolderDataset(root, "validation")[0]
    assert sample["image"].size == (20, 24)
    assert sample["target"].shape == (24, 20)


def test_an_image_in_a_folder_below_is_named(root):
    """Beside others it would be left out without a word."""
    below = root / "images/training/city"
    below.mkdir()
    Image.new("RGB", (8, 8)).save(below / "photo.jpg")
    with pytest.raises(UserError, match=r"training/city/photo.jpg is in a folder below"):
        FolderDataset(root, "training")
