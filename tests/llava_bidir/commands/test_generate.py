"""Answers: batches, images that stock checkpoints would crop, and prompts that do not fit."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BloomConfig, LlamaConfig, MptConfig

import probes
from llava_bidir.cli import main
from llava_bidir.commands.generate import (
    answer,
    as_evaluated,
    build_prompts,
    load_with_processor,
    read_image_attention,
)
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import max_positions
from llava_bidir.data.conversation import encode

pytestmark = pytest.mark.numerics

POSITIONS = 80  # the longest prompt of unlike questions has about 50 tokens


@pytest.fixture(scope="module")
def asked(checkpoints):
    return load_with_processor(str(checkpoints["bidirectional"]))


def pictures(*seeds: int) -> list[Image.Image]:
    drawn = (np.random.default_rng(s).integers(0, 255, (9 + s, 14, 3), np.uint8) for s in seeds)
    return [Image.fromarray(pixels) for pixels in drawn]


def test_batches_of_unlike_questions_are_answered_as_each_alone(asked, monkeypatch):
    """No, one and two images; the longest prompt of a batch cuts nobody else's answer short."""
    config = asked[0].config.get_text_config()
    monkeypatch.setattr(config, "max_position_embeddings", POSITIONS)
    questions = ["name the sky", "wall", "name the road and " * 6]
    images = [[], pictures(0), pictures(1, 2)]
    pairs = zip(questions, images, strict=True)
    alone = [answer(*asked, [question], [shown], 500)[0] for question, shown in pairs]
    assert answer(*asked, questions, images, 500) == alone
    assert len(set(alone)) == 3


def test_prompt_without_room_for_an_answer_is_an_error(asked):
    with pytest.raises(ValueError, match="a prompt has .* tokens, but the LLM has 512 positions"):
        answer(*asked, ["sky " * 600], [[]], 5)


def test_an_llm_that_states_no_limit_of_positions_has_none(asked, checkpoints, monkeypatch):
    """Bloom and MPT have other positions, and no key for their number."""
    assert max_positions(BloomConfig()) == max_positions(MptConfig()) == sys.maxsize
    mllm = probes.load(checkpoints["bidirectional"])
    scores = []
    answers = []
    configs = [model.config.get_text_config() for model in (asked[0], mllm.model)]
    for owners in ([], [*configs, LlamaConfig]):
        for owner in owners:
            monkeypatch.delattr(owner, "max_position_embeddings")
        scores.append(mllm.answer_log_probs(mllm.preprocess(pictures(0)), "sky", ["wall"]))
        answers.append(answer(*asked, ["sky"], [pictures(0)], 5))
        answers.append([mllm.answer(pictures(0)[0], "sky", max_new_tokens=5)])
    assert torch.equal(*scores) and answers[:2] == answers[2:]


def test_stock_checkpoints_are_asked_about_padded_images(checkpoints, tmp_path):
    """A released llava has CLIP's own processor."""
    path = shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    _, ours = load_with_processor(str(path))
    settings = ours.image_processor.to_dict() | {"image_processor_type": "CLIPImageProcessor"}
    del settings["do_pad"]
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    whole = json.loads((path / "processor_config.json").read_text())
    whole.pop("image_processor", None)
    (path / "processor_config.json").write_text(json.dumps(whole))
    padded = load_with_processor(str(path))[1]
    released = AutoProcessor.from_pretrained(path)
    pixels = [
        p.image_processor(pictures(0), return_tensors="pt")["pixel_values"]
        for p in (ours, padded, released)
    ]
    assert torch.equal(pixels[0], pixels[1])
    assert not torch.equal(pixels[0], pixels[2])


