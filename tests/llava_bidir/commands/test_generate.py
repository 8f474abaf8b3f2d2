"""Answers: batches, images that stock checkpoints would crop, and prompts that do not fit."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from llava_bidir.commands.generate import answer, load

pytestmark = pytest.mark.numerics


@pytest.fixture(scope="module")
def asked(checkpoints):
    return load(str(checkpoints["bidirectional"]))


def pictures(*seeds: int) -> list[Image.Image]:
    return [Image.fromarray(np.random.default_rng(s).integers(0, 255, (9 + s, 14, 3), np.uint8)) for s in seeds]


def test_batches_of_unlike_questions_are_answered_as_each_alone(asked):
    """No, one and two images; the longest prompt of a batch cuts nobody else's answer short."""
    questions = ["name the sky", "wall", "name the road and " * 20]
    images = [[], pictures(0), pictures(1, 2)]
    alone = [answer(*asked, [q], [shown], 500)[0] for q, shown in zip(questions, images, strict=True)]
    assert answer(*asked, questions, images, 500) == alone
    assert len(set(alone)) == 3


def test_prompt_without_room_for_an_answer_is_an_error(asked):
    with pytest.raises(ValueError, match="a prompt has .* tokens, but the LLM has 512 positions"):
        answer(*asked, ["sky " * 600], [[]], 5)


def test_float16_on_a_cpu_is_named_as_slow(checkpoints, tmp_path):
    """Released checkpoints are in float16."""
    model, processor = load(str(checkpoints["bidirectional"]))
    model.half().save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    with pytest.warns(UserWarning, match="float16, which takes CPUs up to ten times as long .* `--dtype bfloat16`"):
        load(str(tmp_path / "half"))
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert load(str(tmp_path / "half"), "bfloat16")[0].dtype == torch.bfloat16


def test_stock_checkpoints_are_asked_about_padded_images(checkpoints, tmp_path):
    """A released llava has CLIP's own processor."""
    ours = checkpoints["causal"]
    for path in ours.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    _, processor = load(str(ours))
    settings = json.loads(processor.image_processor.to_json_string())
    clip = {k: v for k, v in settings.items() if k != "do_pad"} | {"image_processor_type": "CLIPImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip))
    whole = json.loads((tmp_path / "processor_config.json").read_text())
    whole.pop("image_processor", None)
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    from transformers import AutoProcessor

    released, padded = AutoProcessor.from_pretrained(tmp_path), load(str(tmp_path))[1]
    found = [p.image_processor(pictures(0), return_tensors="pt")["pixel_values"] for p in (processor, padded, released)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
