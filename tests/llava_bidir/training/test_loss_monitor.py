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
    trained = []
    weights = []

    def nan_in_step_2(self, batch):
        if self.trainer.sanity_checking or not self.trainer.training:
            return loss(self, batch)
        seen.append(batch["ids"])
        trained.append(self.model)
        if len(seen) == 3:  # first micro-batch of the second step
            weights.append(
                {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
            )
        return loss(self, batch) * (float("nan") if len(seen) == 3 else 1.0)

    monkeypatch.setattr(LlavaTraining, "loss", nan_in_step_2)
    more = "--data.micro_batch_size 2 --trainer.log_every_n_steps 1"
    with pytest.raises(
        SystemExit, match=r"loss is not finite at step 1: samples r\d+, r\d+$"
    ) as stop:
        tiny_models.fit(parts, conversations, tmp_path, *more.split())
    assert stop.value.code.endswith(", ".join(seen[2]))
    for name, parameter in weights[0].items():
        assert torch.equal(dict(trained[0].named_parameters())[name], parameter), name
    assert not (tmp_path / "hf").exists()
