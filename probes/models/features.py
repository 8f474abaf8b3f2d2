"""What states look like by themselves: similarity of patches, and colours of their main directions.

Shapes: B images, T = h w image tokens, d width of a site.
"""

from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import normalize


def similarity(states: Tensor, patch: int) -> Tensor:
    """Return the cosine of each state f[T, d] with that of a patch, f32[T]; 0 for a state of zeros."""
    unit = normalize(states.float(), dim=-1)
    return unit @ unit[patch]


def pca_colours(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return colours of the first three principal components of the states at each site, f32[B, h, w, 3] in 0..1.

    They are fitted over all images of the batch together. Red, green and blue are the components by falling variance;
    the patch that is farthest from the mean is on the positive side of each; 0 and 1 are the extremes of all patches.

    Args:
        states: f[B, T, d] by site, of a square grid, or f[B, h, w, d] from `mllm.to_grid`.
    """
    return {site: _colours(of_site) for site, of_site in states.items()}


def _colours(states: Tensor) -> Tensor:
    if states.ndim == 3:
        side = isqrt(states.shape[1])
        states = states.unflatten(1, (side, side))
    x = states.flatten(0, -2).double()
    x = x - x.mean(0)
    scores = torch.zeros(len(x), 3, dtype=x.dtype, device=x.device)
    if len(x) <= x.shape[1]:
        variance, vectors = torch.linalg.eigh(x @ x.T)
        vectors = vectors * variance.clamp(min=0).sqrt()
    else:
        vectors = x @ torch.linalg.eigh(x.T @ x).eigenvectors
    main = vectors.flip(1)[:, :3]
    scores[:, : main.shape[1]] = main * main.gather(0, main.abs().argmax(0, keepdim=True)).sign()
    low, high = scores.aminmax(dim=0)
    colours = (scores - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)
    return colours.float().unflatten(0, states.shape[:-1])
