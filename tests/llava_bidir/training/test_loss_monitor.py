"""A loss that is not finite ends the run before it reaches the weights; one outside the band is a warning."""

import logging

import pytest
import tiny_models
import torch

from llava_bidir.cli import main
from llava_bidir.training.module import LlavaTraining


def arguments(parts, conversations, out) -> list[str]:
    return ["fit", *tiny_models.training_arguments(parts, conversations), "--out", str(out)] + [
        *("--data.batch_size", "4", "--data.micro_batch_size", "2", "--trainer.log_every_n_steps", "1"),
    ]


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(parts, conversations, tmp_path, monkeypatch):
    whole, seen, weights = LlavaTraining.loss, [], []

    def spoiled(self, batch):
        if self.trainer.sanity_checking or not self.trainer.training:
            return whole(self, batch)
        seen.append(batch["ids"])
        if len(seen) == 3:  # first micro-batch of the second step
            weights.append({n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad})
        return whole(self, batch) * (float("nan") if len(seen) == 3 else 1.0)

    monkeypatch.setattr(LlavaTraining, "loss", spoiled)
    with pytest.raises(SystemExit, match=r"loss is not finite at step 1: samples r\d+, r\d+\. .*nonfinite has"):
        main(arguments(parts, conversations, tmp_path))
    (kept,) = (tmp_path / "nonfinite").glob("rank*.pt")
    window = torch.load(kept, weights_only=False)
    assert [item["batch"]["ids"] for item in window] == seen[2:4]
    assert [torch.tensor(item["loss"]).isfinite().item() for item in window] == [False, True]
    before = torch.load(tmp_path / "nonfinite/before.ckpt", weights_only=True)["state_dict"]
    assert before.keys() == {"model." + name for name in weights[0]}
    assert all(torch.equal(before["model." + name], tensor) for name, tensor in weights[0].items())
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("band", "warned"), [("[0.0, 1000.0]", 0), ("[500.0, 1000.0]", 1)])
def test_leaving_the_band_warns_once(band, warned, parts, conversations, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "llava_bidir.training.loss_monitor"):
        main([*arguments(parts, conversations, tmp_path), "--loss_monitor.expected", band])
    said = [record for record in caplog.records if "runs like this one are between" in record.message]
    assert len(said) == warned
