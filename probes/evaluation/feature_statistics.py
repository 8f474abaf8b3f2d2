"""What the states of a site look like, whatever a probe makes of them: their scale, direction and neighbourhoods.

Legend: S sites, B N images, T image tokens, d width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

NEIGHBOURS = 10


class StateStatistics(Metric):
    """Statistics of the states at each site over a dataset, streaming, over batches and ranks.

    - rms: root mean square over images, tokens and channels. A probe on states as they are learns at a speed that
      follows it.
    - largest_channel: share of all energy (sum of squares) that the strongest channel has; 1 / d if all are alike.
      Large where there are massive activations.
    - anisotropy: mean cosine of two tokens of different images, over all such pairs. 0 for directions at random, 1 if
      all point one way. With u the unit vectors and U_i the sum of those of image i, the cosines of all pairs sum to
      |sum_i U_i|^2 - sum_i |U_i|^2. Source: Ethayarajh 2019, "How contextual are contextualized word representations?"
    - knn_purity: share of the 10 nearest labelled tokens of the same image, by cosine, that have a token's own class
      (that of most of its pixels); mean over the labelled tokens of an image, then over images. Images with fewer than
      11 labelled tokens do not count.

    Args:
        widths: d by site.
        images: Size of the dataset; `compute` insists on having seen each of its images once.
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
        """Adds images: `states` f[B, T, d] by site, `labels` i64[B, T] (-1 for none), `index` i64[B]."""
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
        """{site: {"rms", "largest_channel", "anisotropy", "knn_purity"}}; None where nothing defines it.

        Raises:
            RuntimeError: An image of the dataset was not seen, or more than once.
        """
        if not (self.seen == 1).all():
            wrong = int((self.seen != 1).nonzero()[0])
            raise RuntimeError(f"statistics of states saw image {wrong} {int(self.seen[wrong])} times instead of once")
        return {site: self._statistics(site, width) for site, width in self.widths.items()}

    def _statistics(self, site: str, width: int) -> dict[str, float | None]:
        energy, unit, within, purity = (getattr(self, f"{x}_{site}") for x in ("energy", "unit", "within", "purity"))
        return {
            "rms": (energy.sum() / (self.tokens * width)).sqrt().item(),
            "largest_channel": _ratio(energy.max(), energy.sum()),
            "anisotropy": _ratio(unit.square().sum() - within, self.tokens.square() - self.squared_pairs),
            "knn_purity": _ratio(purity, self.pure_images),
        }


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return (part / whole).item() if whole > 0 else None


def enough_labels(labels: Tensor) -> Tensor:
    """bool[B]: whether an image's labelled tokens have enough neighbours, from i64[B, T] with -1 for none."""
    return (labels >= 0).sum(1) > NEIGHBOURS


def knn_purity(unit: Tensor, labels: Tensor) -> Tensor:
    """f64[B]: share of a token's nearest labelled tokens that have its label, mean over the image's labelled tokens.

    NaN for images with too few of them.

    Args:
        unit: f[B, T, d], of length 1.
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
