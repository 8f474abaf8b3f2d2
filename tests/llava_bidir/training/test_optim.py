"""Weight decay by parameter; the nightly peers/llava compares complete trainings with LLaVA's own."""

import tiny_models
import torch

from llava_bidir.model.build import set_trainable
from llava_bidir.training.optim import build_optimizer

RATES = {"adapter": 0.1, "llm": 0.2}


def optimizer(model, weight_decay: float) -> torch.optim.AdamW:
    set_trainable(model, ["adapter", "llm"])
    return build_optimizer(
        model,
        RATES,
        (0.9, 0.999),
        weight_decay,
        fused=False,
    )


def test_matrices_decay_and_biases_and_norms_do_not():
    """A step with zero gradients is the decay alone."""
    model = tiny_models.model()
    adamw = optimizer(model, 0.5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    adamw.step()
    decayed = set()
    for name, parameter in model.named_parameters():
        rate = RATES["adapter" if "projector" in name else "llm"]
        if torch.equal(parameter, before[name]):
            continue
        torch.testing.assert_close(parameter, before[name] * (1 - 0.5 * rate))
        decayed.add(name)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert decayed == {n for n in trained if not n.endswith("bias") and "norm" not in n}
    assert {"lm_head.weight", "model.multi_modal_projector.linear_1.weight"} <= decayed


def test_partitioned_matrices_decay():
    """Under ZeRO-3, parameters are flat and empty; `ds_shape` is their shape."""
    model = tiny_models.model()
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    groups = optimizer(model, 0.5).param_groups
    assert [group["name"] for group in groups] == [
        "adapter",
        "adapter_biases_and_norms",
        "llm",
        "llm_biases_and_norms",
    ]
    for group in groups:
        dimensions = {len(p.ds_shape) for p in group["params"]}
        assert dimensions == ({1} if group["name"].endswith("norms") else {2})
        assert group["weight_decay"] == (0.0 if group["name"].endswith("norms") else 0.5)
