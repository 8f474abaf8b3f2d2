"""`llava-bidir verify-data`: each kind of finding, a clean file, and the exit status."""

import json
from pathlib import Path

import llama_tokenizers
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import turns

import llava_bidir.cli
from llava_bidir.commands.verify_data import KINDS, RecordFindings, find_problems
from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import encode, token_upper_bound
from llava_bidir.data.image_folder import ImageFolder
from llava_bidir.data.instruction_dataset import read_annotations
from llava_bidir.model.build import build_processor

RECORDS = {
    "fine": {"image": "a.png", "conversations": turns("<image>\nname", "wall")},
    "text": {"conversations": turns("name", "wall")},
    "broken": {"conversations": turns("name", "wall") + turns("a")[:1] + turns("b")},
    "missing": {"image": "none.png", "conversations": turns("<image>\nname", "wall")},
    "corrupt": {"image": "no.png", "conversations": turns("<image>\nname", "wall")},
    "outside": {"image": "link.png", "conversations": turns("<image>\nname", "wall")},
    "renamed": {"image": "gif.jpg", "conversations": turns("<image>\nname", "wall")},
    "too_long": {"conversations": turns("name", "wall " * 120)},
    "unsupervised": {"image": "a.png", "conversations": turns("<image>\nname", "")},
    "image_after_answer": {
        "image": "a.png",
        "conversations": turns("name", "sky") + turns("<image>\nname", "wall"),
    },
    "unread_image": {"images": ["a.png"], "conversations": turns("<image>\nname", "wall")},
    "placeholder_without_image": {"conversations": turns("<Image>\nname", "wall")},
    "image_without_placeholder": {"image": "a.png", "conversations": turns("<Image>\n", "wall")},
    "lost_characters": {
        "image": "a.png",
        "conversations": turns("<image>\nname", "road \ud83d wall"),
    },
    "image_in_answer": {
        "image": "a.png",
        "conversations": turns("<image>\nname", "The tag <image> is HTML."),
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    Image.new("RGB", (9, 7), "red").save(root / "a.png")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "b.png"
    Image.new("RGB", (9, 7), "red").save(elsewhere)
    (root / "link.png").symlink_to(elsewhere)
    Image.new("RGB", (9, 7), "red").save(root / "gif.jpg", format="GIF")
    (root / "no.png").write_bytes(b"no image")
    (root / "data.json").write_text(
        json.dumps([{"id": name, **record} for name, record in RECORDS.items()])
    )
    return root


def findings(
    folder,
    parts,
    template="vicuna_v1",
    decode=False,
    name="data.json",
    is_validation=False,
) -> list[dict]:
    collate = Collate(build_processor(*parts), tiny_models.TOKENS, template, max_length=100)
    records = RecordFindings(
        read_annotations(folder / name),
        ImageFolder(folder),
        collate,
        decode,
        "prefix",
        is_validation,
    )
    return find_problems(records, 0)


def kinds(*args, **kwargs) -> dict[str, list[str]]:
    by_id = {}
    for finding in findings(*args, **kwargs):
        by_id.setdefault(finding["id"], []).append(finding["kind"])
    return by_id


def test_each_kind_is_found_at_its_record_and_nothing_else(folder, parts):
    of_training = set(KINDS) - {"unanswered"}
    assert of_training == set(RECORDS) - {"fine", "text"}
    assert kinds(folder, parts) == {kind: [kind] for kind in of_training}


def test_questions_need_their_first_answer(folder, parts):
    """A later one is not compared."""
    records = {
        "fine": turns("name", "wall"),
        "empty": turns("name", ""),
        "later": turns("name", "", "and", "wall"),
    }
    rows = [{"id": key, "conversations": value} for key, value in records.items()]
    (folder / "questions.json").write_text(json.dumps(rows))
    found = kinds(folder, parts, name="questions.json", is_validation=True)
    assert found == {"empty": ["unanswered"], "later": ["unanswered"]}


def test_template_plain_supervises_a_newline_and_requires_an_image(folder, parts):
    found = kinds(folder, parts, "plain")
    assert "unsupervised" not in found
    assert "fine" not in found
    assert found["text"] == ["broken"]
    assert found["too_long"] == ["broken"]


def test_image_that_is_not_shown_is_not_read(folder, parts):
    """As in training, which does not open it either."""
    record = {
        "id": "h",
        "image": "none.png",
        "conversations": turns("name", "wall"),
    }
    (folder / "hidden.json").write_text(json.dumps([record]))
    assert kinds(folder, parts, name="hidden.json") == {"h": ["image_without_placeholder"]}


def test_question_that_fills_the_whole_length_leaves_nothing_to_train(folder, parts):
    (folder / "long.json").write_text(
        json.dumps([{"id": "q", "conversations": turns("name " * 120, "wall")}])
    )
    assert kinds(folder, parts, name="long.json") == {"q": ["too_long", "unsupervised"]}


def test_decoding_detects_a_truncated_file(folder, parts):
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    picture.save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:1200])
    record = RECORDS["fine"] | {"id": "c", "image": "cut.jpg"}
    (folder / "cut.json").write_text(json.dumps([record]))
    assert kinds(folder, parts, name="cut.json") == {}, "its header is complete"
    assert kinds(folder, parts, name="cut.json", decode=True) == {"c": ["corrupt"]}


