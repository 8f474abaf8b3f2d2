"""The preflight: each kind of finding, that a clean file has none, exit status, and a killed run that goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import llava_bidir.cli
from llava_bidir.commands.verify_data import KINDS, Checks, verify
from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import encode, most_tokens
from llava_bidir.data.image_folder import ImageFolder
from llava_bidir.data.instruction_dataset import read_annotations
from llava_bidir.model.build import build_processor

ROOT = Path(__file__).parents[3]


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


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
    "several_images": {"image": "a.png", "conversations": turns("<image>\n<image> name", "wall")},
    "image_not_shown": {"image": "a.png", "conversations": turns("name", "wall")},
    "tag_without_image": {"conversations": turns("<image> name", "wall")},
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
    (root / "data.json").write_text(json.dumps([{"id": name, **record} for name, record in RECORDS.items()]))
    return root


def checks(folder, parts, template="vicuna_v1", decode=False, name="data.json") -> Checks:
    collate = Collate(build_processor(*parts), tiny_models.TOKENS, template, max_length=100)
    return Checks(read_annotations(folder / name), ImageFolder(folder), collate, decode)


def found(checks) -> dict[str, list[str]]:
    by_id = {}
    for finding in verify(checks, {}, None, workers=0, save=None)["findings"]:
        by_id.setdefault(finding["id"], []).append(finding["kind"])
    return by_id


def test_each_kind_is_found_at_its_record_and_nothing_else(folder, parts):
    assert set(KINDS) == set(RECORDS) - {"fine", "text"}
    assert found(checks(folder, parts)) == {kind: [kind] for kind in KINDS}


def test_template_plain_has_rules_of_its_own(folder, parts):
    """A caption always has its newline to train on; a record without an image cannot be trained on."""
    kinds = found(checks(folder, parts, "plain"))
    assert "unsupervised" not in kinds and "fine" not in kinds
    assert kinds["text"] == ["broken"] and kinds["too_long"] == ["broken"]


def test_details_name_the_tokens_and_the_file(folder, parts):
    details = {f["kind"]: f["detail"] for f in verify(checks(folder, parts), {}, None, 0, None)["findings"]}
    ids, _ = encode(RECORDS["too_long"]["conversations"], build_processor(*parts).tokenizer, image_tokens=None)
    assert (
        details["too_long"] == f"{len(ids)} tokens" and details["missing"] == f"image {folder / 'none.png'} is missing"
    )
    assert details["renamed"] == f"{folder / 'gif.jpg'}: GIF, not JPEG"


def test_question_that_fills_the_whole_length_leaves_nothing_to_train(folder, parts):
    (folder / "long.json").write_text(json.dumps([{"id": "q", "conversations": turns("name " * 120, "wall")}]))
    assert found(checks(folder, parts, name="long.json")) == {"q": ["too_long", "unsupervised"]}


def test_decoding_finds_a_file_that_is_cut_off(folder, parts):
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    picture.save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:1200])
    (folder / "cut.json").write_text(json.dumps([{"id": "c", **RECORDS["fine"], "image": "cut.jpg"}]))
    assert found(checks(folder, parts, name="cut.json")) == {}, "its header is whole"
    assert found(checks(folder, parts, name="cut.json", decode=True)) == {"c": ["corrupt"]}


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=6), st.booleans())
def test_bound_holds_for_any_text(real_tokenizer, texts, has_image):
    texts = [("<image>\n" if has_image else "") + texts[0], *texts[1:]]
    image_tokens = 5 if has_image else None
    ids, _ = encode(turns(*texts), real_tokenizer, "vicuna_v1", image_tokens)
    assert len(ids) <= most_tokens(turns(*texts), real_tokenizer, "vicuna_v1", image_tokens)


def arguments(parts, folder, out, annotations="data.json") -> list[str]:
    encoder, llm = parts
    return [
        *("verify-data", "-c", str(ROOT / "configs/demo/stage2.yaml"), "--model.encoder.path", encoder.path),
        *("--model.llm", llm, "--data.images", str(folder), "--data.annotations", str(folder / annotations)),
        *("--data.val_annotations", "null", "--data.max_length", "100", "--out", str(out)),
    ]


def test_command_lists_everything_and_fails(folder, parts, tmp_path, capsys):
    on_a_cluster = ["--trainer.devices", "8", "--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed"]
    with pytest.raises(SystemExit) as stop:
        llava_bidir.cli.main([*arguments(parts, folder, tmp_path), "--workers", "2", *on_a_cluster])
    text, result = capsys.readouterr().out, json.loads((tmp_path / "verify-data.json").read_text())["files"][0]
    assert stop.value.code == 1 and all(f" 1 {kind}: " in text for kind in KINDS)
    assert result["counts"] == dict.fromkeys(KINDS, 1) and result["checked"] == result["records"] == len(RECORDS)
    assert result["records_per_s_per_core"] > 0


def test_command_is_content_with_sound_data(conversations, parts, tmp_path, capsys):
    llava_bidir.cli.main([*arguments(parts, conversations, tmp_path), "--json", str(tmp_path / "r.json")])
    assert "nothing to report" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["files"][0]["findings"] == []


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b'{"files": 5}', b'{"files": [5]}', b'{"files": [{}]}', b"[" * 10**5]
)
def test_file_that_is_no_earlier_result_is_left_alone(content, folder, parts, tmp_path):
    (tmp_path / "notes.json").write_bytes(content)
    with pytest.raises(
        SystemExit, match="notes.json is no result of verify-data; remove it or name another with --json"
    ):
        llava_bidir.cli.main([*arguments(parts, folder, tmp_path), "--json", str(tmp_path / "notes.json")])
    assert (tmp_path / "notes.json").read_bytes() == content


def test_interrupted_check_goes_on_and_finds_the_same(folder, parts, tmp_path):
    many = [{"id": i, **RECORDS["missing" if i % 7 == 0 else "text"]} for i in range(700)]
    (folder / "many.json").write_text(json.dumps(many))
    whole = verify(checks(folder, parts, name="many.json"), {}, None, 0, None)
    half = {**whole, "checked": 256, "findings": [f for f in whole["findings"] if f["index"] < 256]}
    checked = checks(folder, parts, name="many.json")
    seen = []
    check, checked.check = checked.check, lambda record: seen.append(record["id"]) or check(record)
    rest = verify(checked, {}, half, 0, None)
    assert rest["findings"] == whole["findings"] and len(rest["findings"]) == 100
    assert seen == [str(i) for i in range(256, 700)] and rest["checked"] == 700


@pytest.mark.slow
def test_killed_run_goes_on_where_it_had_saved(folder, parts, tmp_path):
    (folder / "huge.json").write_text(json.dumps([{"id": i, **RECORDS["too_long"]} for i in range(100_000)]))
    command = [sys.executable, "-m", "llava_bidir", *arguments(parts, folder, tmp_path, "huge.json"), "--workers", "1"]
    run, file = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL), tmp_path / "verify-data.json"
    give_up = time.monotonic() + 600  # a busy machine takes minutes
    while not file.exists() and run.poll() is None and time.monotonic() < give_up:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    saved = json.loads(file.read_text())["files"][0]
    assert 0 < saved["checked"] < 100_000 and len(saved["findings"]) == saved["checked"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    result = json.loads(file.read_text())["files"][0]
    assert again.returncode == 1 and result["checked"] == len(result["findings"]) == 100_000
    assert [f["index"] for f in result["findings"]] == list(range(100_000))
    first_bar = next(line for line in again.stderr.replace("\r", "\n").splitlines() if "%|" in line)
    assert first_bar.lstrip().startswith(f"{saved['checked'] / 100_000:.0%}|")
