"""Attention seen through the interface, against transformers' own eager weights."""

import pytest
import reference
import tiny_models
import torch
from tolerances import rounding

import probes
from probes.analyses.knockout.attention import attention_from

pytestmark = pytest.mark.numerics

LOOKING = [torch.tensor([True, False, False, True]), torch.tensor([False, True, True, True])]


@pytest.mark.parametrize("name", ["causal", "bidirectional", "prefix"])
def test_equals_eager_attention(checkpoints, name):
    mllm = probes.load(str(checkpoints[name]))
    pixels = tiny_models.pixels(2)
    prefix = mllm.prefix_ids.shape[1]
    paid = attention_from(mllm, pixels, [(0, LOOKING[0]), (1, LOOKING[1]), (0, LOOKING[1])])
    eager = reference.eager_attention(mllm, pixels)
    for case, (row, looking) in enumerate([(0, LOOKING[0]), (1, LOOKING[1]), (0, LOOKING[1])]):
        tokens = [prefix + t for t in range(4) if looking[t]]
        for layer in range(3):
            weights = eager[layer][row].mean(0)
            torch.testing.assert_close(
                paid[case, layer], weights[tokens][:, prefix:].mean(0), **rounding(weights, 3)
            )
