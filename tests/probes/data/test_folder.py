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
from probes.data.image_dataset import palette_of

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
    write_classes(root, [*"xyz"], ignore_index=[1, 255], palette=palette)
    dataset = FolderDataset(root, "training")
    assert dataset.classes == ["x", "z"]
    assert dataset.palette == palette[::2]
    assert palette_of(dataset).tolist() == palette[::2]
    target = np.stack([item["target"] for item in dataset])
    assert ((target == 0) == (plain == 0)).all()
    assert ((target == 1) == (plain == 2)).all()
    assert ((target == 255) == ((plain == 255) | (plain == 1))).all()


@pytest.mark.parametrize("key", ["ignore_label", "ignore-index", "reduce_zero_labels", "Palette"])
def test_an_unknown_key_of_classes_json_is_named_with_the_one_that_is_meant(root, key):
    """Else `void` would be a class, of which a probe is right or wrong."""
    write_classes(root, [*"abc"], **{key: 0})
    meant = {"i": "ignore_index", "r": "reduce_zero_label", "P": "palette"}[key[0]]
    with pytest.raises(UserError, match=f"classes.json has the key '{key}'.* mean '{meant}'"):
        FolderDataset(root, "validation")


any_json = json_values(st.integers() | st.floats(), st.text(max_size=4))
any_facts = any_json | st.fixed_dictionaries(
    {"classes": st.lists(st.text(max_size=3), max_size=4) | any_json},
    optional={
        "ignore_index": st.integers(-1, 65_536) | any_json,
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


def put(name, kind="images"):
    """Return what writes a file of this name into a split, beside files that systems leave there."""

    def write(root):
        for file in (".DS_Store", "._000.png", "Thumbs.db", name):
            path = root / kind / "validation" / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"?")

    return write


def copy_as_jpeg(root):
    shutil.copy(root / IMAGE, root / "images/validation/000.jpg")


MANY = [str(i) for i in range(32_767)]
MISSING = {  # what breaks a folder: the error before any work
    "classes.json needs to be there": lambda root: (root / "classes.json").unlink(),
    "classes.json: JSONDecodeError": lambda root: (root / "classes.json").write_text("{"),
    "lacks .*annotations/validation": lambda root: shutil.rmtree(root / "annotations"),
    "1 files have no mask, .*images/validation/000.png": lambda root: (root / MASK).unlink(),
    "have no image, .*annotations/validation/000.png": lambda root: (root / IMAGE).unlink(),
    "000.jpg and .*000.png have the same name": copy_as_jpeg,
    "validation: no images": lambda root: [p.unlink() for p in root.glob("*/validation/*")],
    # what would be left out without a word
    "validation/city would not be read, one of 1: expected .*.tif": put("city/photo.png"),
    "images/validation/photo.heic would not be read": put("photo.heic"),
    "annotations/validation/photo.tif would not be read.* expected .png": put(
        "photo.tif", "annotations"
    ),
    "at most 32766 classes": lambda root: write_classes(root, MANY),
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


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".tiff", ".webp"])
def test_images_of_other_formats_are_read_beside_what_systems_write(root, suffix):
    put(".hidden")(root)
    image = Image.open(root / IMAGE)
    (root / IMAGE).unlink()
    image.save((root / IMAGE).with_suffix(suffix), lossless=True)
    assert (np.asarray(FolderDataset(root, "validation")[0]["image"]) == np.asarray(image)).all()


def test_a_turned_tiff_is_no_upright_one(root):
    """Pillow turns it while it decodes it, so that a mask of the stored pixels would be upside down."""
    exif = Image.Exif()
    exif[0x0112] = 3
    image = Image.open(root / IMAGE)
    (root / IMAGE).unlink()
    image.save((root / IMAGE).with_suffix(".tif"), exif=exif)
    with pytest.raises(UserError, match="000.tif has EXIF orientation 3"):
        FolderDataset(root, "validation")[0]


@pytest.mark.parametrize("message", BROKEN)
def test_broken_pictures_are_named(root, message):
    BROKEN[message](root)
    with pytest.raises(UserError, match=message):
        FolderDataset(root, "validation")[0]
