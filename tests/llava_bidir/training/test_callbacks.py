"""Validation of captions: their loss, and three images with question and answer."""

import json

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_bidir.cli import main
from llava_bidir.data.collate import Collate
from llava_bidir.data.dataset import Instructions
from llava_bidir.training.read_checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """The folder of ten captions of 1 to 4 words, of which four are for validation."""
    folder = tiny_models.write_conversations(tmp_path_factory.mktemp("captions"), text_only=0)
    records = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(records[:8]))
    (folder / "held_out.json").write_text(json.dumps(records[8:]))
    return folder


@pytest.fixture
def stage_1(parts, captions, tmp_path):
    """Run stage 1 of two steps of two micro-batches and return the folder of the run."""

    def run(*more: str):
        words = tiny_models.training_arguments(parts, captions)
        words[words.index("-c") + 1] = "configs/demo/stage1.yaml"
        words += f"--data.val_annotations {captions}/held_out.json --out {tmp_path}/run".split()
        words += "--data.micro_batch_size 2 --model.max_new_tokens 3".split()
        main(["fit", *words, *more])
        return tmp_path / "run"

    return run


def test_the_loss_of_captions_is_the_mean_over_their_tokens(stage_1, captions):
    run = stage_1()
    model, processor, training = read_checkpoint(run / "checkpoints/last.ckpt")
    samples = Instructions(str(captions / "held_out.json"), str(captions))
    batch = Collate(processor, tiny_models.TOKENS, "plain")([samples[i] for i in range(4)])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    targets = batch["labels"][:, 1:].flatten()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
    assert training["val/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert "val/answer_accuracy" not in training, "a caption has no right wording"


@pytest.mark.parametrize("micro_batch_size", ["1", "4"])
def test_three_images_are_shown_with_question_and_answer(micro_batch_size, stage_1, captions):
    events = EventAccumulator(str(stage_1("--data.micro_batch_size", micro_batch_size))).Reload()
    shown = [tag for tag in events.Tags()["images"] if tag.startswith("validation/images/")]
    assert shown == [f"validation/images/{i}" for i in range(3)]
    assert [events.Images(tag)[0].step for tag in shown] == [1] * 3, "of the latest step's loss"
    (table,) = events.Tensors("validation/answers/text_summary")
    _, _, *rows = table.tensor_proto.string_val[0].decode().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    records = json.loads((captions / "held_out.json").read_text())[:3]
    expected = [[str(i), x["id"], x["conversations"][1]["value"]] for i, x in enumerate(records)]
    assert [[number, name, answer] for number, name, _, answer, _ in cells] == expected
    assert np.unique([events.Images(tag)[0].encoded_image_string for tag in shown]).size == 3
