"""`llava-bidir verify-data`: each kind of finding, a clean file, the exit status, and what is shown."""

import json
from pathlib import Path

import pytest
import tiny_models
from PIL import Image
from tiny_models import turns

import llava_bidir.cli

FINE = {"image": "a.png", "conversations": turns("<image>\nname", "wall")}
TWICE = turns("name", "sky") + turns("<image>\nname", "wall")
RECORDS = {
    "fine": FINE,
    "text": {"conversations": turns("name", "wall")},
    "our words are text": {"conversations": turns("name", "the <pad>")},
    "a long question is cut": {"conversations": turns("name", "sky", "name " * 120)},
    "broken: an answer is seen": {"image": "a.png", "conversations": TWICE},
    "broken: image is missing": FINE | {"image": "none.png"},
    "broken: image is none": FINE | {"image": "no.png"},
    "broken: image is cut": FINE | {"image": "cut.jpg"},
    "truncated": {"conversations": turns("name", "wall " * 120)},
    "truncated by a question": {"conversations": turns("name " * 120, "wall")},
    "not_shown: another key": {"images": ["a.png"], "conversations": turns("<image>\n", "wall")},
    "not_shown: no key": {"conversations": turns("<Image>\nname", "wall")},
    "not_shown: no <image>": {"image": "none.png", "conversations": turns("name", "wall")},
}
RECORDS |= {
    "empty": {"image": "a.png", "conversations": turns("<image>\nname", "")},
    "empty: one of two is white space": {"conversations": turns("name", "sky", "and", " \n")},
    "empty: a question alone": {"conversations": turns("name")},
    "special_token": {"conversations": turns("name", "sky </s> wall")},
}
FOUND = {id_: id_.partition(" ")[0].strip(":") for id_ in [*RECORDS][4:]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    Image.new("RGB", (9, 7), "red").save(root / "a.png")
    (root / "no.png").write_bytes(b"no image")
    Image.effect_noise((64, 64), 90).convert("RGB").save(root / "cut.jpg")
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:1200])
    records = [{"id": name, **record} for name, record in RECORDS.items()]
    (root / "data.json").write_text(json.dumps(records))
    return root


def run(parts, folder, capsys, more: str) -> tuple[int, str]:
    """Return the exit status of the command and what it prints."""
    words = "--data.val_annotations null --data.max_length 100 --model.image_attention prefix"
    words = [*tiny_models.training_arguments(parts, folder), *words.split(), *more.split()]
    try:
        llava_bidir.cli.main(["verify-data", *words])
    except SystemExit as stop:
        return stop.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


def test_command_lists_everything_and_fails(folder, parts, capsys):
    """On a machine without the GPUs of the config."""
    more = "--trainer.devices 8 --trainer.accelerator gpu --trainer.precision bf16-mixed"
    status, text = run(
        parts, folder=folder, capsys=capsys, more=f"--json --data.num_workers 2 {more}"
    )
    (file,) = json.loads(text)["files"]
    assert status == 1
    assert file["records"] == len(RECORDS)
    findings = [(finding["index"], finding["id"], finding["kind"]) for finding in file["findings"]]
    assert findings == [(index, *finding) for index, finding in enumerate(FOUND.items(), 4)]
    (detail,) = [x["detail"] for x in file["findings"] if x["id"] == "truncated"]
    cut, _, total, _ = detail.split()
    assert int(cut) == int(total) - 100, "the answer goes on to the end"


@pytest.mark.parametrize("count", [0, 2])
def test_a_clean_file_is_status_0(count, parts, tmp_path, capsys):
    """In validation, the first answer must have text."""
    records = [{"id": "fine", "conversations": turns("name", "wall")}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    records = [{"id": "fine", "conversations": turns("and", "wall")}]
    records += [{"id": f"{i}", "conversations": turns("name", " ", "and")} for i in range(count)]
    (tmp_path / "val.json").write_text(json.dumps(records))
    status, text = run(
        parts, folder=tmp_path, capsys=capsys, more=f"--data.val_annotations {tmp_path}/val.json"
    )
    assert status == bool(count)
    assert "1 records, 0 findings" in text
    assert f"{count + 1:,} records, {count} findings" in text
    assert text.count("  broken: record ") == count


def test_what_is_trained_and_asked_is_found_by_content(parts, tmp_path, capsys):
    """Answers were counted as right that the model had been trained on."""
    names = {"a.png": "red", "b.png": "red", "c.png": "blue", "d.png": "green", "e.png": "red"}
    for name, colour in names.items():
        Image.new("RGB", (9, 7), colour).save(tmp_path / name)
    Image.new("RGB", (90, 70), "red").save(tmp_path / "e.png")

    def write(file: str, question: str, *images: str) -> None:
        records = [{"image": image, "conversations": turns("<image>", "sky")} for image in images]
        records += [{"conversations": turns(text, "sky")} for text in ("both", question)]
        (tmp_path / file).write_text(json.dumps(records))

    write("data.json", "trained", "a.png", "c.png")
    write("val.json", "asked", "b.png", "c.png", "d.png", "e.png")
    more = f"--json --data.val_annotations {tmp_path}/val.json"
    status, text = run(parts, folder=tmp_path, capsys=capsys, more=more)
    trained, asked = json.loads(text)["files"]
    findings = [(x["index"], x["kind"], x["detail"]) for x in asked["findings"]]
    kind = "in_training"
    assert findings == [(0, kind, "b.png"), (1, kind, "c.png"), (4, kind, "its text")]
    assert (status, trained["findings"]) == (1, [])


def test_what_is_fed_is_shown(parts, conversations, capsys):
    _, text = run(parts, folder=conversations, capsys=capsys, more="--json --show 0 11")
    picture, text = map(json.loads, text.splitlines())
    assert (picture["id"], picture["template"]) == ("r0", "vicuna_v1")
    ((start, end),) = picture["image_spans"]
    assert end - start == tiny_models.TOKENS
    assert len(set(picture["input_ids"][start:end])) == 1
    assert len(picture["labels"]) == len(picture["input_ids"])
    assert [shown["text"].count("<image>") for shown in (picture, text)] == [1, 0]
    assert text["image_spans"] == []
    _, text = run(parts, folder=conversations, capsys=capsys, more="--show 0")
    assert "trained [wall</s>]" in text and "<4 image tokens>" in text
    rows = [line.split()[2:] for line in text.splitlines()[-3:]]
    assert rows == [["#", "#", "."], ["#", "#", "."], ["#", "#", "\\"]], "a prefix, then causal"
    status, _ = run(parts, folder=conversations, capsys=capsys, more="--show 12")
    assert "--show 12: " in status and " has records 0..11" in status
