"""Layers that have learned nothing from pictures, in many ways: negatives on which the verdicts are tried.

Draws of a study have one distribution of weights each. Whatever random layers do beyond them by their scale, spectrum
or attention must not be taken for learning; `make calibrate` counts how often it is.

    shuffled           the entries of each trained matrix in random order
    normal_0.02 ...    normal weights of this standard deviation, from the one of an initialisation to 16 times it
    orthogonal         orthogonal matrices
    uniform            uniform weights, of standard deviation 0.08 as in the rows below
    sharp, flat        normal weights; queries and keys times 4 or 1/20
    repeated           one random layer in place of all
    low_rank           normal weights of rank 8
    reordered          the trained layers in another order
    exchanged          the trained attention heads, exchanged between layers

Norms of drawn layers are one. The last two rows keep what was trained: they are negatives of an LLM that has not seen
pictures.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from probes.models.random_weights import permute_weights
from probes.worlds.plant import plant_random

SD = 0.08  # of normal weights with another property; four times that of an initialisation
SCALES = (0.02, 0.04, 0.08, 0.16, 0.32)
RANK = 8


def draw_weights(draw: Callable[[Tensor], object], layers: nn.ModuleList) -> None:
    """Draw each matrix, and set the norms to one."""
    for weight in layers.parameters():
        if weight.ndim > 1:
            draw(weight)
        else:
            weight.fill_(1)


def draw_normal(layers: nn.ModuleList, sd: float = SD) -> None:
    """Draw normal weights."""
    draw_weights(partial(nn.init.normal_, std=sd), layers)


def draw_uniform(layers: nn.ModuleList) -> None:
    """Draw uniform weights of the same variance."""
    bound = SD * 3**0.5
    draw_weights(partial(nn.init.uniform_, a=-bound, b=bound), layers)


def draw_low_rank(layers: nn.ModuleList) -> None:
    """Draw products of normal matrices of `RANK` columns and rows, with the same variance."""

    def draw(weight: Tensor) -> None:
        rows, columns = weight.shape
        left = torch.randn(rows, RANK)
        right = torch.randn(RANK, columns)
        product = left @ right
        weight.copy_(SD / RANK**0.5 * product)

    draw_weights(draw, layers)


def scale_attention(layers: nn.ModuleList, factor: float) -> None:
    """Draw normal weights, and multiply those of queries and keys."""
    draw_normal(layers)
    for layer in layers:
        attention = layer.self_attn
        attention.q_proj.weight.mul_(factor)
        attention.k_proj.weight.mul_(factor)


def repeat_layer(layers: nn.ModuleList) -> None:
    """Draw normal weights of one layer, and give them to all."""
    draw_normal(layers)
    first = layers[0].state_dict()
    for layer in layers[1:]:
        layer.load_state_dict(first)


def reorder_layers(layers: nn.ModuleList) -> None:
    """Put the layers into another order; none stays where it was."""
    shift = int(torch.randint(1, len(layers), ()))
    order = torch.randperm(len(layers))
    before = [copy.deepcopy(layer.state_dict()) for layer in layers]
    places = order.tolist()
    sources = order.roll(shift).tolist()
    for place, source in zip(places, sources, strict=True):
        layers[place].load_state_dict(before[source])


def exchange_heads(layers: nn.ModuleList) -> None:
    """Exchange attention heads at random between all layers; each keeps its queries, keys, values and output."""
    heads_per_layer = len(_heads(layers[0], "q_proj"))
    order = torch.randperm(len(layers) * heads_per_layer)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        heads = torch.cat([_heads(layer, name) for layer in layers])
        exchanged = heads[order].chunk(len(layers))
        for layer, of_layer in zip(layers, exchanged, strict=True):
            _heads(layer, name).copy_(of_layer)


def _heads(layer: nn.Module, name: str) -> Tensor:
    """Return a view of a projection's weights with the attention heads first."""
    weight = getattr(layer.self_attn, name).weight
    if name == "o_proj":
        weight = weight.T
    size = layer.self_attn.head_dim
    return weight.unflatten(0, (-1, size))


FAMILIES: dict[str, Callable[[nn.ModuleList], None]] = {
    "shuffled": permute_weights,
    **{f"normal_{sd}": partial(draw_normal, sd=sd) for sd in SCALES},
    "orthogonal": partial(draw_weights, nn.init.orthogonal_),
    "uniform": draw_uniform,
    "sharp": partial(scale_attention, factor=4.0),
    "flat": partial(scale_attention, factor=0.05),
    "repeated": repeat_layer,
    "low_rank": draw_low_rank,
    "reordered": reorder_layers,
    "exchanged": exchange_heads,
}
# They keep trained weights: of an LLM that has seen pictures they are no negatives.
OF_LANGUAGE = ("reordered", "exchanged")
# Added to the seed of those that draw weights. A random control of the same seed draws in the same order: it would be
# the same LLM, or a scaled copy of it.
SEED_OF_DRAWS = 500_009


def edit_layers(weights: str, seed: int, layers: nn.ModuleList) -> None:
    """Replace the layers in place by those of one of :data:`FAMILIES`."""
    if weights not in ("shuffled", *OF_LANGUAGE):
        seed += SEED_OF_DRAWS
    torch.manual_seed(seed)
    FAMILIES[weights](layers)


def main(words: list[str]) -> None:
    """Write a copy of a checkpoint with other layers: WEIGHTS MODEL OUT SEED."""
    weights, model, out, seed = words
    edit = partial(edit_layers, weights, int(seed))
    plant_random(Path(model), Path(out), weights=weights, edit=edit, seed=int(seed))
