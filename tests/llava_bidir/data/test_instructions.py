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


def turns(*texts: str, first: str = "human") -> list[dict]:
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ("{not json", "is not UTF-8 JSON"),
        ({"a": 1}, "expected a list of records, got dict"),
        ([{"id": 1}], r"1 of 1 records .* record 0 \(id '1'\): expected an object with a list 'conversations'"),
        ([record(), "text"], r"1 of 2 records .* record 1 \(id ''\): expected an object"),
        ([record(conversations=[{"from": "human"}])], r"id '7'\): a turn needs text in 'value'"),
        ([record(conversations=[{"from": "bot", "value": "x"}])], r"id '7'\): a turn needs 'from': 'human' or 'gpt'"),
        (
            [record(conversations=turns("q", "a") + turns("b", first="gpt"))],
            "turn 2 is from 'gpt' where 'human' was due",
        ),
        ([record(conversations=[])], "needs at least one human turn"),
        ([record(image=["a.png", "b.png"])], "'image' is the path of one image"),
    ],
)
def test_broken_file_names_file_and_record(records, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        Instructions(write(tmp_path / "data.json", records), tmp_path)
    assert "data.json" in str(error.value)


def test_every_bad_record_is_kept_with_its_problem(tmp_path):
    bad = [{"id": i} if i % 2 else record(id=i) for i in range(8)]
    path = write(tmp_path / "data.json", bad)
    table = read_annotations(path)
    assert [bool(problem) for problem in table["problem"]] == [False, True] * 4
    with pytest.raises(
        ValueError, match="4 of 8 records cannot be trained on. record 1 .*record 3 .*record 5 "
    ) as error:
        Instructions(path, tmp_path)
    assert "record 7" not in str(error.value) and "verify-data" in str(error.value)


@pytest.mark.parametrize(
    ("conversations", "shown", "answers"),
    [
        (turns("<image>\nwhat", ""), 1, 0),
        (turns("hello", "<image> what", "a cat", first="gpt"), 1, 1),
        (turns("<image> and <image>", "two", "<image> again", "three"), 2, 2),
        (turns("what", "a cat"), 0, 1),
    ],
)
def test_what_llava_trains_on_loads(conversations, shown, answers, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    data = Instructions(write(tmp_path / "data.json", [record(conversations=conversations)]), tmp_path)
    assert (data.records["shown"][0], data.records["answers"][0]) == (shown, answers)
    assert (data[0]["image"] is None) == (shown == 0)


def test_tag_without_an_image_is_text(tmp_path):
    data = Instructions(write(tmp_path / "data.json", [record(image=None)]), tmp_path)
    assert data[0]["image"] is None and data.lengths().tolist() == [-4]


def test_summary_counts_without_tokenising(tmp_path):
    records = [
        record(image=None),
        record(conversations=turns("what", "a cat")),
        record(conversations=turns("<image>\nq", "")),
        record(conversations=turns("<image>\nq", "word " * 7)),
    ]
    summary = Instructions(write(tmp_path / "data.json", records), tmp_path).summary(image_tokens=4, max_length=12)
    assert summary.startswith("4 records: 1 text only, 1 with an image that no <image> shows, 1 without an answer")
    assert "at least 1 longer than 12 tokens" in summary


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
