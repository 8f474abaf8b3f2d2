"""Each step has one point of each metric in TensorBoard, also where a run was killed and resumed."""

from unittest.mock import Mock

import pytest
import tiny_models
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_bidir.training.module import LlavaTraining

OPTIONS = "--data.micro_batch_size 2 --trainer.max_epochs 2 --trainer.log_every_n_steps 1"
OPTIONS += " --throughput.peak_tflops 1 --checkpoints.every_n_steps 2"


class Killed(BaseException):
    """Ends a run at once, as SIGKILL would: nothing that is not written yet is written."""


@pytest.fixture
def fit(parts, conversations, tmp_path):
    """Train six steps of two micro-batches, with a checkpoint after each two, and return the folder."""

    def run(*more: str):
        words = [*OPTIONS.split(), "--ckpt_path", "last", *more]
        return tiny_models.fit(parts, conversations, tmp_path / "run", *words)

    return run


def kill_in_step_4(monkeypatch):
    """Two steps after the checkpoint, of which one was logged."""
    step = LlavaTraining.training_step

    def step_and_die(self, batch, batch_idx):
        if self.global_step == 4 - 1:
            raise Killed
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LlavaTraining, "training_step", step_and_die)


def test_each_step_has_one_point_across_a_kill_and_a_resume(fit, monkeypatch):
    """A run killed between two saves had the steps after the first twice."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_step_4(patch)
        fit()
    events = EventAccumulator(str(fit())).Reload()
    tags = events.Tags()["scalars"]
    of_training = "loss grad_norm supervised_tokens samples_per_s tokens_per_s step_s mfu".split()
    for tag in ("lr-AdamW/adapter", "lr-AdamW/llm", *(f"train/{name}" for name in of_training)):
        assert tag in tags
        assert [point.step for point in events.Scalars(tag)] == [0, 1, 2, 3, 4, 5], tag
    assert [point.step for point in events.Scalars("val/loss")] == [2, 5]
    assert [point.step for point in events.Images("validation/images/0")] == [2, 5]


def test_a_new_run_hides_what_one_without_a_checkpoint_has_logged(fit, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LlavaTraining, "on_save_checkpoint", Mock(side_effect=Killed))
        fit()
    events = EventAccumulator(str(fit())).Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("average", ["llava", "tokens"])
def test_the_loss_of_a_step_is_the_mean_over_its_micro_batches(average, fit, monkeypatch):
    """It was that of the last one."""
    losses = []
    tokens = []
    backward = LlavaTraining.backward

    def recorded(self, loss, *args, **kwargs):
        losses.append(loss.item())
        return backward(self, loss, *args, **kwargs)

    loss = LlavaTraining.loss

    def counted(self, batch):
        if self.trainer.training and not self.trainer.validating:
            tokens.append(batch["supervised"])
        return loss(self, batch)

    monkeypatch.setattr(LlavaTraining, "backward", recorded)
    monkeypatch.setattr(LlavaTraining, "loss", counted)
    run = fit("--model.loss_average", average, "--data.val_annotations", "null")
    events = EventAccumulator(str(run)).Reload()
    logged = torch.tensor([point.value for point in events.Scalars("train/loss")])
    # Lightning has divided by the number of micro-batches
    torch.testing.assert_close(logged, torch.tensor(losses).view(6, 2).sum(1))
    counts = [point.value for point in events.Scalars("train/supervised_tokens")]
    assert counts == torch.tensor(tokens).view(6, 2).sum(1).tolist()
    assert min(tokens) != max(tokens)
