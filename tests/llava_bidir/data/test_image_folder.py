"""Hostile and broken images: each is read as it is meant, or an error names record and file, before and in training."""

import json
import os
import resource
import time

import hostile_images
import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_bidir.commands.generate import generate
from llava_bidir.commands.verify_data import Checks
from llava_bidir.data.collate import Collate
from llava_bidir.data.image_folder import BadImage, ImageFolder, read_format, read_image
from llava_bidir.data.instruction_dataset import Instructions, read_annotations
from llava_bidir.model.build import build_processor


@pytest.fixture
def ask(parts, tmp_path):
    """What verify-data finds about an image, with decoding, and what training answers: an image or an error."""

    def asked(name: str, **kwargs):
        turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
        (tmp_path / "data.json").write_text(json.dumps([{"id": "r", "image": name, "conversations": turns}]))
        records = read_annotations(tmp_path / "data.json")
        collate = Collate(build_processor(*parts), tiny_models.TOKENS, "vicuna_v1")
        findings = Checks(records, ImageFolder(tmp_path, **kwargs), collate, decode=True).check(records[0])
        try:
            return findings, Instructions(tmp_path / "data.json", tmp_path, **kwargs)[0]["image"]
        except ValueError as error:
            return findings, error

    return asked


def check_refused(ask, path, kind, message):
    findings, error = ask(path.name)
    assert [found for found, _ in findings] == [kind] and str(path) in findings[0][1]
    assert type(error) is ValueError, "what the command line shows in one line, from a worker too"
    assert str(error) == f"record 0 (id 'r'): {findings[0][1]}"
    with pytest.raises(ValueError, match=message):
        raise error
    with pytest.raises(ValueError, match=message):
        generate("no model is looked for", path, ["what"])


@pytest.mark.parametrize("name", hostile_images.REFUSED)
def test_hostile_files_are_refused_with_record_and_file(ask, tmp_path, name):
    content, message = hostile_images.REFUSED[name]
    (tmp_path / name).write_bytes(content)
    check_refused(ask, tmp_path / name, "corrupt", message)


@pytest.mark.parametrize("name", hostile_images.NO_FILES)
def test_what_is_no_file_is_neither_waited_for_nor_read(ask, tmp_path, name):
    make, message = hostile_images.NO_FILES[name]
    make(tmp_path / name)
    if name == "device.jpg":
        assert ask(name)[0][0][0] == "outside"
        with pytest.raises(BadImage, match=message):
            read_image(tmp_path / name)
    else:
        check_refused(ask, tmp_path / name, "corrupt", message)


@pytest.mark.parametrize("name", hostile_images.READ)
def test_odd_pictures_are_read_as_pil_shows_them(ask, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(hostile_images.READ[name])
    findings, image = ask(name)
    assert [kind for kind, _ in findings] == (["renamed"] if name == "gif_called.jpg" else [])
    assert (image.mode, image.size) == ("RGB", hostile_images.SIZE)
    assert (np.asarray(image) == np.asarray(Image.open(path).convert("RGB"))).all() and np.asarray(image).std() > 10


def test_bomb_takes_no_memory_and_no_time(tmp_path):
    (tmp_path / "bomb.png").write_bytes(hostile_images.png(12_000, 12_000, colour=2))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for read in (read_image, read_format):
        with pytest.raises(BadImage, match="decompression bomb"):
            read(tmp_path / "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "KiB, of which its pixels take 562,500"
    assert time.perf_counter() - start < 5


def test_file_that_may_not_be_read_is_named(ask, tmp_path):
    hostile_images.noise().save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    if os.access(tmp_path / "a.png", os.R_OK):
        pytest.skip("this user may read everything")
    check_refused(ask, tmp_path / "a.png", "corrupt", "Permission denied")


def test_names_too_long_for_the_file_system_are_named(ask, tmp_path):
    check_refused(ask, tmp_path / ("x" * 300 + ".png"), "corrupt", "too long")


@pytest.fixture
def elsewhere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    hostile_images.noise().save(folder / "private.png")
    return folder


def test_links_out_of_the_folder_are_refused_unless_wanted(ask, tmp_path, elsewhere):
    (tmp_path / "file.png").symlink_to(elsewhere / "private.png")
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/train2017").symlink_to(elsewhere)
    (tmp_path / "first").symlink_to(tmp_path / "coco")
    for name in ("file.png", "coco/train2017/private.png", "first/train2017/private.png"):
        findings, error = ask(name)
        assert [kind for kind, _ in findings] == ["outside"]
        assert str(error).startswith(f"record 0 (id 'r'): image {tmp_path / name} is behind a symlink out of data.imag")
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


@given(st.binary(max_size=200))
def test_any_bytes_are_a_picture_or_an_error_that_names_the_file(tmp_path_factory, content):
    check_any(tmp_path_factory.getbasetemp() / "any_bytes.png", content)


whole = [
    *hostile_images.READ.values(),
    *(hostile_images.encoded(hostile_images.noise(), name) for name in ("BMP", "TIFF", "WEBP", "JPEG")),
]
mutation = st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=6), st.booleans())


@given(st.sampled_from(whole), st.lists(mutation, min_size=1, max_size=4), st.none() | st.integers(0, 2**16))
def test_any_change_of_a_picture_is_a_picture_or_an_error_that_names_the_file(tmp_path_factory, content, changes, end):
    for place, new, insert in changes:
        place %= len(content)
        content = content[:place] + new + content[place + (0 if insert else len(new)) :]
    check_any(tmp_path_factory.getbasetemp() / "any_change.png", content[:end])


def check_any(path, content):
    path.write_bytes(content)
    try:
        image = read_image(path)
    except BadImage as error:
        assert str(error).startswith(f"image {path} cannot be read: ") and not str(error).endswith(": ")
    else:
        assert image.mode == "RGB" and max(image.size) ** 2 <= Image.MAX_IMAGE_PIXELS
