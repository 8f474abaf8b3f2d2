"""Folder datasets, and the errors of broken ones."""

import base64
import json
import shutil

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import json_values
from PIL import Image

from llava_bidir.common.errors import UserError
from probes.data.folder import FolderDataset

MASK = "annotations/validation/000.png"
IMAGE = "images/validation/000.png"
# greyscale, 20 x 24 px, label 1 everywhere, as writers that do not scale values make it
PNG_OF_4_BITS = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAABQAAAAYBAAAAAAa0G+rAAAAD0lEQVR4nGMQhAOGkcwEADlAD/F981m/AAAAAElFTkSuQmCC"
)


@pytest.fixture
def root(tmp_path):
    return tiny_models.write_segmentation(tmp_path)


def write_classes(root, classes, **settings):
    (root / "classes.json").write_text(json.dumps({"classes": classes} | settings))


def test_image_and_mask_come_back_as_written(root):
    data = FolderDataset(root, "validation")
    sample = data[0]
    assert len(data) == 5
    assert sample["name"] == "000"
    assert data.classes == tiny_models.CLASSES
    assert sample["image"].mode == "RGB"
    assert (sample["target"] == np.asarray(Image.open(root / MASK))).all()
    assert (sample["target"][0, :2] == 255).all()


def test_reduce_zero_label_ignores_zero_and_shifts_the_rest(root):
    write_classes(root, ["größe", "b"], reduce_zero_label=True)
    text = (root / "classes.json").read_bytes()
    (root / "classes.json").write_bytes(b"\xef\xbb\xbf" + text)  # a byte order mark
    raw = np.asarray(Image.open(root / MASK))
    data = FolderDataset(root, "validation")
    assert data.classes[0] == "größe"
    assert (data[0]["target"] == np.uint8([255, 0, 1])[np.minimum(raw, 2)])[raw < 3].all()


def test_an_ignored_class_has_no_logit(root):
    """Else a pixel predicted as it would be a class of IoU 0, which no metric that ignores it counts."""
    palette = [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    plain = np.stack([item["target"] for item in FolderDataset(root, "training")])
    write_classes(
        root,
        [*"xyz"],
        ignore_index=[1, 255],
        palette=palette,
    )
    dataset = FolderDataset(root, "training")
    assert dataset.classes == ["x", "z"]
    assert dataset.palette == palette[::2]
    target = np.stack([item["target"] for item in dataset])
    assert ((target == 0) == (plain == 0)).all()
    assert ((target == 1) == (plain == 2)).all()
    assert ((target == 255) == ((plain == 255) | (plain == 1))).all()


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


@settings(max_examples=50)
@given(any_facts)
def test_any_classes_json_is_a_dataset_or_an_error_that_names_it(segmentation, facts):
    before = (segmentation / "classes.json").read_text()
    try:
        (segmentation / "classes.json").write_text(json.dumps(facts))
        data = FolderDataset(segmentation, "validation")
    except ValueError as error:
        assert str(segmentation / "classes.json") in str(error)
    else:
        assert set(data.classes) <= set(facts["classes"])
        assert len(data.palette or data.classes) == len(data.classes)
    finally:
        (segmentation / "classes.json").write_text(before)


def test_photo_whose_mask_fits_only_the_stored_pixels_is_read_as_stored(root):
    turn_photo(root, 6)
    sample = FolderDataset(root, "validation")[0]
    assert sample["image"].size == (20, 24)
    assert sample["target"].shape == (24, 20)


def turn_photo(root, orientation, size=(24, 20)):
    """A JPEG in place of the first image, with an EXIF tag."""
    (root / IMAGE).unlink()
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.fromarray(np.zeros((*size, 3), np.uint8))
    photo.save(root / "images/validation/000.jpg", exif=exif)


def copy_as_jpeg(root):
    shutil.copy(root / IMAGE, root / "images/validation/000.jpg")


MANY = [str(i) for i in range(255)]
MISSING = {  # what breaks a folder: the error before any work
    "classes.json needs to be there": lambda root: (root / "classes.json").unlink(),
    "classes.json: JSONDecodeError": lambda root: (root / "classes.json").write_text("{"),
    "no folder .*annotations/validation": lambda root: shutil.rmtree(root / "annotations"),
    "1 files have no mask, .*images/validation/000.png": lambda root: (root / MASK).unlink(),
    "have no image, .*annotations/validation/000.png": lambda root: (root / IMAGE).unlink(),
    "000.jpg and .*000.png have the same name": copy_as_jpeg,
    "validation: no images": lambda root: [p.unlink() for p in root.glob("*/validation/*")],
    "at most 254 classes": lambda root: write_classes(root, MANY, reduce_zero_label=True),
}


@pytest.mark.parametrize("message", MISSING)
def test_missing_parts_are_named_before_any_work(root, message):
    MISSING[message](root)
    with pytest.raises(UserError, match=message):
        FolderDataset(root, "validation")


BROKEN = {
    # a JPEG under the name of a PNG: its labels would be those of a lossy picture
    "000.png cannot be read as an image: it is not PNG": lambda root: Image.new("L", (20, 24)).save(
        root / MASK, "JPEG"
    ),
    "000.png has 4 bits per pixel; save it as 8-bit PNG": lambda root: (root / MASK).write_bytes(
        PNG_OF_4_BITS
    ),
    # a mask of the turned picture's size
    "000.jpg has EXIF orientation 6.*000.png has the size of the": lambda root: turn_photo(
        root, 6, (20, 24)
    ),
    # nothing in the sizes tells what the mask was drawn on
    "000.jpg has EXIF orientation 3": lambda root: turn_photo(root, 3),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_pictures_are_named(root, message):
    BROKEN[message](root)
    with pytest.raises(UserError, match=message):
        FolderDataset(root, "validation")[0]
