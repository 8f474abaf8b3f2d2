"""Any bytes and arrays are a sample, or an error that names the file (tests/test_hostile_images.py has more)."""

import hostile_images
import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from probes.data.base import BadFile
from probes.data.folder import FolderDataset

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
    segmentation_of_one,
    kind,
    content,
    changes,
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
