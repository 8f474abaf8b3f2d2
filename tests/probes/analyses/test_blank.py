"""A blank picture: what answers owe to the photo is told where it is known, and the picture is the photo's."""

import numpy as np
import pytest
import torch
from PIL import Image

from probes.analyses.routes.blank import Regime, regime_of, regimes_of
from probes.analyses.routes.questions import Question
from probes.data.blank import blank_picture
from probes.score.estimate import Estimate

CLASSES = 4
SEEDS = range(10)
KNOWN = {"reads": Regime.GROUNDED, "cannot": Regime.PRIOR, "misreads": Regime.INVERTED}


def log_probabilities(right: torch.Tensor, sharpness: float, draw: torch.Generator) -> torch.Tensor:
    """Return those of answers f[Q, K] that prefer the right class by so much, and differ by chance."""
    logits = torch.randn(len(right), CLASSES, generator=draw)
    logits[range(len(right)), right] += sharpness
    return logits.log_softmax(-1)


@pytest.mark.parametrize("seed", SEEDS)
def test_planted_answers_are_told_by_kind_of_question(seed):
    """One kind reads the photo, one answers by prompt alone, one is misled; 24 photos have two questions of each."""
    draw = torch.Generator().manual_seed(seed)
    kinds = [*KNOWN] * 48
    image = torch.arange(24).repeat_interleave(6)
    right = torch.randint(CLASSES, (144,), generator=draw)
    prior = log_probabilities(right, 0.0, draw)
    reading = {"reads": 2.0, "cannot": 0.0, "misreads": -2.0}
    gain = torch.tensor([reading[kind] for kind in kinds])
    photo = prior.clone()
    photo[range(144), right] += gain
    photo = photo.log_softmax(-1)
    questions = [
        Question(i, "?", r, (0, 0, 1, 1), kind)
        for i, r, kind in zip(image, right, kinds, strict=True)
    ]
    tensors = {"image": image, "right": right, "none": photo, "blank": prior}
    found = regimes_of(tensors, questions, seed=0)
    assert {kind: entry["regime"] for kind, entry in found.items()} == KNOWN
    for kind, entry in found.items():
        of_kind = [i for i, other in enumerate(kinds) if other == kind]
        chances = [x[i, right[i]].exp() for x in (photo, prior) for i in of_kind]
        difference = (sum(chances[:48]) - sum(chances[48:])).item() / 48
        assert entry["value"] == pytest.approx(difference, abs=1e-5)
        assert (entry["images"], entry["questions"]) == (24, 48)


@pytest.mark.parametrize(
    ("value", "spread", "regime"),
    [
        (0.2, 0.02, "grounded"),
        (0.2, 0.2, "undecided"),
        (0.008, 0.001, "prior"),
        (0.008, 0.004, "undecided"),
        (-0.2, 0.02, "inverted"),
        (0.0, 0.0, "prior"),
    ],
)
def test_a_regime_needs_its_interval(value, spread, regime):
    draw = torch.Generator().manual_seed(0)
    resampled = value + spread * torch.randn(2000, generator=draw)
    assert regime_of(Estimate(value, resampled)) == regime


def test_a_blank_picture_has_the_size_and_the_mean_colour_of_the_photo():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 11, 3)).astype(np.uint8)
    blank = np.asarray(blank_picture(Image.fromarray(pixels)))
    assert blank.shape == pixels.shape
    assert np.abs(blank - pixels.mean((0, 1))).max() <= 0.5
