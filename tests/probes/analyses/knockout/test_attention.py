"""Attention seen through the interface, against transformers' own eager weights."""

import pytest
import reference
import tiny_models
import torch
from tolerances import rounding

import probes
from probes.analyses.knockout.attention import attention_from, sum_by_group

pytestmark = pytest.mark.numerics

LOOKING = [torch.tensor([True, False, False, True]), torch.tensor([False, True, True, True])]


@pytest.mark.parametrize("name", ["causal", "bidirectional", "prefix"])
def test_equals_eager_attention(checkpoints, name):
    mllm = probes.load(str(checkpoints[name]))
    pixels = tiny_models.pixels(2)
    prefix = mllm.prefix_ids.shape[1]
    paid, itself = attention_from(mllm, pixels, [(0, LOOKING[0]), (1, LOOKING[1]), (0, LOOKING[1])])
    eager = reference.eager_attention(mllm, pixels)
    for case, (row, looking) in enumerate([(0, LOOKING[0]), (1, LOOKING[1]), (0, LOOKING[1])]):
        tokens = [prefix + t for t in range(4) if looking[t]]
        for layer in range(3):
            weights = eager[layer][row].mean(0)
            torch.testing.assert_close(
                paid[case, layer], weights[tokens][:, prefix:].mean(0), **rounding(weights, 3)
            )
            own = torch.stack([weights[t, t] for t in tokens]).mean()
            torch.testing.assert_close(itself[case, layer], own, **rounding(weights, 3))


def test_groups_partition_the_attention():
    attention = torch.tensor([[0.2, 0.3, 0.25, 0.15]])  # the remaining 0.1 goes to the prefix
    correct = torch.tensor([True, False, False, False])
    incorrect = torch.tensor([False, True, True, False])
    groups = sum_by_group(attention, torch.tensor([0.05]), correct, incorrect)
    torch.testing.assert_close(groups, torch.tensor([[0.05, 0.2, 0.5, 0.15, 0.1]]))
    assert groups.sum() == pytest.approx(1)
