"""Weight decay by parameter; the nightly peers/llava compares complete trainings with LLaVA's own."""

import re

import pytest
import tiny_models
import torch

from llava_bidir.model.trainable import set_trainable
from llava_bidir.training.optim import build_optimizer

RATES = {"adapter": 0.1, "llm": 0.2}


@pytest.mark.parametrize("is_partitioned", [False, True])
def test_matrices_decay_and_biases_and_norms_do_not(is_partitioned):
    """Under ZeRO-3, parameters are flat and empty; `ds_shape` is their shape."""
    model = tiny_models.model()
    set_trainable(model, ["adapter", "llm"])
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter in model.parameters() if is_partitioned else ():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    adamw = build_optimizer(model, RATES, (0.9, 0.999), 0.5, fused=False)
    decays = {}
    for group in adamw.param_groups:
        part = group["name"].removesuffix("_biases_and_norms")
        assert group["weight_decay"] == (0.5 if group["name"] == part else 0.0)
        assert group["lr"] == RATES[part]
        decays |= {names[id(p)]: (part, group["weight_decay"]) for p in group["params"]}
    trained = (name for name, p in model.named_parameters() if p.requires_grad)
    assert decays == {
        name: (
            "adapter" if "projector" in name else "llm",
            0.0 if name.endswith("bias") or "norm" in name else 0.5,
        )
        for name in trained
    }


def test_of_the_encoder_only_weights_of_products_decay():
    """LLaVA-NeXT's code decays CLS and positions, which are matrices; its scripts have no decay."""
    model = tiny_models.model()
    set_trainable(model, ["encoder", "adapter", "llm"])
    rates = RATES | {"encoder": 0.3}
    names = {id(p): name for name, p in model.named_parameters()}
    adamw = build_optimizer(model, rates, (0.9, 0.999), 0.5, fused=False)
    of_encoder = [group for group in adamw.param_groups if group["name"].startswith("encoder")]
    assert {group["lr"] for group in of_encoder} == {0.3}
    decays = {
        names[id(p)].partition("vision_tower.")[2]: group["weight_decay"] > 0
        for group in of_encoder
        for p in group["params"]
    }
    products = r"(patch_embedding|[qkv]_proj|out_proj|fc[12])\.weight$"
    assert decays == {name: bool(re.search(products, name)) for name in decays}
    kinds = ("class_embedding", "position_embedding.weight", "layer_norm1.weight", "q_proj.weight")
    assert all(any(name.endswith(kind) for name in decays) for kind in kinds)
