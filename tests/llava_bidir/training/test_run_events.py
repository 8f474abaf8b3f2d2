"""Each step has one point of each metric in TensorBoard, also where a run was killed and resumed."""

from unittest.mock import Mock

import pytest
import tiny_models
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import points

from llava_bidir.training.module import LlavaTraining

OPTIONS = "--data.micro_batch_size 2 --trainer.max_epochs 2 --trainer.log_every_n_steps 1"
OPTIONS += " --throughput.peak_tflops 1 --checkpoints.every_n_steps 2 --ckpt_path last"
OF_TRAINING = "loss grad_norm supervised_tokens samples_per_s tokens_per_s step_s mfu".split()


class Killed(BaseException):
    """Ends a run at once, as SIGKILL would: nothing that is not written yet is written."""


@pytest.fixture
def fit(parts, conversations, tmp_path):
    """Train six steps of two micro-batches, with a checkpoint after each two, and return the folder."""
    return lambda *more: tiny_models.fit(
        parts, conversations, tmp_path / "run", *OPTIONS.split(), *more
    )


def test_each_step_has_one_point_across_a_kill_and_a_resume(fit, monkeypatch):
    """A run killed between two saves had the steps after the first twice."""
    step = LlavaTraining.training_step

    def die_in_step_4(self, batch, batch_idx):
        if (
            self.global_step == 3
        ):  # after the checkpoint of the second, and one more that was logged
            raise Killed
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LlavaTraining, "training_step", die_in_step_4)
        fit()
    run = fit()
    for tag in ("lr-AdamW/adapter", "lr-AdamW/llm", *(f"train/{name}" for name in OF_TRAINING)):
        assert [step for step, _ in points(run, tag)] == [0, 1, 2, 3, 4, 5], tag
    assert [step for step, _ in points(run, "val/loss")] == [2, 5]
    images = EventAccumulator(str(run)).Reload().Images("validation/images/0")
    assert [image.step for image in images] == [2, 5]


def test_a_new_run_hides_what_one_without_a_checkpoint_has_logged(fit, monkeypatch):
    without_validation = ("--data.val_annotations", "null")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LlavaTraining, "on_save_checkpoint", Mock(side_effect=Killed))
        fit(*without_validation)
    assert [step for step, _ in points(fit(*without_validation))] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("average", ["llava", "tokens"])
def test_the_loss_of_a_step_is_the_mean_over_its_micro_batches(average, fit, monkeypatch):
    """It was that of the last one."""
    losses = []
    tokens = []
    step = LlavaTraining.training_step

    def recorded(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        losses.append(loss.item())
        tokens.append(batch["supervised"])
        return loss

    monkeypatch.setattr(LlavaTraining, "training_step", recorded)
    run = fit("--model.loss_average", average, "--data.val_annotations", "null")
    logged = torch.tensor([value for _, value in points(run)])
    torch.testing.assert_close(logged, torch.tensor(losses).view(6, 2).mean(1))
    counts = [value for _, value in points(run, "train/supervised_tokens")]
    assert counts == torch.tensor(tokens).view(6, 2).sum(1).tolist()
    assert min(tokens) != max(tokens)
