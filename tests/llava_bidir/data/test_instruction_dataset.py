"""LLaVA's JSON: valid records, and the errors of broken files, records and images."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import small_disks
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from json_values import json_values, text
from PIL import Image
from processes import run_command
from tiny_models import turns

from llava_bidir.data.collate import Collate
from llava_bidir.data.datamodule import InstructionData
from llava_bidir.data.instruction_dataset import Instructions, read_annotations
from llava_bidir.model.build import build_model, build_processor

ROOT = Path(__file__).parents[3]


def write(path, records) -> str:
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return str(path)


def record(**kwargs) -> dict:
    return {
        "id": 7,
        "image": "a.png",
        "conversations": turns("<image>\nwhat", "a cat"),
    } | kwargs


def test_lengths_count_words_and_mark_text_only(conversations):
    lengths = Instructions(conversations / "data.json", conversations).lengths()
    # "<image> name the sky" + "wall"
    assert lengths[0] == 5
    assert [n < 0 for n in lengths] == [False] * 10 + [True] * 2


def test_edited_file_is_read_again(tmp_path):
    path = write(tmp_path / "data.json", [record()])
    assert len(read_annotations(path)) == 1
    write(tmp_path / "data.json", [record(), record(id=8)])
    assert len(read_annotations(path)) == 2


NO_LIST = "expected an object with a list 'conversations'"
OUTSIDE = "'image' must be a relative path inside data.images"
BROKEN = {  # message: content of the file
    "is not a JSON list of records": "{not json",
    f"1 of 1 records .* {NO_LIST}": {"a": 1},
    rf"1 of 1 records .* record 0 \(id '1'\): {NO_LIST}": [{"id": 1}],
    r"1 of 2 records .* record 1 \(id ''\): expected an object": [record(), "text"],
    rf"record 0 \(id '7'\): {OUTSIDE}": [record(image="../a.png")],
    f"{OUTSIDE}.* got '/etc/passwd'": [record(image="/etc/passwd")],
    "'image' must be the path of one image": [record(image=["a.png", "b.png"])],
    "needs at least one human turn": [record(conversations=[])],
}
BROKEN_TURNS = {  # message: conversation
    r"id '7'\): a turn needs 'from': 'human' or 'gpt'": [{"from": "bot", "value": "x"}],
    "turn 2 is from 'gpt', expected 'human'": turns("q", "a") + turns("b", first="gpt"),
    "a turn needs text in 'value'": [{"from": "human", "value": {"a": 1}}],
}
BROKEN |= {text: [record(conversations=said)] for text, said in BROKEN_TURNS.items()}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_file_names_file_and_record(message, tmp_path):
    path = write(tmp_path / "data.json", BROKEN[message])
    with pytest.raises(ValueError, match=message) as error:
        Instructions(path, tmp_path)
    assert "data.json" in str(error.value)


@pytest.mark.parametrize(
    ("conversations", "shown", "answers"),
    [
        (turns("<image>\nwhat", ""), 1, 0),
        (turns("hello", "<image> what", "a cat", first="gpt"), 1, 1),
        (turns("<image> and <image>", "two", "<image> again", "three"), 2, 2),
        (turns("what", "a cat"), 0, 1),
    ],
)
def test_what_llava_trains_on_loads(
    conversations,
    shown,
    answers,
    tmp_path,
):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    data = Instructions(
        write(tmp_path / "data.json", [record(conversations=conversations)]), tmp_path
    )
    assert (data.records["shown"][0], data.records["answers"][0]) == (shown, answers)
    assert (data[0]["image"] is None) == (shown == 0)


CONVERSATIONS = {
    "image first": turns("<image>\nname", "wall") + turns("again", "sky"),
    "image late": turns("name", "wall") + turns("<image>\nname", "sky"),
    "no answer before": turns("name", "") + turns("<image>\nname", "sky"),
    "two images": turns("<image>\nname", "wall") + turns("<image>\nname", "sky"),
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("mask", ["causal", "bidirectional", "prefix"])
def test_a_mask_is_refused_where_a_prediction_depends_on_its_own_target(
    mask,
    conversation,
    parts,
    tmp_path,
):
    """The reference exchanges the first token of the first answer and compares the logits that predict it."""
    Image.effect_noise((9, 7), 90).convert("RGB").save(tmp_path / "a.png")
    path = write(tmp_path / "data.json", [record(conversations=CONVERSATIONS[conversation])])
    data = Instructions(path, tmp_path)
    processor = build_processor(*parts)
    model = build_model(*parts, processor, image_attention=mask).eval()
    for parameter in model.model.language_model.parameters():
        parameter.data *= 4  # two layers of attention must not vanish
    batch = Collate(processor, tiny_models.TOKENS, "vicuna_v1")([data[0]])
    predicts = int(batch["predicts"][0])
    others = batch["input_ids"].clone()
    others[0, predicts + 1] += 1
    with torch.no_grad():
        logits = [
            model(input_ids=ids, pixel_values=batch["pixel_values"]).logits
            for ids in (batch["input_ids"], others)
        ]
    if torch.equal(logits[0][0, predicts], logits[1][0, predicts]):
        data.check_mask(mask)
    else:
        with pytest.raises(
            ValueError, match=rf"1 of 1 records an image follows an answer, e.g. record 0 .*{mask}"
        ):
            data.check_mask(mask)
    expected = {"image late": {"prefix"}, "two images": {"bidirectional", "prefix"}}.get(
        conversation, set()
    )
    assert (mask in expected) != torch.equal(logits[0][0, predicts], logits[1][0, predicts])


def test_missing_folder_is_named(tmp_path):
    path = write(tmp_path / "data.json", [record()])
    with pytest.raises(ValueError, match="data.images: no folder"):
        Instructions(path, tmp_path / "nowhere")


def test_broken_file_leaves_no_cache(pictures):
    whole = json.dumps([record()] * 1000)
    with pytest.raises(ValueError, match="after 999 records"):
        read_annotations(write(pictures / "data.json", whole[:-3]))
    assert [*pictures.rglob("*.arrow")] == [], "the converted part is not a dataset"
    assert len(read_annotations(write(pictures / "data.json", whole))) == 1000
    assert [*pictures.rglob("*.arrow")]


def test_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "dir.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("dir.json", "pipe.json", "none.json", "x" * 300 + ".json"):
        with pytest.raises(ValueError, match=f"data.annotations: no file .*{name}"):
            read_annotations(tmp_path / name)


@pytest.fixture(scope="module")
def collate(parts):
    return Collate(build_processor(*parts), tiny_models.TOKENS, "vicuna_v1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with a.png, and where `datasets` caches meanwhile."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "folder").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


any_json = json_values()
texts = st.sampled_from(["<image>\nq", "a", "", "<image><image>", "\0"]) | text
roles = st.sampled_from(["human", "gpt"])
any_turn = st.fixed_dictionaries({"from": roles | any_json, "value": texts | any_json}) | any_json
dialogue = st.lists(texts, min_size=1, max_size=4).map(lambda values: turns(*values))
paths = st.sampled_from(
    ["a.png", "none.png", "../a.png", "/a.png", "", ".", "folder", "a\0b", "x" * 300]
)
any_record = any_json | st.fixed_dictionaries(
    {"conversations": dialogue | st.lists(any_turn, max_size=4) | any_json},
    optional={"id": any_json, "image": paths | any_json},
)


@given(st.lists(any_record, max_size=3))
def test_any_record_is_a_sample_or_an_error_that_names_it(collate, pictures, records):
    """Ids and labels of a sample agree and its image is RGB; an error names file and record."""
    shutil.rmtree(pictures / "cache", ignore_errors=True)
    try:
        data = Instructions(write(pictures / "data.json", records), pictures)
    except ValueError as error:
        assert len(str(error)) < 2000
        assert re.search(
            r"data.json.*(record \d \(id '|contains no records)", str(error), re.DOTALL
        )
        return
    assert len(data) == len(records)
    assert (data.lengths() != 0).all()
    for i in range(len(data)):
        try:
            sample = data[i]
            ids, labels = collate.encode(sample)
        except ValueError as error:
            assert re.search(r"^record (\d \(id )?'", str(error))
            continue
        assert len(ids) == len(labels)
        assert all(label in (-100, id) for id, label in zip(ids, labels, strict=True))
        assert sample["image"] is None or (sample["image"].mode, sample["image"].size) == (
            "RGB",
            (4, 4),
        )
        assert (sample["image"] is None) == (collate.processor.image_token_id not in ids)


READING = """
import re, sys, threading, time
from pathlib import Path
from llava_bidir.data.instruction_dataset import read_annotations