@given(texts=st.lists(llama_tokenizers.texts(), min_size=2, max_size=6), has_image=st.booleans())
def test_bound_holds_for_any_text(llama_tokenizer, texts, has_image):
    texts = [("<image>\n" if has_image else "") + texts[0], *texts[1:]]
    image_tokens = 5 if has_image else None
    ids, _ = encode(turns(*texts), llama_tokenizer, "vicuna_v1", image_tokens)
    assert len(ids) <= token_upper_bound(turns(*texts), llama_tokenizer, "vicuna_v1", image_tokens)


def arguments(
    parts,
    folder,
    out,
) -> list[str]:
    more = "--data.val_annotations null --data.max_length 100"
    more += f" --model.image_attention prefix --json {out}"
    return ["verify-data", *tiny_models.training_arguments(parts, folder), *more.split()]


def test_command_lists_everything_and_fails(
    folder,
    parts,
    tmp_path,
    capsys,
):
    more = (
        "--workers 2 --trainer.devices 8 --trainer.accelerator gpu --trainer.precision bf16-mixed"
    )
    with pytest.raises(SystemExit) as stop:
        llava_bidir.cli.main([*arguments(parts, folder, tmp_path / "r.json"), *more.split()])
    text = capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())["files"][0]
    assert stop.value.code == 1
    of_training = set(KINDS) - {"unanswered"}
    assert all(f" 1 {kind}: " in text for kind in of_training)
    assert result["counts"] == dict.fromkeys(KINDS, 1) | {"unanswered": 0, "rotated": 0}
    assert result["records"] == len(RECORDS)
    assert [finding["index"] for finding in result["findings"]] == list(range(2, len(RECORDS)))


def test_turned_photos_are_counted_and_are_no_fault(
    folder,
    parts,
    tmp_path,
    capsys,
):
    """They are trained as stored, which is LLaVA's rule, but not what viewers show."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png", "tif", "webp"):
        Image.new("RGB", (9, 7), "red").save(tmp_path / f"turned.{suffix}", exif=exif)
    Image.new("RGB", (9, 7), "red").save(tmp_path / "upright.png")
    names = [file.name for file in sorted(tmp_path.iterdir())]
    unread = {"model": "", "height": 7}
    records = [RECORDS["fine"] | {"id": name, "image": name} | unread for name in names]
    (tmp_path / "data.json").write_text(json.dumps(records))
    llava_bidir.cli.main(arguments(parts, tmp_path, tmp_path / "r.json"))
    result = json.loads((tmp_path / "r.json").read_text())["files"][0]
    assert result["counts"] == dict.fromkeys(KINDS, 0) | {"rotated": 4}
    assert {f["id"] for f in result["findings"]} == {n for n in names if n.startswith("turned")}
    assert "no findings" in capsys.readouterr().out
    assert result["unread"] == {"model": 5, "height": 5}


def test_a_file_that_is_also_validation_is_checked_as_both(folder, parts, tmp_path):
    """`fit` stops at a record of validation without a first answer, whichever file it is from."""
    records = [
        {"id": "fine", "conversations": turns("name", "wall")},
        {"id": "later", "conversations": turns("name", "", "and", "wall")},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    words = arguments(parts, tmp_path, tmp_path / "r.json")
    words += ["--data.val_annotations", str(tmp_path / "data.json")]
    with pytest.raises(SystemExit):
        llava_bidir.cli.main(words)
    training, validation = json.loads((tmp_path / "r.json").read_text())["files"]
    assert training["counts"]["unanswered"] == 0
    assert validation["counts"]["unanswered"] == 1


def test_findings_replace_earlier_ones_and_no_other_file(parts, tmp_path):
    records = json.dumps([{"id": "fine", "conversations": turns("name", "wall")}])
    (tmp_path / "data.json").write_text(records)
    for _ in range(2):
        llava_bidir.cli.main(arguments(parts, tmp_path, tmp_path / "r.json"))
    with pytest.raises(SystemExit, match=r"--json .*data\.json exists and holds no findings"):
        llava_bidir.cli.main(arguments(parts, tmp_path, tmp_path / "data.json"))
    assert (tmp_path / "data.json").read_text() == records
