"""A loss that is not finite ends the run before the weights change."""

import pytest
import tiny_models
import torch

from llava_bidir.training.module import LlavaTraining


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(
    parts,
    conversations,
    tmp_path,
    monkeypatch,
):
    loss = LlavaTraining.loss
    seen = []
    weights = []

    def nan_in_step_2(self, batch):
        if self.trainer.sanity_checking or not self.trainer.training:
            return loss(self, batch)
        seen.append(batch["ids"])
        if len(seen) == 3:  # first micro-batch of the second step
            weights.append(
                {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
            )
        return loss(self, batch) * (float("nan") if len(seen) == 3 else 1.0)

    monkeypatch.setattr(LlavaTraining, "loss", nan_in_step_2)
    more = "--data.micro_batch_size 2 --trainer.log_every_n_steps 1"
    with pytest.raises(
        SystemExit, match=r"loss is not finite at step 1: samples r\d+, r\d+\. .*nonfinite has"
    ):
        tiny_models.fit(parts, conversations, tmp_path, *more.split())
    window = torch.load(tmp_path / "nonfinite/rank0.pt", weights_only=False)
    assert [item["batch"]["ids"] for item in window] == seen[2:4]
    assert [torch.tensor(item["loss"]).isfinite().item() for item in window] == [False, True]
    before = torch.load(tmp_path / "nonfinite/before.ckpt", weights_only=True)["state_dict"]
    assert before.keys() == {"model." + name for name in weights[0]}
    assert all(torch.equal(before["model." + name], tensor) for name, tensor in weights[0].items())
    assert not (tmp_path / "hf").exists()
