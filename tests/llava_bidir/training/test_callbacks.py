"""Validation of captions: their loss, and three images with question and answer."""

import json

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from llava_bidir.data.collate import Collate
from llava_bidir.data.dataset import Instructions
from llava_bidir.training.read_checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def stage_1(parts, tmp_path_factory):
    """The folder of eight captions and of four held out, and that of a run of stage 1."""
    folder = tiny_models.write_conversations(tmp_path_factory.mktemp("captions"), text_only=0)
    records = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(records[:8]))
    (folder / "held_out.json").write_text(json.dumps(records[8:]))
    more = f"-c configs/demo/stage1.yaml --data.val_annotations {folder}/held_out.json"
    more += " --data.micro_batch_size 2 --model.max_new_tokens 3"
    return folder, tiny_models.fit(parts, folder, folder / "run", *more.split())


def test_the_loss_of_captions_is_the_mean_over_their_tokens(stage_1):
    captions, run = stage_1
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


def test_three_images_are_shown_with_question_and_answer(stage_1):
    captions, run = stage_1
    events = EventAccumulator(str(run)).Reload()
    tags = [f"validation/images/{i}" for i in range(3)]
    assert events.Tags()["images"] == tags
    images = [events.Images(tag)[0] for tag in tags]
    assert [image.step for image in images] == [1] * 3, "of the latest step's loss"
    assert len({image.encoded_image_string for image in images}) == 3
    records = json.loads((captions / "held_out.json").read_text())
    for i, record in enumerate(records[:3]):
        (shown,) = events.Tensors(f"validation/answers/{i}/text_summary")
        question, answer = (turn["value"] for turn in record["conversations"])
        question = question.replace("<image>", "").strip()
        start = f"{record['id']}: {question} Expected: {answer}. Answered: "
        assert shown.tensor_proto.string_val[0].decode().startswith(start)


def test_hparams_have_the_settings_under_a_name_and_the_final_metric(stage_1):
    """As TensorBoard's plugin reads them."""
    _, run = stage_1
    events = EventAccumulator(str(run)).Reload()
    contents = events.summary_metadata
    tags = (metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG)
    columns, started = (contents[tag].plugin_data.content for tag in tags)
    experiment = metadata.parse_experiment_plugin_data(columns)
    session = metadata.parse_session_start_info_plugin_data(started)
    assert {info.name for info in experiment.hparam_infos} == {*session.hparams}
    assert session.group_name == f"{run}: stage 1, clip, causal"
    assert session.hparams["mask"].string_value == "causal"
    assert session.hparams["steps"].number_value == 2
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert {"hp_metric", "val/loss"} <= metrics
    (final,) = events.Scalars("hp_metric")
    assert final.value == events.Scalars("val/loss")[-1].value
