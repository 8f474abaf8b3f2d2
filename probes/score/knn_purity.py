"""How well the classes of a site's states stand apart, independent of probes.

Legend: B images, T image tokens, d width.
"""

import torch
from torch import Tensor

NEIGHBOURS = 10


def knn_purity(unit: Tensor, labels: Tensor) -> Tensor:
    """Return the share of the 10 nearest labelled tokens of an image, by cosine, that have a token's label, f64[B].

    It is a mean over the labelled tokens of an image; NaN if there are fewer than 11.

    Args:
        unit: Unit vectors f[B, T, d].
        labels: i64[B, T], -1 for none.
    """
    purity = torch.full((len(labels),), torch.nan, dtype=torch.float64, device=labels.device)
    enough = (labels >= 0).sum(1) > NEIGHBOURS
    unit = unit[enough]
    labels = labels[enough]
    if not len(labels):
        return purity
    labelled = labels >= 0
    cosine = unit @ unit.transpose(1, 2)
    cosine.masked_fill_(~labelled[:, None], -torch.inf)
    cosine.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    nearest = cosine.topk(NEIGHBOURS).indices  # [B, T, k]
    same = labels[:, None].expand_as(cosine).gather(2, nearest) == labels[..., None]
    share = same.double().mean(-1)
    purity[enough] = (share * labelled).sum(1) / labelled.sum(1)
    return purity
