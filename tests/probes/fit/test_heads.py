"""Probe heads and normalisations."""

import pytest
import torch
import torch.nn.functional as F

from probes.heads import FEATURE_NORMS, HEADS, HIDDEN, Probe

pytestmark = pytest.mark.numerics

GRID = (2, 3)


def new(head: str = "linear", norm: str = "none") -> Probe:
    """Return a probe of five channels and three classes."""
    return Probe(width=5, classes=3, grid=GRID, feature_norm=norm, head=head)


@pytest.mark.parametrize("norm", FEATURE_NORMS)
def test_linear_probe_is_linear_in_normalised_states(norm):
    probe = new(norm=norm).eval()
    states = torch.randn(2, 6, 5)
    by_fresh_statistics = states / (1 + 1e-5) ** 0.5
    normalised = {
        "layernorm": F.layer_norm(states, (5,)),
        "batchnorm": by_fresh_statistics,
        "batchnorm_affine": by_fresh_statistics,
    }.get(norm, states)
    expected = normalised @ probe.head.weight.T + probe.head.bias
    torch.testing.assert_close(probe(states), expected)
    of_norm = {"batchnorm_affine": 2 * 5}.get(norm, 0)  # of others nothing is trained
    assert sum(p.numel() for p in probe.parameters()) == 5 * 3 + 3 + of_norm


def test_mlp_is_two_layers_of_one_hidden_width():
    probe = new("mlp")
    states = torch.randn(2, 6, 5)
    first, _, second = probe.head
    hidden = F.gelu(states @ first.weight.T + first.bias)
    assert hidden.shape[-1] == HIDDEN
    torch.testing.assert_close(probe(states), hidden @ second.weight.T + second.bias)


def test_conv_sums_over_the_neighbours_on_the_grid():
    probe = new("conv")
    states = torch.randn(2, 6, 5)
    conv = probe.head.conv
    logits = probe(states)
    for token in range(6):
        row, column = divmod(token, GRID[1])
        expected = conv.bias.expand(2, -1).clone()
        for other in range(6):
            down = other // GRID[1] - row
            right = other % GRID[1] - column
            if max(abs(down), abs(right)) <= 1:
                expected += states[:, other] @ conv.weight[:, :, 1 + down, 1 + right].T
        torch.testing.assert_close(logits[:, token], expected)


@pytest.mark.parametrize("head", HEADS)
def test_a_rank_without_an_image_takes_part_in_the_backward(head):
    probe = new(head)
    logits = probe(torch.randn(0, 6, 5))
    assert logits.shape == (0, 6, 3)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in probe.parameters())
