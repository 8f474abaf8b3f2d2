"""Probe heads and normalisations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from probes.heads import FEATURE_NORMS, HEADS, HIDDEN, Probe, register_head

pytestmark = pytest.mark.numerics

GRID = (2, 3)


@pytest.mark.parametrize("norm", FEATURE_NORMS)
def test_linear_probe_is_linear_in_normalised_states(norm):
    probe = Probe(
        5,
        3,
        GRID,
        norm,
    ).eval()
    states = torch.randn(2, 6, 5)
    normalised = {"layernorm": F.layer_norm(states, (5,))}.get(norm, states)
    scale = (
        1 / (1 + 1e-5) ** 0.5 if norm == "batchnorm" else 1.0
    )  # running statistics of a fresh probe
    expected = normalised * scale @ probe.head.weight.T + probe.head.bias
    torch.testing.assert_close(probe(states), expected)
    assert sum(p.numel() for p in probe.parameters()) == 5 * 3 + 3, (
        "only the linear layer is trained"
    )


def test_mlp_is_two_layers_of_one_hidden_width():
    probe = Probe(
        5,
        3,
        GRID,
        head="mlp",
    )
    states = torch.randn(2, 6, 5)
    first, _, second = probe.head
    hidden = F.gelu(states @ first.weight.T + first.bias)
    assert hidden.shape[-1] == HIDDEN
    torch.testing.assert_close(probe(states), hidden @ second.weight.T + second.bias)


def test_conv_sums_over_the_neighbours_on_the_grid():
    probe = Probe(
        5,
        3,
        GRID,
        head="conv",
    )
    states = torch.randn(2, 6, 5)
    weight = probe.head.conv.weight
    bias = probe.head.conv.bias
    logits = probe(states)
    for token in range(6):
        row, column = divmod(token, GRID[1])
        expected = bias.expand(2, -1).clone()
        for other in range(6):
            down, right = (
                a - b for a, b in zip(divmod(other, GRID[1]), (row, column), strict=True)
            )
            if max(abs(down), abs(right)) <= 1:
                expected += states[:, other] @ weight[:, :, 1 + down, 1 + right].T
        torch.testing.assert_close(logits[:, token], expected)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("images", [0, 1, 3])
def test_every_head_returns_logits_for_any_number_of_images(head, images):
    """With 0 images, because a rank without an image takes part in the backward."""
    probe = Probe(
        5,
        3,
        GRID,
        head=head,
    )
    logits = probe(torch.randn(images, 6, 5))
    assert logits.shape == (images, 6, 3)
    logits.sum().backward()
    assert all(p.grad is not None and (images or not p.grad.any()) for p in probe.parameters())


def test_a_name_of_a_head_is_given_once(monkeypatch):
    monkeypatch.setattr("probes.heads.HEADS", dict(HEADS))
    register_head("new", nn.Linear)
    with pytest.raises(ValueError, match="the head name 'new' is taken"):
        register_head("new", nn.Linear)
