"""Images of records: hostile files are errors that name record and file, in verify-data and in training."""

import json
import os

import hostile_images
import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_bidir.commands.generate import generate
from llava_bidir.commands.verify_data import RecordFindings
from llava_bidir.common.errors import UserError
from llava_bidir.data.collate import Collate
from llava_bidir.data.image_folder import BadImage, ImageFolder, read_image
from llava_bidir.data.instruction_dataset import Instructions, read_annotations
from llava_bidir.model.build import build_processor


@pytest.fixture
def ask(parts, tmp_path):
    """A function from an image's name to its findings in verify-data, and to the image or error in training."""

    def asked(name: str, **kwargs):
        record = {"id": "r", "image": name, "conversations": tiny_models.turns("<image>\nq", "a")}
        (tmp_path / "data.json").write_text(json.dumps([record]))
        records = read_annotations(tmp_path / "data.json")
        collate = Collate(build_processor(*parts), tiny_models.TOKENS, "vicuna_v1")
        findings = RecordFindings(
            records, ImageFolder(tmp_path, **kwargs), collate, decode=True
        ).check(records[0])
        try:
            return findings, Instructions(tmp_path / "data.json", tmp_path, **kwargs)[0]["image"]
        except ValueError as error:
            return findings, error

    return asked


def check_rejected(ask, path, kind, message):
    findings, error = ask(path.name)
    assert [found for found, _ in findings] == [kind] and str(path) in findings[0][1]
    assert type(error) is UserError, "the command line shows it in one line, also from a worker"
    assert str(error) == f"record 0 (id 'r'): {findings[0][1]}"
    with pytest.raises(ValueError, match=message):
        raise error
    with pytest.raises(ValueError, match=message):
        generate("no model is looked for", [path], ["what"])


@pytest.mark.parametrize(
    "name", ["bomb_below_the_limit_of_pil.png", "page.jpg", "pipe.jpg", *hostile_images.DEEP]
)
def test_hostile_image_is_an_error_with_record_and_file(ask, tmp_path, name):
    if name == "pipe.jpg":
        os.mkfifo(tmp_path / name)
    else:
        content = hostile_images.DEEP.get(name) or hostile_images.REJECTED[name][0]
        (tmp_path / name).write_bytes(content)
    messages = {"page.jpg": "it is not one of BMP, GIF", "pipe.jpg": "not a regular file"}
    messages["bomb_below_the_limit_of_pil.png"] = "decompression bomb"
    check_rejected(ask, tmp_path / name, "corrupt", messages.get(name, "more than 8 bits"))


@pytest.mark.parametrize("name", ["cmyk.jpg", "gif_called.jpg", "turned.jpg", "x" * 240 + ".png"])
def test_unusual_image_is_read_as_pil_reads_it(ask, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(hostile_images.VALID[name])
    findings, image = ask(name)
    expected = {"gif_called.jpg": ["renamed"], "turned.jpg": ["rotated"]}.get(name, [])
    assert [kind for kind, _ in findings] == expected
    assert (image.mode, image.size) == ("RGB", hostile_images.SIZE)
    assert (np.asarray(image) == np.asarray(Image.open(path).convert("RGB"))).all() and np.asarray(
        image
    ).std() > 10


@pytest.fixture
def elsewhere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    hostile_images.noise().save(folder / "private.png")
    return folder


def test_links_out_of_the_folder_are_errors_unless_allowed(ask, tmp_path, elsewhere):
    (tmp_path / "file.png").symlink_to(elsewhere / "private.png")
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/train2017").symlink_to(elsewhere)
    (tmp_path / "first").symlink_to(tmp_path / "coco")
    for name in ("file.png", "coco/train2017/private.png", "first/train2017/private.png"):
        findings, error = ask(name)
        assert [kind for kind, _ in findings] == ["outside"]
        assert str(error).startswith(
            f"record 0 (id 'r'): image {tmp_path / name} is outside data.images: a symlink"
        )
        assert str(elsewhere / "private.png") in str(error) and "data.follow_links" in str(error)
        findings, image = ask(name, follow_links=True)
        assert findings == [] and image.size == hostile_images.SIZE


def test_links_within_the_folder_and_to_the_folder_are_followed(ask, tmp_path):
    (tmp_path / "real/blobs").mkdir(parents=True)
    hostile_images.noise().save(tmp_path / "real/blobs/0.png")
    (tmp_path / "real/a.png").symlink_to("blobs/0.png")
    (tmp_path / "real/photos").symlink_to("blobs")
    (tmp_path / "link").symlink_to("real")
    for folder in (tmp_path / "real", tmp_path / "link"):
        for name in ("a.png", "photos/0.png", "./blobs//0.png"):
            assert read_image(ImageFolder(folder).file(name)).size == hostile_images.SIZE


valid = [
    *hostile_images.VALID.values(),
    *(
        hostile_images.encoded(hostile_images.noise(), name)
        for name in ("BMP", "TIFF", "WEBP", "JPEG")
    ),
]
mutation = st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=6), st.booleans())


@given(
    st.sampled_from(valid),
    st.lists(mutation, min_size=1, max_size=4),
    st.none() | st.integers(0, 2**16),
)
def test_any_change_of_an_image_is_an_image_or_an_error_that_names_the_file(
    tmp_path_factory, content, changes, end
):
    for place, new, insert in changes:
        place %= len(content)
        content = content[:place] + new + content[place + (0 if insert else len(new)) :]
    check_any(tmp_path_factory.getbasetemp() / "any_change.png", content[:end])


def check_any(path, content):
    path.write_bytes(content)
    try:
        image = read_image(path)
    except BadImage as error:
        assert str(error).startswith(f"image {path} cannot be read: ") and not str(error).endswith(
            ": "
        )
    else:
        assert image.mode == "RGB" and max(image.size) ** 2 <= Image.MAX_IMAGE_PIXELS
