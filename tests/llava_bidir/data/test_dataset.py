"""LLaVA's JSON: valid records, and the errors of broken files, records and images."""

import json
import os
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import pytest
import small_disks
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from json_values import json_values, text
from PIL import Image
from tiny_models import turns
from training_runs import make_data

from llava_bidir.common.errors import UserError
from llava_bidir.data.collate import Collate
from llava_bidir.data.dataset import Instructions, read_annotations
from llava_bidir.model.build import build_model, build_processor


def write(path, records) -> str:
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return str(path)


def record(**kwargs) -> dict:
    return {"id": 7, "image": "a.png", "conversations": turns("<image>\nwhat", "a cat")} | kwargs


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


def test_a_file_of_the_same_size_and_time_is_read_again(tmp_path):
    """As of an archive; the records of before were trained."""
    for answer in ("a cat", "a dog"):
        path = write(tmp_path / "data.json", [record(conversations=turns("<image>\nwhat", answer))])
        os.utime(path, (1, 1))
        assert read_annotations(path)[0]["conversations"][1]["value"] == answer


@pytest.mark.parametrize("options", ["size=16k", "size=16k,ro"])
def test_a_cache_that_takes_nothing_is_named_with_hf_home(options, tmp_path, monkeypatch):
    path = write(tmp_path / "data.json", [record()] * 1000)
    with small_disks.mounted(tmp_path / "disk", options) as disk:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", disk / "cache")
        with pytest.raises(UserError, match=f"cannot write {disk}/cache.*: .*; set HF_HOME to"):
            read_annotations(path)


