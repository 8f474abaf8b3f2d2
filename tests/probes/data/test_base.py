"""Hostile and broken images and masks give the expected sample, or an error that names the file and its kind."""

import os

import hostile_images
import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from probes.cli import main
from probes.data.base import BadFile
from probes.data.folder import FolderDataset
from probes.data.verify import find_bad_files
from probes.ops.geometry import Geometry


@pytest.fixture
def root(tmp_path):
    """One training and one validation image of the size of the hostile ones."""
    return tiny_models.write_segmentation(tmp_path, 1, 1, size=hostile_images.SIZE[::-1])


def image_of(root, name="000.png"):
    """Where another first image goes, its own one removed."""
    (root / "images/validation/000.png").unlink()
    (root / "annotations/validation/000.png").rename(
        root / f"annotations/validation/{name.rpartition('.')[0]}.png"
    )
    return root / "images/validation" / name


def mask_of(root):
    path = root / "annotations/validation/000.png"
    path.unlink()
    return path


def check_refused(root, path, message):
    """The same error when training meets it as in the preflight."""
    dataset = FolderDataset(root, "validation")
    with pytest.raises(BadFile, match=message) as error:
        dataset[0]
    assert str(path) in str(error.value)
    assert find_bad_files(dataset, "", [0], 0, progress=False) == [
        (error.value.kind, str(error.value))
    ]


@pytest.mark.parametrize("name", ["bomb_below_the_limit_of_pil.png", "text.png"])
@pytest.mark.parametrize("which", [image_of, mask_of])
def test_hostile_file_is_an_error_that_names_it(root, which, name):
    path = which(root)
    path.write_bytes(hostile_images.REJECTED[name][0])
    check_refused(
        root, path, "decompression bomb" if "bomb" in name else "cannot be read as an image"
    )


@pytest.mark.parametrize("name", hostile_images.DEEP)
def test_image_or_mask_of_more_than_8_bits_is_an_error(root, name):
    for which, message in (
        (image_of, "more than 8 bits"),
        (mask_of, "has mode '|cannot be read as an image"),
    ):
        path = which(root)
        path.write_bytes(hostile_images.DEEP[name])
        check_refused(root, path, message)
        hostile_images.noise("L").quantize(2).save(path)


def test_pipe_is_not_read(root):
    path = image_of(root)
    os.mkfifo(path)
    check_refused(root, path, "not a regular file")
    with pytest.raises(SystemExit, match=f"^probes: {path}.*not a regular file"):
        main(["states", "no model is loaded", str(path), "--out", str(root / "states.safetensors")])
    assert not (root / "states.safetensors").exists()


@pytest.mark.parametrize("name", ["cmyk.jpg", "animated.png", "turned.jpg"])
def test_unusual_image_is_read_as_pil_reads_it(root, name):
    path = image_of(root, name)
    path.write_bytes(hostile_images.VALID[name])
    sample = FolderDataset(root, "validation")[0]
    assert (sample["image"].mode, sample["image"].size) == ("RGB", hostile_images.SIZE)
    assert (np.asarray(sample["image"]) == np.asarray(Image.open(path).convert("RGB"))).all()
    assert sample["target"].shape == hostile_images.SIZE[::-1]


def test_picture_of_more_than_8_bits_is_refused_where_it_comes_from_python():
    """PIL would cut it off at 255, which leaves most of it white."""
    place = Geometry(grid=(2, 2), image_px=8, covered_px=8).place
    with pytest.raises(ValueError, match="mode 'I;16', more than 8 bits"):
        place(Image.fromarray(np.full((8, 12), 4000, np.uint16)))
    assert place(hostile_images.noise("CMYK")).mode == "RGB"


whole = [*hostile_images.VALID.values(), *hostile_images.DEEP.values()]
whole += [content for content, _ in hostile_images.REJECTED.values()]
mutation = st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=6))
masks = arrays.arrays(
    np.uint8,
    st.sampled_from([hostile_images.SIZE[::-1], (1, 1), (8, 12, 3), (8, 12, 4)]),
    elements=st.sampled_from([0, 1, 2]) | st.sampled_from([0, 1, 3, 254, 255]),
    fill=st.sampled_from([0, 1, 2, 255]),
)


@given(
    st.sampled_from(["images", "annotations"]),
    st.binary(max_size=100) | st.sampled_from(whole),
    st.lists(mutation),
)
def test_any_bytes_are_a_sample_or_an_error_that_names_the_file(
    segmentation_of_one, kind, content, changes
):
    for place, new in changes:
        place %= max(len(content), 1)
        content = content[:place] + new + content[place + len(new) :]
    check_any(segmentation_of_one, kind, content)


@given(masks, st.sampled_from([np.uint8, np.uint16, np.bool_]))
def test_any_small_array_is_a_mask_or_an_error_that_names_the_file(
    segmentation_of_one, array, dtype
):
    if array.ndim == 2:
        array = array.astype(dtype)
    target = check_any(
        segmentation_of_one, "annotations", hostile_images.encoded(Image.fromarray(array), "PNG")
    )
    fits = (
        array.dtype == np.uint8
        and array.shape == hostile_images.SIZE[::-1]
        and set(np.unique(array)) <= {0, 1, 2, 255}
    )
    assert (target is not None) == fits
    assert not fits or (target == array).all()


@pytest.fixture(scope="module")
def segmentation_of_one(tmp_path_factory):
    return tiny_models.write_segmentation(
        tmp_path_factory.mktemp("one"), 1, 1, size=hostile_images.SIZE[::-1]
    )


def check_any(root, kind, content):
    """The target, if one is read."""
    path = root / kind / "validation/000.png"
    before = path.read_bytes()
    try:
        path.write_bytes(content)
        sample = FolderDataset(root, "validation")[0]
    except BadFile as error:
        assert str(path) in str(error)
        assert error.kind
    else:
        height, width = sample["target"].shape
        assert (sample["image"].mode, sample["image"].size) == ("RGB", (width, height))
        assert sample["target"].dtype == np.uint8
        assert set(np.unique(sample["target"])) <= {0, 1, 2, 255}
        return sample["target"]
    finally:
        path.write_bytes(before)
