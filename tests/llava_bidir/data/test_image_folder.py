"""Images of records stay within their folder (tests/test_hostile_images.py has hostile files)."""

import json
import unicodedata

import hostile_images
import pytest
import tiny_models

from llava_bidir.commands.verify_data import RecordFindings
from llava_bidir.data.collate import Collate
from llava_bidir.data.image_folder import BadImage, ImageFolder, read_image
from llava_bidir.data.instruction_dataset import Instructions, read_annotations
from llava_bidir.model.build import build_processor


@pytest.fixture
def ask(parts, tmp_path):
    """A function from an image's name to its findings in verify-data, and to the image or error in training."""

    def asked(name: str, **kwargs):
        record = {
            "id": "r",
            "image": name,
            "conversations": tiny_models.turns("<image>\nq", "a"),
        }
        (tmp_path / "data.json").write_text(json.dumps([record]))
        records = read_annotations(tmp_path / "data.json")
        collate = Collate(build_processor(*parts), tiny_models.TOKENS, "vicuna_v1")
        findings = RecordFindings(records, ImageFolder(tmp_path, **kwargs), collate)[0]
        try:
            return findings, Instructions(tmp_path / "data.json", tmp_path, **kwargs)[0]["image"]
        except ValueError as error:
            return findings, error

    return asked


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
        assert [finding["kind"] for finding in findings] == ["image"]
        assert str(error).startswith(
            f"record 0 (id 'r'): image {tmp_path / name} is outside data.images: a symlink"
        )
        assert str(elsewhere / "private.png") in str(error)
        assert "data.follow_links" in str(error)
        findings, image = ask(name, follow_links=True)
        assert findings == []
        assert image.size == hostile_images.SIZE


def test_links_within_the_folder_and_to_the_folder_are_followed(ask, tmp_path):
    (tmp_path / "real/blobs").mkdir(parents=True)
    hostile_images.noise().save(tmp_path / "real/blobs/0.png")
    (tmp_path / "real/a.png").symlink_to("blobs/0.png")
    (tmp_path / "real/photos").symlink_to("blobs")
    (tmp_path / "link").symlink_to("real")
    for folder in (tmp_path / "real", tmp_path / "link"):
        for name in ("a.png", "photos/0.png", "./blobs//0.png"):
            assert read_image(ImageFolder(folder).file(name)).size == hostile_images.SIZE


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_whose_accents_are_stored_otherwise_is_found(forms, tmp_path):
    stored, asked = (unicodedata.normalize(form, "\u00e9t\u00e9/caf\u00e9.png") for form in forms)
    (tmp_path / stored).parent.mkdir()
    hostile_images.noise().save(tmp_path / stored)
    assert read_image(ImageFolder(tmp_path).file(asked)).size == hostile_images.SIZE
    with pytest.raises(BadImage, match="tee.png is missing"):
        read_image(ImageFolder(tmp_path).file("tee.png"))
