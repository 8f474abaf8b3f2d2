"""Where the knockout is applied: windows of layers, and single heads.

All layers at once, as in the paper, says nothing about where patches are corrected; one layer alone may be made up for
by its neighbours (Geva et al., 2304.14767, cut windows for that reason). So each case is also run with

    single    layer l alone
    sliding   layers l .. l + k - 1
    from      layers l .. L
    up_to     layers 1 .. l
    head      one head of layer l

and the rate of wrong patches is read at every layer behind: a map, window by layer read.

Shapes: C cases, W places, L layers, A heads, R resamplings.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from llava_bidir.common.bootstrap import interval, p_values
from llava_bidir.common.errors import UserError

from .effects import Cases

SWEEP_CONDITIONS = ("incorrect", "correct", "random_incorrect", "random_correct")


class CutLocation(NamedTuple):
    """Where a knockout cuts: layers, numbered from 1, and query heads, from 0; None for all."""

    layers: Sequence[int] | None
    heads: Sequence[int] | None = None
    kind: str = ""

    def among(self, layers: int) -> tuple:
        """Its layers, of so many, and its heads: alike for places that cut the same."""
        every = range(1, layers + 1)
        return tuple(every if self.layers is None else self.layers), self.heads and tuple(self.heads)


def places_of(width: int | None, every_head: bool, layers: int, heads: int) -> list[CutLocation]:
    """Windows of layers, the sliding ones `width` wide, if there is a width; and, if asked, each head of each layer.

    Raises:
        UserError: The model has fewer layers than `width`.
    """
    every, places = range(1, layers + 1), []
    if width is not None:
        if not 1 <= width <= layers:
            raise UserError(f"windows {width}: the width must lie within 1..{layers}, the layers of this model")
        places += [CutLocation([layer], kind="single") for layer in every]
        places += [CutLocation([*range(i, i + width)], kind="sliding") for i in every[: layers - width + 1]]
        places += [CutLocation([*range(i, layers + 1)], kind="from") for i in every]
        places += [CutLocation([*range(1, i + 1)], kind="up_to") for i in every]
    if every_head:
        places += [CutLocation([layer], [head], "head") for layer in every for head in range(heads)]
    return places


def sweep_entry(name: str, rates: dict[str, Tensor], cases: Cases, weights: Tensor, swaps: Tensor) -> dict:
    """What a sweep over places says about a class (or all): by condition and place the change in n_c(l) / n_c(0)
    against no knockout and against random tokens, f[W, L + 1] each, with intervals and p-values over images.

    Args:
        name: Of the class.
        rates: By condition of `SWEPT`, f[C, W, L + 1].
        cases: The same cases, not cut and with their images.
        weights: f[R, N] of the bootstrap.
        swaps: f[1 + R, N] of the permutations.
    """
    entry: dict[str, Any] = {"class": name, "images": len(cases.images), "change": {}, "effect": {}}
    places = rates["correct"].shape[1]
    for condition in ("incorrect", "correct"):
        change = rates[condition] - cases.rates["none"][:, None]
        effect = rates[condition] - rates[f"random_{condition}"]
        mean, resampled = cases.mean(effect.flatten(1), weights)
        _, corrected = p_values(cases.swapped(effect.flatten(1), swaps))  # one family: every place and layer read
        entry["change"][condition] = change.mean(0).tolist()
        entry["effect"][condition] = {
            "mean": mean.view(places, -1).tolist(),
            "ci95": _rows([interval(m, resampled[:, i]) for i, m in enumerate(mean.tolist())], places),
            "p_corrected": corrected.view(places, -1).tolist(),
        }
    return entry


def _rows(values: list, rows: int) -> list[list]:
    width = len(values) // rows
    return [values[i * width : (i + 1) * width] for i in range(rows)]
