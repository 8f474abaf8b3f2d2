"""Samples to batches."""

import pytest
import torch
from PIL import Image
from tiny_models import turns

from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import IGNORE_INDEX
from llava_bidir.model.build import build_processor


@pytest.fixture(scope="module")
def collate(parts):
    return Collate(build_processor(*parts), image_tokens=4, template="vicuna_v1", max_length=60)


def sample(question: str, answer: str, image: bool, name: str = "s") -> dict:
    picture = Image.new("RGB", (9, 5), "red") if image else None
    return {"id": name, "image": picture, "conversations": turns(question, answer)}


def test_batch_is_padded_and_says_where_it_predicts(collate):
    batch = collate(
        [sample("<image>\nname the sky", "wall", True), sample("sky", "wall wall wall", False)]
    )
    ids = batch["input_ids"]
    labels = batch["labels"]
    mask = batch["attention_mask"]
    assert ids.shape == labels.shape == mask.shape
    assert batch["pixel_values"].shape == (1, 3, 8, 8)
    assert (labels[mask == 0] == IGNORE_INDEX).all()
    assert sum(batch["lengths"]) == mask.sum()
    expected = [
        row * labels.shape[1] + column - 1
        for row in range(2)
        for column in range(1, labels.shape[1])
        if labels[row, column] != IGNORE_INDEX
    ]
    assert batch["predicts"].tolist() == expected
    assert batch["supervised"] == len(expected) > 5


@pytest.mark.parametrize("missing", [-1, 0, 1, 50])
def test_what_is_over_the_longest_is_cut(missing, collate):
    """LLaVA counts image tokens and cuts on the right (llava_arch.py:273); labels before the cut stay."""
    question = "<image>\nname the sky"
    long = sample(question, "wall " * (60 + missing), True)
    words = len(collate.encode(long)[0]) - 60 - missing  # beside those of the answer
    long = sample(question, "wall " * (60 + missing - words), True)
    ids, labels = collate.encode(long)
    assert len(ids) == 60 + missing
    batch = collate([long])
    assert batch["input_ids"][0].tolist() == ids[:60]
    assert batch["labels"][0].tolist() == labels[:60]
    end = collate.processor.tokenizer.eos_token_id
    assert (ids[:60][-1] == labels[:60][-1] == end) == (missing <= 0), "the answer's end"


def test_a_sample_that_would_be_cut_within_its_image_is_an_error(collate):
    text_first = sample("wall " * 70, "sky", True, name="late")
    text_first["conversations"] += sample("<image>\nname", "wall", True)["conversations"]
    with pytest.raises(ValueError, match="record 'late': its image ends after token 60"):
        collate([text_first])


def test_prompts_are_padded_left_and_end_where_the_answer_starts(collate):
    samples = [
        sample("<image>\nname the sky and a wall", "wall", True),
        sample("sky", "wall", False),
    ]
    prompts = collate.prompts(samples)
    full = collate(samples)
    for row in range(2):
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
        assert torch.equal(prompt, full["input_ids"][row][: len(prompt)])
        assert full["labels"][row][len(prompt)] != IGNORE_INDEX
    assert prompts["attention_mask"][:, -1].all()
