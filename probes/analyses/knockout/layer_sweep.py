"""Knockouts at single layers and windows of layers.

The paper cuts all layers at once, which does not show where patches are corrected. A single layer's cut may be
compensated by its neighbours, hence the windows (Geva et al., 2304.14767). Each case also runs with

    single    layer l alone
    sliding   layers l .. l + k - 1
    from      layers l .. L
    up_to     layers 1 .. l

and wrong patches are counted at every layer.

Shapes: C cases, W locations, L layers, R resamplings.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from llava_bidir.common.bootstrap import interval, p_values
from llava_bidir.common.errors import UserError

from .effects import Cases

SWEEP_CONDITIONS = ("incorrect", "correct", "random_incorrect", "random_correct")


class CutLocation(NamedTuple):
    """Which layers a knockout cuts, numbered from 1."""

    layers: Sequence[int]
    kind: str


def cut_locations(width: int | None, depth: int) -> list[CutLocation]:
    """Return the locations of a sweep in L = `depth` layers, with windows of `width` layers; none for None.

    Raises:
        UserError: `width` is not within 1..L.
    """
    if width is None:
        return []
    if not 1 <= width <= depth:
        raise UserError(
            f"layer windows {width}: the width must be from 1 to {depth}, the layers of this model"
        )
    layers = range(1, depth + 1)
    return [
        *(CutLocation([layer], "single") for layer in layers),
        *(CutLocation([*range(i, i + width)], "sliding") for i in layers[: depth - width + 1]),
        *(CutLocation([*range(i, depth + 1)], "from") for i in layers),
        *(CutLocation([*range(1, i + 1)], "up_to") for i in layers),
    ]


def sweep_entry(
    name: str,
    rates: dict[str, Tensor],
    cases: Cases,
    weights: Tensor,
    swaps: Tensor,
) -> dict[str, Any]:
    """Return the effects of a class (or all) by location, an entry of "classes" in knockout_windows.json.

    "change" is the difference of n_c(l) / n_c(0) to no knockout, "effect" that to random tokens, f[W, L + 1] each.

    Takes `rates` by condition, f[C, W, L + 1], the same cases with their rates without a knockout, `weights` f[R, N] of
    the bootstrap and `swaps` f[1 + R, N] of the permutations.
    """
    entry: dict[str, Any] = {
        "class": name,
        **cases.counts,
        "change": {},
        "effect": {},
    }
    shape = rates["correct"].shape[1:]
    for condition in ("incorrect", "correct"):
        change = rates[condition] - cases.rates["none"][:, None]
        effect = (rates[condition] - rates[f"random_{condition}"]).flatten(1)
        mean, resampled = cases.mean(effect, weights)
        # one family: every location and layer
        _, corrected = p_values(cases.swapped_mean(effect, swaps))
        ci95 = [interval(m, resampled[:, i]) for i, m in enumerate(mean.tolist())]
        starts = range(0, len(ci95), shape[1])
        entry["change"][condition] = change.mean(0).tolist()
        entry["effect"][condition] = {
            "mean": mean.view(shape).tolist(),
            "ci95": [ci95[i : i + shape[1]] for i in starts],
            "p_corrected": corrected.view(shape).tolist(),
        }
    return entry
