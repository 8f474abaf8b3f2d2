"""Rows of several samples with restarting positions, as padding-free fine-tuning makes them, are refused."""

import pytest
import tiny_models
import torch

from llava_bidir import IMAGE_ATTENTION


@pytest.mark.parametrize("name", IMAGE_ATTENTION)
def test_positions_that_restart_within_a_row_are_refused(name):
    """transformers separates such samples in some backends and caches, and mixes them in others."""
    model = tiny_models.model(name)
    ids, _ = tiny_models.ids("tiiiittttt")
    inputs = {"input_ids": ids, "pixel_values": tiny_models.pixels(1)}
    one = torch.arange(10)[None]
    packed = torch.cat([one[:, :7], one[:, :3]], 1)
    for options in ({}, {"use_cache": False}):
        for positions in (packed, one * 2):
            with pytest.raises(ValueError, match="position_ids restart within a row; pass one"):
                model(**inputs, position_ids=positions, **options)
    with pytest.raises(ValueError, match="position_ids restart within a row"):
        model.generate(**inputs, position_ids=packed, max_new_tokens=2, do_sample=False)
    expected = model(**inputs).logits
    for given in ({"position_ids": one}, {"position_ids": one, "attention_mask": ids > -1}):
        assert torch.equal(model(**inputs, **given).logits, expected)


def test_a_row_of_one_sample_keeps_the_fast_kernel():
    """A 4D mask would take sdpa's kernel for causal attention from it."""
    model = tiny_models.model("causal")
    ids, _ = tiny_models.ids("tiiiittt")
    got = []
    layers = model.model.language_model
    layers.register_forward_pre_hook(lambda *args: got.append(args[2]), with_kwargs=True)
    positions = torch.arange(ids.shape[1])[None]
    for given in ({}, {"position_ids": positions}, {"position_ids": positions + 3}):
        model(input_ids=ids, pixel_values=tiny_models.pixels(1), **given)
        assert got[-1]["attention_mask"] is None
