"""Photos and texts as arguments: paths, images and lists, turned as viewers show them; no text letter by letter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import probes
from llava_bidir.common.errors import UserError
from llava_bidir.common.images import read_image
from probes.analyses.routes.questions import read_question_image
from probes.lab.photos import Photos


@pytest.fixture(scope="module")
def mllm(checkpoints):
    return probes.load(str(checkpoints["bidirectional"]))


@pytest.fixture(scope="module")
def turned(tmp_path_factory) -> Path:
    """A photo that is wider as stored, and higher as viewers show it."""
    file = tmp_path_factory.mktemp("photos") / "turned.png"
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(file, exif=exif)
    return file


def test_a_photo_is_a_path_an_image_or_a_list_of_these(mllm, turned):
    upright = ImageOps.exif_transpose(Image.open(turned))
    assert upright.size == (20, 30)
    expected = mllm.geometry.place(upright.convert("RGB"))
    pixels = mllm.image_processors[0]([expected], return_tensors="pt")["pixel_values"]
    for given in (str(turned), Image.open(turned), upright, (turned,)):
        assert torch.equal(mllm.preprocess(given), pixels)
    two = mllm.preprocess([upright, str(turned)])
    assert torch.equal(two, torch.cat([pixels, pixels]))
    alone = mllm.answer(upright, "wall", max_new_tokens=4)
    assert mllm.answer([turned, Image.open(turned)], "wall", max_new_tokens=4) == [alone, alone]


def test_an_uploaded_photo_of_the_lab_is_turned(mllm, turned):
    photos = Photos([mllm.geometry])
    photo = photos.get(photos.add(turned.read_bytes(), "x.png"))
    assert photo.size == (20, 30)
    again = mllm.preprocess(photo.squares[0])
    assert torch.equal(again, mllm.preprocess(turned)), "a square is not turned again"


def test_images_of_data_sets_are_read_as_stored_and_never_turned_later(mllm, turned):
    stored = np.asarray(Image.open(turned))
    image = read_image(turned)
    assert np.array_equal(np.asarray(image), stored)
    assert torch.equal(mllm.preprocess(image), mllm.preprocess(Image.fromarray(stored)))


def test_boxes_on_a_photo_with_an_orientation_are_ambiguous(turned):
    with pytest.raises(UserError, match="turned.png has EXIF orientation 6, so that its boxes"):
        read_question_image(turned.parent, turned.name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.answer("photo.jpg", "wall"), "photo.jpg cannot be read as an image"),
        (lambda m: m.preprocess(np.zeros((8, 8, 3), np.uint8)), "ndarray"),
        (lambda m: m.states(torch.zeros(1, 3, 8, 8), "adapter"), "sites must be a list of names"),
    ],
)
def test_arguments_of_other_types_are_errors(call, message, mllm):
    with pytest.raises(UserError, match=message):
        call(mllm)
