"""Statistics of the states of a site, independent of probes: scale, direction and neighbourhoods.

Legend: B images, T image tokens, d width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

NEIGHBOURS = 10


class StateStatistics(Metric):
    """Streaming statistics of the states at each site of a dataset, over batches and ranks.

    - rms: root mean square over images, tokens and channels. The learning speed of a probe without normalisation
      depends on it.
    - largest_channel: share of the energy (sum of squares) in the strongest channel; 1 / d if all are equal. It is
      large if there are massive activations.
    - anisotropy: mean cosine of two tokens of different images, over all such pairs; 0 for random directions, 1 for
      identical ones. With U_i the sum of the unit vectors of image i, the cosines of all pairs sum to
      |sum_i U_i|^2 - sum_i |U_i|^2. Source: Ethayarajh 2019, "How contextual are contextualized word representations?"
    - knn_purity: share of the 10 nearest labelled tokens of the same image, by cosine, that have the token's class
      (the class of most of its pixels). It is averaged over the labelled tokens of an image, then over images. Images
      with fewer than 11 labelled tokens are excluded.

    Args:
        widths: d per site.
        images: Size of the dataset; `compute` requires each image exactly once.
    """

    full_state_update = False

    def __init__(self, widths: Mapping[str, int], images: int):
        super().__init__()
        self.widths = dict(widths)
        add = lambda name, *shape: self.add_state(name, torch.zeros(*shape, dtype=torch.float64), dist_reduce_fx="sum")
        add("tokens", 1)
        add("seen", images)
        add("squared_pairs", 1)  # sum over images of T^2
        add("pure_images", 1)
        for site, width in self.widths.items():
            add(f"energy_{site}", width)
            add(f"unit_{site}", width)
            add(f"within_{site}", 1)
            add(f"purity_{site}", 1)

    def update(self, states: Mapping[str, Tensor], labels: Tensor, index: Tensor) -> None:
        """Add images: `states` f[B, T, d] by site, `labels` i64[B, T] (-1 for none), `index` i64[B]."""
        images, tokens = labels.shape
        self.seen += torch.bincount(index, minlength=len(self.seen))
        self.tokens += images * tokens
        self.squared_pairs += images * tokens**2
        self.pure_images += enough_labels(labels).sum()
        for site in self.widths:
            self._add(site, states[site].float(), labels)

    def _add(self, site: str, states: Tensor, labels: Tensor) -> None:
        unit = F.normalize(states, dim=-1)
        by_image = unit.sum(1).double()
        for name, value in (
            ("energy", states.square().sum((0, 1))),
            ("unit", by_image.sum(0)),
            ("within", by_image.square().sum()),
            ("purity", knn_purity(unit, labels).nansum()),
        ):
            getattr(self, f"{name}_{site}").add_(value)

    def compute(self) -> dict[str, dict[str, float | None]]:
        """Return {site: {"rms", "largest_channel", "anisotropy", "knn_purity"}}; None for an undefined value.

        Raises:
            RuntimeError: If an image of the dataset was not seen exactly once.
        """
        if not (self.seen == 1).all():
            wrong = int((self.seen != 1).nonzero()[0])
            raise RuntimeError(f"statistics of states: image {wrong} was seen {int(self.seen[wrong])} times, not once")
        return {site: self._statistics(site, width) for site, width in self.widths.items()}

    def _statistics(self, site: str, width: int) -> dict[str, float | None]:
        energy, unit, within, purity = (getattr(self, f"{x}_{site}") for x in ("energy", "unit", "within", "purity"))
        return {
            "rms": (energy.sum() / (self.tokens * width)).sqrt().item(),
            "largest_channel": _ratio(energy.max(), energy.sum()),
            "anisotropy": _ratio(unit.square().sum() - within, self.tokens.square() - self.squared_pairs),
            "knn_purity": _ratio(purity, self.pure_images),
        }


def _ratio(part: Tensor, total: Tensor) -> float | None:
    return (part / total).item() if total > 0 else None


def enough_labels(labels: Tensor) -> Tensor:
    """Return whether each image has enough labelled tokens, bool[B], from labels i64[B, T] with -1 for none."""
    return (labels >= 0).sum(1) > NEIGHBOURS


def knn_purity(unit: Tensor, labels: Tensor) -> Tensor:
    """Return the mean share of a token's nearest labelled tokens that have its label, f64[B].

    NaN for images with too few labelled tokens.

    Args:
        unit: Unit vectors f[B, T, d].
        labels: i64[B, T], -1 for none.
    """
    purity = torch.full((len(labels),), torch.nan, dtype=torch.float64, device=labels.device)
    enough = enough_labels(labels)
    unit, labels = unit[enough], labels[enough]
    if not len(labels):
        return purity
    labelled = labels >= 0
    cosine = unit @ unit.transpose(1, 2)
    cosine.masked_fill_(~labelled[:, None], -torch.inf).diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    nearest = cosine.topk(NEIGHBOURS).indices  # [B, T, k]
    same = labels[:, None].expand_as(cosine).gather(2, nearest) == labels[..., None]
    share = same.double().mean(-1)
    purity[enough] = (share * labelled).sum(1) / labelled.sum(1)
    return purity