# llava-hf/llava-1.5-7b-hf writes roles in capitals; a llava of another LLM has that LLM's words
LLAVA_15 = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for part in m['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
OTHER = LLAVA_15.replace("m['role'].upper() }}: ", "bos_token }}name the ").replace(
    "ASSISTANT:", "of"
)


def ids_of(processor, question: str, *seeds: int) -> list[int]:
    return build_prompts(processor, [question], [pictures(*seeds)])["input_ids"][0].tolist()


@pytest.mark.parametrize("template", [None, LLAVA_15])
def test_a_released_llava_is_asked_as_it_was_trained(template, asked):
    """With the system prompt, which its chat template lacks."""
    chat_template = asked[1].chat_template
    assert as_evaluated(template) == as_evaluated(chat_template) == chat_template


def test_a_llava_of_another_llm_is_asked_in_its_own_words(asked, monkeypatch):
    _, processor = asked
    monkeypatch.setattr(processor, "chat_template", as_evaluated(OTHER))
    text = f"<s>name the {'<image>' * 4}\nthe sky of"
    expected = processor.tokenizer.encode(text, add_special_tokens=False)
    assert ids_of(processor, "the sky", 0) == expected


def test_several_images_come_before_the_question(asked):
    _, processor = asked
    turns = [{"from": "human", "value": "<image>\nwall"}]
    expected, _ = encode(
        turns,
        tokenizer=processor.tokenizer,
        template="vicuna_v1",
        image_tokens=2 * 4,
        image_token_id=processor.image_token_id,
    )
    assert ids_of(processor, "wall", 1, 2) == expected


def test_several_photos_are_each_asked_and_no_photo_is_a_question(
    asked, tmp_path, capsys, monkeypatch
):
    """A second photo was asked as a question about the first one."""
    monkeypatch.setattr("llava_bidir.commands.generate.load_with_processor", lambda *_: asked)
    photos = [tmp_path / "a.png", tmp_path / "b.png"]
    for photo, picture in zip(photos, pictures(0, 3), strict=True):
        picture.save(photo)

    def run(*words):
        return main(
            ["generate", "no model is looked for", *map(str, words), "--max-new-tokens", "4"]
        )

    run(*photos, "name the sky", "wall")
    told = capsys.readouterr().out.split("\n")[:-1]
    expected = []
    for photo, picture in zip(photos, pictures(0, 3), strict=True):
        expected.append(str(photo))
        for question in ("name the sky", "wall"):
            expected += [question, f"    {answer(*asked, [question], [[picture]], 4)[0]}"]
    assert told == expected
    for words in (photos, ("what is it?", "wall")):
        with pytest.raises(SystemExit, match="got images .* and prompts "):
            run(*words)


@pytest.mark.parametrize(
    "path", ["folder", "photo.heic", "photo.avif", "mistyped/photo", "my photo.JPG"]
)
def test_a_folder_or_a_mistyped_photo_is_no_question(path, tmp_path, monkeypatch):
    """It was asked about the photo before it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    pictures(0)[0].save("a.png")
    with pytest.raises(SystemExit, match=f"{path} cannot be read as an image: "):
        main(["generate", "no model is looked for", "a.png", path, "wall"])


PENALTIES = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "min_new_tokens": 3}


def test_greedy_answers_obey_no_penalty_of_a_checkpoint(asked, checkpoints, tmp_path):
    """`generate` obeyed it, `mllm.answer` did not; benchmarks load the model as `generate` does."""
    path = shutil.copytree(checkpoints["bidirectional"], tmp_path / "hf")
    settings = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(settings | PENALTIES))
    given = (["wall"], [pictures(0)], 12)
    expected = answer(*asked, *given)
    model, processor = load_with_processor(str(path))
    assert answer(model, processor, *given) == expected
    mllm = probes.load(str(path))
    assert mllm.answer(pictures(0), "wall", max_new_tokens=12) == expected
    for name in PENALTIES:
        setattr(model.generation_config, name, PENALTIES[name])
    assert answer(model, processor, *given) != expected, "else the test could not fail"


def test_a_stock_llava_with_a_mask_is_rejected():
    """transformers would load it, keep the key and silently ignore the mask."""
    config = SimpleNamespace(model_type="llava", image_attention="bidirectional")
    with pytest.raises(UserError, match="is a llava under the mask 'bidirectional'; expected"):
        read_image_attention(config)
