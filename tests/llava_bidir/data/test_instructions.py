"""LLaVA's JSON: what is read, and what a broken file or image answers."""

import json

import pytest
from PIL import Image

from llava_bidir.data.instructions import Instructions, read_annotations


def write(path, records) -> str:
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return str(path)


def record(**kwargs) -> dict:
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "a cat"}]
    return {"id": 7, "image": "a.png", "conversations": turns} | kwargs


def test_records_come_back_as_written(conversations):
    data = Instructions(conversations / "data.json", conversations)
    sample = data[0]
    assert len(data) == 12 and sample["id"] == "r0" and sample["image"].size == (14, 10)
    assert sample["conversations"] == json.loads((conversations / "data.json").read_text())[0]["conversations"]
    assert data[11]["image"] is None


def test_lengths_count_words_and_mark_text_only(conversations):
    lengths = Instructions(conversations / "data.json", conversations).lengths()
    assert lengths[0] == 5 and [n < 0 for n in lengths] == [False] * 10 + [True] * 2  # "<image> name the sky" + "wall"


def test_edited_file_is_read_again(tmp_path):
    path = write(tmp_path / "data.json", [record()])
    assert len(read_annotations(path)) == 1
    write(tmp_path / "data.json", [record(), record(id=8)])
    assert len(read_annotations(path)) == 2


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ("{not json", "is not UTF-8 JSON"),
        ({"a": 1}, "expected a list of records, got dict"),
        ([{"id": 1}], "record 0: expected an object with a list 'conversations'"),
        ([record(conversations=[{"from": "human"}])], r"id 7\): each turn needs"),
        ([record(image=None)], "it has <image> but no 'image'"),
        ([record(conversations=[{"from": "human", "value": "hi"}])], "it has image 'a.png' but no <image>"),
    ],
)
def test_broken_file_names_file_and_record(records, message, tmp_path):
    with pytest.raises(Exception, match=message) as error:
        read_annotations(write(tmp_path / "data.json", records))
    assert "data.json" in str(error.value)


def test_missing_file_folder_and_image_are_named(tmp_path):
    with pytest.raises(ValueError, match="data.annotations: no file"):
        read_annotations(tmp_path / "none.json")
    path = write(tmp_path / "data.json", [record()])
    with pytest.raises(ValueError, match="data.images: no folder"):
        Instructions(path, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="record '7': image .*a.png is missing"):
        Instructions(path, tmp_path)[0]


def test_corrupt_image_is_named(tmp_path):
    path = write(tmp_path / "data.json", [record()])
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="record '7': image .*a.png cannot be read"):
        Instructions(path, tmp_path)[0]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="record '7': image .*a.png cannot be read"):
        Instructions(path, tmp_path)[0]
