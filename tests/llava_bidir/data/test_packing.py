"""Rows of packed samples: layout, positions, labels and order of images."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import turns

from llava_bidir.common.errors import UserError
from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import IGNORE_INDEX
from llava_bidir.data.datamodule import InstructionData
from llava_bidir.data.packing import pack_samples
from llava_bidir.model.build import build_processor


@pytest.fixture(scope="module")
def collate(parts):
    return Collate(build_processor(*parts), image_tokens=4, template="vicuna_v1", max_length=60, pack_tokens=60)


def sample(answer: str, shade: int | None) -> dict:
    image = None if shade is None else Image.new("RGB", (8, 8), (shade, shade, shade))
    question = "name" if shade is None else "<image>\nname"
    return {"id": answer, "image": image, "conversations": turns(question, answer)}


SAMPLES = [
    sample("wall " * 20, 10),
    sample("sky " * 12, 90),
    sample("road wall", None),
    sample("sky " * 10, 170),
    sample("wall", 250),
]


@pytest.mark.parametrize("seed", range(20))
def test_every_layout_is_a_partition_within_the_limit_of_no_more_tokens(seed):
    rng = np.random.default_rng(seed)
    lengths, limit = rng.integers(1, 300, rng.integers(1, 17)).tolist(), int(rng.integers(1, 1000))
    rows = pack_samples(lengths, limit)
    width = max(sum(lengths[i] for i in row) for row in rows)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert width <= max(limit, *lengths) and len(rows) * width <= len(lengths) * max(lengths)


def test_nothing_is_packed_where_it_saves_nothing():
    assert pack_samples([8, 8, 8], 24) == [[0], [1], [2]], "shorter rows, as many tokens"
    assert pack_samples([8, 8, 8], 8) == [[0], [1], [2]]
    assert pack_samples([9, 3, 3, 3], 9) == [[0], [1, 2, 3]]


def test_rows_hold_the_samples_one_after_the_other(collate):
    batch = collate(SAMPLES)
    assert len(batch["input_ids"]) < len(SAMPLES) == len(batch["ids"])
    alone = [collate.encode(item) for item in SAMPLES]
    rows, width = pack_samples(batch["lengths"], 60), batch["input_ids"].shape[1]
    for row, samples in enumerate(rows):
        ids = [token for i in samples for token in alone[i][0]]
        labels = [label for i in samples for label in alone[i][1]]
        positions = [p for i in samples for p in range(len(alone[i][0]))]
        fill = width - len(ids)
        assert batch["input_ids"][row].tolist()[: len(ids)] == ids
        assert batch["labels"][row].tolist() == labels + [IGNORE_INDEX] * fill
        assert batch["position_ids"][row].tolist() == positions + list(range(fill))
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * fill
        assert batch["samples"][row] == [len(alone[i][0]) for i in samples] + [fill] * (fill > 0)
    assert batch["supervised"] == sum(label != IGNORE_INDEX for _, labels in alone for label in labels)


def test_images_are_in_the_order_of_their_tokens(collate):
    batch, rows = collate(SAMPLES), pack_samples([len(collate.encode(item)[0]) for item in SAMPLES], 60)
    shown = [i for row in rows for i in row if SAMPLES[i]["image"] is not None]
    assert shown != sorted(shown), "or the order would not matter"
    expected = [collate.pixels([SAMPLES[i]], [collate.encode(SAMPLES[i])[0]]) for i in shown]
    assert torch.equal(batch["pixel_values"], torch.cat(expected))


def test_first_token_of_a_sample_is_never_predicted(collate, monkeypatch):
    """The sample before it knows nothing about it."""
    encode = Collate.encode
    everything = lambda self, item: (encode(self, item)[0], encode(self, item)[0])
    monkeypatch.setattr(Collate, "encode", everything)
    batch = collate(SAMPLES)
    starts = [(row, sum(lengths[:i])) for row, lengths in enumerate(batch["samples"]) for i in range(len(lengths))]
    width = batch["input_ids"].shape[1]
    assert not {row * width + column - 1 for row, column in starts} & set(batch["predicts"].tolist())


def test_limit_without_a_token_is_an_error():
    with pytest.raises(UserError, match="data.pack_tokens must be a positive number of tokens or null, got 0"):
        InstructionData("data.json", ".", pack_tokens=0)