def held():  # MiB of its own, without the pages of mapped files, which the system takes back as it likes
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

def watch():
    while True:
        peaks.append(held())
        time.sleep(0.02)

before, peaks = held(), []
threading.Thread(target=watch, daemon=True).start()
print(len(read_annotations(sys.argv[1])), max(peaks) - before)
"""


@pytest.mark.parametrize("place", ["read-only", "full"])
def test_records_that_cannot_be_cached_are_an_error_that_names_hf_home(
    place, tmp_path, monkeypatch
):
    """It was a traceback of `datasets`."""
    options = {"read-only": "ro", "full": "size=4k"}[place]
    with small_disks.mounted(tmp_path / "home", options) as home:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
        text = record(image=None, conversations=turns("what", "a cat" * 5000))
        message = f"cannot be cached in {home}/cache: .*; set HF_HOME to a folder"
        with pytest.raises(ValueError, match=message):
            read_annotations(write(tmp_path / "data.json", [text]))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """HOSTILE_MIB=2048 has it read a file of that size, which takes minutes and twice the space."""
    size = int(os.environ.get("HOSTILE_MIB", 64)) << 20
    text = json.dumps(
        record(conversations=turns("<image>\nwhat", *["a cat " * 40] * 3), image="a/b.png")
    )
    count = size // (len(text) + 1)
    with (tmp_path / "big.json").open("w") as file:
        file.write("[" + text)
        for _ in range(count - 1):
            file.write("," + text)
        file.write("]")
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    run = run_command([sys.executable, "-c", READING, tmp_path / "big.json"], env=environment)
    records, grown = map(int, run.stdout.split())
    assert records == count and grown < 80, f"MiB, for a file of {size >> 20}"


ASKED = "<image>\nwhat"
UNSHOWN = {
    "a list": {
        "image": None,
        "images": ["a.png"],
        "conversations": turns(ASKED, "cat"),
    },
    "no key": {"image": None, "conversations": turns(ASKED, "cat")},
    "another spelling": {"conversations": turns("<Image> what", "cat")},
}


@pytest.mark.parametrize("name", UNSHOWN)
def test_placeholders_without_any_image_are_refused_before_training(name, tmp_path):
    """All of eight records were trained as text with the literal `<image>`."""
    unshown = record(**UNSHOWN[name])
    text = record(image=None, conversations=turns("what", "a cat"))
    data = Instructions(write(tmp_path / "data.json", [text, unshown]), tmp_path)
    found = {
        "a list": "has 'images'",
        "no key": "has no key for it",
        "another spelling": "has 'image'",
    }
    message = "no record shows an image, but 1 of 2 have <image> in their text.* record 1 "
    with pytest.raises(ValueError, match=message + r"\(id '7'\) " + found[name]):
        data.check_trainable()
    with pytest.raises(ValueError, match="no record shows an image"):
        InstructionData(str(tmp_path / "data.json"), str(tmp_path)).setup("fit")
    assert "1 with <image> in their text but no image that is shown" in data.summary(4, 99)
    shown = record(conversations=turns(ASKED, "cat"))
    Instructions(write(tmp_path / "data.json", [shown, unshown]), tmp_path).check_trainable()
    Instructions(write(tmp_path / "data.json", [text]), tmp_path).check_trainable()


def test_records_without_any_answer_are_refused_before_training(tmp_path):
    empty = record(conversations=turns(ASKED, ""))
    data = Instructions(write(tmp_path / "data.json", [empty, empty]), tmp_path)
    with pytest.raises(ValueError, match="none of 2 records has an answer to train on"):
        data.check_trainable()
    one = record(conversations=turns(ASKED, "", "again", "cat"))
    Instructions(write(tmp_path / "data.json", [empty, one]), tmp_path).check_trainable()
