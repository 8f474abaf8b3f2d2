"""What an answer owes to the picture: the same question about a blank one, of the photo's mean colour.

What the blank picture (probes/data/blank.py) changes is the probability of
the right answer, paired over photos, for each kind of question:

    grounded    the photo makes the right answer more probable, by a point at least
    prior       it changes nothing: the 90% interval is within a point; prompt and positions answer
    inverted    the photo makes it less probable, by a point at least
    undecided   all else
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import torch

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.analyses.knockout.knockout_effects import mean_over_cases
from probes.score.estimate import Estimate

from .questions import Question

MARGIN = 0.01  # of a probability: what counts as nothing, as that of a class score
EQUAL_LEVEL = 0.9  # of two one-sided tests at 5%


class Regime(StrEnum):
    """What answers to a kind of question owe to the picture."""

    GROUNDED = "grounded"
    PRIOR = "prior"
    INVERTED = "inverted"
    UNDECIDED = "undecided"


def regimes_of(
    tensors: dict[str, torch.Tensor], questions: Sequence[Question], seed: int
) -> dict[str, dict[str, Any]]:
    """Return what answers owe to the picture, by kind of question.

    Args:
        tensors: Content of routes.safetensors.
        questions: Those that were asked.
        seed: Seed of the bootstrap.

    Returns:
        {KIND: {"regime", "questions", "images", "photo", "blank": mean probability of the right answer, "value": the
        difference, "ci95", "ci90"}}.
    """
    right = tensors["right"][:, None]
    photo, blank = (
        tensors[name].double().exp().gather(1, right)[:, 0] for name in ("none", "blank")
    )
    kinds = [question.kind for question in questions]
    entries = {}
    for kind in dict.fromkeys(kinds):
        asked = torch.tensor([other == kind for other in kinds])
        images, image = tensors["image"][asked].unique(return_inverse=True)
        weights = bootstrap_weights(len(images), seed=seed)
        mean, resampled = mean_over_cases((photo - blank)[asked], image, weights)
        gain = Estimate(mean.item(), resampled)
        entries[kind] = {
            "regime": regime_of(gain),
            "questions": int(asked.sum()),
            "images": len(images),
            "photo": photo[asked].mean().item(),
            "blank": blank[asked].mean().item(),
            **gain.json(),
            "ci90": equal_interval(gain),
        }
    return entries


def equal_interval(gain: Estimate) -> list[float]:
    """Return the 90% interval, made as the 95% one is."""
    resampled = gain.resampled.double()
    half = (resampled - resampled.mean()).abs().quantile(EQUAL_LEVEL).item()
    return [gain.value - half, gain.value + half]


def regime_of(gain: Estimate) -> Regime:
    """Return the regime that the difference of a photo from a blank picture tells."""
    low, high = gain.ci95
    if low > 0 and gain.value >= MARGIN:
        return Regime.GROUNDED
    if high < 0 and gain.value <= -MARGIN:
        return Regime.INVERTED
    least, most = equal_interval(gain)
    if -MARGIN < least and most < MARGIN:
        return Regime.PRIOR
    return Regime.UNDECIDED


def describe_regimes(mask: str, regimes: dict[str, dict[str, Any]]) -> str:
    """Return a sentence: what answers owe to the picture, by kind of question."""
    parts = []
    for kind, entry in regimes.items():
        low, high = (100 * end for end in entry["ci95"])
        gain = f"{100 * entry['value']:+.1f} [{low:.1f}, {high:.1f}] points"
        parts.append(f"“{kind} …” is {entry['regime']} ({gain})")
    return (
        f"{mask.capitalize()}, against a blank picture of the photo's mean colour, by the probability of the right "
        f"answer: {'; '.join(parts)}. Grounded: the photo adds; prior: it adds nothing; inverted: it takes."
    )