OUTSIDE = "record 0: 'image' must be the path of one image inside data.images, got"
BROKEN = {  # message: content of the file
    "Expecting property name .*: line 1 column 3": "{not json",
    "Expecting property name .*: line 3 column 2": '{"id": 1}\n{"id": 2}\n{id: 3}',
    "expected records, as in a JSON list": "[]",
    "record 1: TypeError: string indices": [record(), "text"],
    f"{OUTSIDE} '../a.png'": [record(image="../a.png")],
    f"{OUTSIDE} '/etc/passwd'": [record(image="/etc/passwd")],
    rf"{OUTSIDE} \['a.png', 'b.png'\]": [record(image=["a.png", "b.png"])],
    "got \\['human', 'human'\\]": [record(conversations=turns("a") * 2)],
    "a turn needs 'from': 'human' or 'gpt', and text": [record(conversations=[{"from": "bot"}])],
    "and text in 'value', got": [record(conversations=[{"from": "human", "value": 1}])],
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_file_names_file_and_record(message, tmp_path):
    path = write(tmp_path / "data.json", BROKEN[message])
    with pytest.raises(ValueError, match=f"data.json: .*{message}"):
        Instructions(path, tmp_path)


def test_json_lines_are_read_as_the_list(tmp_path):
    records = [record(id="\u2028 caf\u00e9"), record(id=8)]
    lines = "\ufeff\n" + "\r\n\n".join(json.dumps(x, ensure_ascii=False) for x in records) + "\n"
    (tmp_path / "data.json").write_text(lines, encoding="utf8")
    expected = read_annotations(write(tmp_path / "list.json", records))
    assert read_annotations(tmp_path / "data.json")[:] == expected[:]


@pytest.mark.parametrize(
    ("conversations", "shown"),
    [
        (turns("<image> hello", "what", "a cat", first="gpt"), False),
        (turns("hello", "<image> what", "a cat", first="gpt"), True),
        (turns("<image> and <image>", "two", "<image> again", "three"), True),
    ],
)
def test_what_llava_trains_on_loads(conversations, shown, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    data = Instructions(
        write(tmp_path / "data.json", [record(conversations=conversations)]), tmp_path
    )
    assert (data[0]["image"] is not None) == shown


CONVERSATIONS = {
    "image first": turns("<image>\nname", "wall") + turns("again", "sky"),
    "image late": turns("name", "wall") + turns("<image>\nname", "sky"),
    "no answer before": turns("name", "") + turns("<image>\nname", "sky"),
    "two images": turns("<image>\nname", "wall") + turns("<image>\nname", "sky"),
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("mask", ["causal", "bidirectional", "prefix"])
def test_a_mask_is_refused_where_a_prediction_may_depend_on_its_own_target(
    mask, conversation, parts, tmp_path
):
    """The reference exchanges the first token of the first answer and compares the logits that predict it."""
    Image.effect_noise((9, 7), 90).convert("RGB").save(tmp_path / "a.png")
    path = write(tmp_path / "data.json", [record(conversations=CONVERSATIONS[conversation])])
    data = Instructions(path, tmp_path)
    processor = build_processor(*parts)
    model = build_model(*parts, processor, image_attention=mask).eval()
    for parameter in model.model.language_model.parameters():
        parameter.data *= 4  # two layers of attention must not vanish
    collate = Collate(processor, tiny_models.TOKENS, "vicuna_v1")
    batch = collate([data[0]])
    predicts = int(batch["predicts"][0])
    others = batch["input_ids"].clone()
    others[0, predicts + 1] += 1
    with torch.no_grad():
        logits = [
            model(input_ids=ids, pixel_values=batch["pixel_values"]).logits
            for ids in (batch["input_ids"], others)
        ]
    is_seen = not torch.equal(logits[0][0, predicts], logits[1][0, predicts])
    collate.image_attention = mask
    message = f"record '7': an image follows an answer.* model.image_attention {mask}"
    is_refused = mask != "causal" and conversation in ("image late", "two images")
    leaks = {"image late": {"prefix"}, "two images": {"bidirectional", "prefix"}}
    assert is_seen == (mask in leaks.get(conversation, ()))
    with pytest.raises(ValueError, match=message) if is_refused else nullcontext():
        collate([data[0]])


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
        assert re.search(r"data.json: (record \d: |expected records)", str(error))
        return
    assert len(data) == len(records)
    assert (data.lengths() != 0).all()
    for i in range(len(data)):
        try:
            sample = data[i]
            ids, labels = collate.encode(sample)
        except ValueError as error:
            assert re.search(r"^record (\d \(id )?['\"]", str(error))
            continue
        assert len(ids) == len(labels)
        assert all(label in (-100, id) for id, label in zip(ids, labels, strict=True))
        assert sample["image"] is None or (sample["image"].mode, sample["image"].size) == (
            "RGB",
            (4, 4),
        )
        assert (sample["image"] is None) == (collate.processor.image_token_id not in ids)


ASKED = "<image>\nwhat"
UNSHOWN = [
    {"image": None, "images": ["a.png"], "conversations": turns(ASKED, "cat")},
    {"conversations": turns("<Image> what", "cat")},
]


@pytest.mark.parametrize("changes", UNSHOWN)
def test_placeholders_without_any_image_are_refused_before_training(changes, collate, tmp_path):
    """All of eight records were trained as text with the literal `<image>`."""
    unshown = record(**changes)
    text = record(image=None, conversations=turns("what", "a cat"))
    data = Instructions(write(tmp_path / "data.json", [text, unshown]), tmp_path)
    with pytest.raises(ValueError, match="no record shows an image, but texts have <image>"):
        data.check_trainable(collate)
    shown = record(conversations=turns(ASKED, "cat"))
    Instructions(write(tmp_path / "data.json", [shown, unshown]), tmp_path).check_trainable(collate)
    Instructions(write(tmp_path / "data.json", [text]), tmp_path).check_trainable(collate)


UNTRAINED = [  # template, conversation
    ("plain", turns(ASKED, " ")),  # its line break is trained
    ("vicuna_v1", turns(ASKED, "")),
    ("vicuna_v1", turns(ASKED, " \n")),  # its end token is trained
    ("vicuna_v1", turns(ASKED)),
    ("vicuna_v1", turns(ASKED + " name" * 99, "cat")),  # the answer is cut off
]


@pytest.mark.parametrize(("template", "conversation"), UNTRAINED)
def test_data_without_an_answer_to_train_on_are_refused(template, conversation, parts, tmp_path):
    """The loss was 0.0, and "The trained model is ..." the end."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    unanswered = record(conversations=conversation)
    settings = {"template": template, "max_length": 90}
    for more in ([], [record()]):
        write(tmp_path / "data.json", [unanswered, unanswered, *more])
        data = make_data(tmp_path, parts, **settings)
        data.trainer = SimpleNamespace(global_rank=0, world_size=1, log_every_n_steps=1)
        with nullcontext() if more else pytest.raises(UserError, match="has an answer to train on"):
            data.setup("fit")
