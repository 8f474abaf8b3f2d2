"""Recomputed layers: which they are, and that gradients stay the same."""

import pytest
import tiny_models
import torch

from llava_bidir.common.errors import UserError
from llava_bidir.model.activation_checkpointing import checkpoint_layers, count_checkpointed

LAYERS = 3


def forwards_and_gradients(setting: bool | int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Return how often each layer's attention ran in a step, and the gradients."""
    model = tiny_models.model("bidirectional").train()
    checkpoint_layers(model.model.language_model, setting)
    counts = [0] * LAYERS

    def count(layer: int):
        def add(module, args, kwargs):
            counts[layer] += 1

        return add

    for i, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.register_forward_pre_hook(count(i), with_kwargs=True)
    ids, mask = tiny_models.ids("tiiiitttt", "tiiiitt")
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": tiny_models.pixels(2)}
    model(**inputs, labels=ids, use_cache=False).loss.backward()
    return counts, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [(False, [1, 1, 1]), (True, [2, 2, 2]), (0, [1, 1, 1]), (1, [2, 1, 1]), (2, [2, 2, 1]), (3, [2, 2, 2])],
)
def test_the_first_layers_are_recomputed_and_gradients_stay(setting, expected):
    counts, gradients = forwards_and_gradients(setting)
    assert counts == expected
    without = forwards_and_gradients(False)[1]
    assert gradients.keys() == without.keys() and len(gradients) > 9 * LAYERS
    for name, gradient in without.items():
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("setting", [4, -1])
def test_other_numbers_are_errors(setting):
    with pytest.raises(UserError, match=f"a number of layers from 0 to 3, got {setting}"):
        count_checkpointed(setting, LAYERS)
