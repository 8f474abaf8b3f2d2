"""A loss that is not finite ends the run before the weights change; a loss outside the range causes a warning."""

import logging
from types import SimpleNamespace

import pytest
import tiny_models
import torch

from llava_bidir.cli import main
from llava_bidir.training.loss_monitor import LossMonitor
from llava_bidir.training.module import LlavaTraining


def arguments(parts, conversations, out) -> list[str]:
    shorter = ["--data.micro_batch_size", "2", "--trainer.log_every_n_steps", "1", "--out", str(out)]
    return ["fit", *tiny_models.training_arguments(parts, conversations), *shorter]


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(parts, conversations, tmp_path, monkeypatch):
    loss, seen, weights = LlavaTraining.loss, [], []

    def nan_in_step_2(self, batch):
        if self.trainer.sanity_checking or not self.trainer.training:
            return loss(self, batch)
        seen.append(batch["ids"])
        if len(seen) == 3:  # first micro-batch of the second step
            weights.append({n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad})
        return loss(self, batch) * (float("nan") if len(seen) == 3 else 1.0)

    monkeypatch.setattr(LlavaTraining, "loss", nan_in_step_2)
    with pytest.raises(SystemExit, match=r"loss is not finite at step 1: samples r\d+, r\d+\. .*nonfinite has"):
        main(arguments(parts, conversations, tmp_path))
    window = torch.load(tmp_path / "nonfinite/rank0.pt", weights_only=False)
    assert [item["batch"]["ids"] for item in window] == seen[2:4]
    assert [torch.tensor(item["loss"]).isfinite().item() for item in window] == [False, True]
    before = torch.load(tmp_path / "nonfinite/before.ckpt", weights_only=True)["state_dict"]
    assert before.keys() == {"model." + name for name in weights[0]}
    assert all(torch.equal(before["model." + name], tensor) for name, tensor in weights[0].items())
    assert not (tmp_path / "hf").exists()


def test_mean_continues_after_a_resume():
    """It began anew, so that a resumed run warned of its first micro-batches if their answers were short."""
    run = SimpleNamespace(accumulate_grad_batches=1, global_step=500, log_every_n_steps=1)
    run.strategy = SimpleNamespace(reduce_boolean_decision=lambda finite, all: finite)

    def train(monitor, loss):
        monitor.on_train_batch_start(run, None, {}, 0)
        monitor.on_before_backward(run, None, torch.tensor(loss))
        monitor.on_before_optimizer_step(run, None, None)

    before, after = LossMonitor((0.5, 1.4)), LossMonitor((0.5, 1.4))
    for _ in range(50):
        train(before, 0.9)
    after.load_state_dict(before.state_dict())
    train(after, 0.1)
    assert not after.warned and float(after.mean) == pytest.approx(0.98 * 0.9 + 0.02 * 0.1)


@pytest.mark.parametrize(("band", "warned"), [("[0.0, 1000.0]", 0), ("[500.0, 1000.0]", 1)])
def test_leaving_the_band_warns_once(band, warned, parts, conversations, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "llava_bidir.training.loss_monitor"):
        main([*arguments(parts, conversations, tmp_path), "--loss_monitor.expected", band])
    assert sum("the loss is about" in record.message for record in caplog.records) == warned
