"""Probes of painted patches, against scikit-learn on the same objective, and what their folds leave out."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from probes.models import concept_probes
from probes.models.concept_folds import Folds, Paint, make_folds
from probes.models.concept_probes import CONCEPT_STRENGTHS, solve_concepts

pytestmark = pytest.mark.numerics


def painted(
    patches: int,
    photos: int,
    concepts: int = 3,
    seed: int = 0,
) -> Paint:
    """Paint patches of a grid of 8 columns at random."""
    generator = torch.Generator().manual_seed(seed)
    return Paint(
        torch.randint(concepts, (patches,), generator=generator),
        torch.arange(patches) * photos // patches,
        torch.arange(patches) % 64,
    )


def states_of(
    paint: Paint,
    width: int,
    signal: float = 1.0,
    seed: int = 1,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(3, width, generator=generator)
    x = signal * means[paint.concept] + 1.5 * torch.randn(
        len(paint.concept), width, generator=generator
    )
    x = 3 + x * torch.logspace(-2, 2, width)  # channels of very different scale
    x[:, 1] = 7.0  # a constant one
    return x


def reference(
    x: torch.Tensor,
    y: torch.Tensor,
    everything: torch.Tensor,
    strength: float,
) -> LogisticRegression:
    """Fit scikit-learn's solver at the same penalty; its loss is C times the weighted sum, plus |w|^2 / 2."""
    scaler = StandardScaler().fit(everything.double())
    weights = 1 / y.bincount().double()[y] / (int(y.max()) + 1)
    model = LogisticRegression(
        C=1 / strength,
        tol=1e-10,
        max_iter=10_000,
    )
    scale = np.sqrt(everything.shape[1])
    return scaler, model.fit(scaler.transform(x.double()) / scale, y, sample_weight=weights), scale


@pytest.mark.parametrize(
    "width", [12, 200], ids=["fewer channels than patches", "fewer patches than channels"]
)
@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_probabilities_are_those_of_scikit_learn_at_the_same_penalty(width, strength, monkeypatch):
    monkeypatch.setattr(concept_probes, "CONCEPT_STRENGTHS", (1.0, strength))
    paint = painted(90, photos=6)
    x = states_of(paint, width)
    new = states_of(painted(40, 1, seed=5), width, seed=7)
    folds = make_folds(paint, 8)
    probes = solve_concepts({"a": x, "b": x[:, :7]}, paint, folds)
    for site, given, fresh in (("a", x, new), ("b", x[:, :7], new[:, :7])):
        scaler, model, scale = reference(given, paint.concept, given, probes.strengths[site])
        expected = model.predict_proba(scaler.transform(fresh.double()) / scale)
        np.testing.assert_allclose(probes.logits(fresh, site).softmax(-1), expected, atol=0.01)
        fold = folds.of == 2
        strengths = (1.0, strength)
        candidates = []
        for r in strengths:
            scaler, model, scale = reference(given[~fold], paint.concept[~fold], given, r)
            candidates.append(model.predict(scaler.transform(given[fold].double()) / scale))
        found = probes.left_out(given, site)[fold].numpy()
        assert any((found == candidate).mean() > 0.95 for candidate in candidates)


def test_strength_has_the_lowest_loss_on_left_out_photos():
    paint = painted(90, photos=6)
    x = states_of(paint, 200, signal=0.3)
    folds = make_folds(paint, 8)
    losses = []
    for strength in CONCEPT_STRENGTHS:
        loss = 0.0
        for fold in range(5):
            out = folds.of == fold
            scaler, model, scale = reference(x[~out], paint.concept[~out], x, strength)
            log_p = model.predict_log_proba(scaler.transform(x[out].double()) / scale)
            y = paint.concept[out]
            weight = 1 / paint.concept.bincount().double()[y] / 3
            loss -= (weight.numpy() * log_p[np.arange(len(y)), y]).sum()
        losses.append(loss)
    assert (
        solve_concepts({"a": x}, paint, folds).strengths["a"]
        == CONCEPT_STRENGTHS[int(np.argmin(losses))]
    )


@pytest.mark.parametrize("photos", [2, 5, 12])
def test_a_photo_is_left_out_with_all_its_patches(photos):
    """Each photo has its own signature, and concepts nothing in common between photos: only a leak scores."""
    paint = painted(240, photos, concepts=2)
    generator = torch.Generator().manual_seed(2)
    own = torch.randn(
        photos, 2, 50, generator=generator
    )  # another direction of each concept in each photo
    x = 3 * own[paint.photo, paint.concept] + torch.randn(240, 50, generator=generator)
    folds = make_folds(paint, 8)
    assert folds.by_photo
    for photo in range(photos):
        assert len(folds.of[paint.photo == photo].unique()) == 1
    right = (
        (solve_concepts({"a": x}, paint, folds).left_out(x, "a") == paint.concept)
        .float()
        .mean()
        .item()
    )
    leaked = Folds(torch.arange(240) % 5, True)
    cheating = (
        (solve_concepts({"a": x}, paint, leaked).left_out(x, "a") == paint.concept)
        .float()
        .mean()
        .item()
    )
    assert cheating > 0.95
    assert right < 0.75


def test_photos_are_left_out_only_if_each_concept_is_elsewhere():
    two = Paint(torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), torch.arange(4))
    assert make_folds(two, 2).by_photo
    apart = Paint(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), torch.arange(4))
    assert not make_folds(apart, 2).by_photo
    assert make_folds(apart, 2).of.tolist() == [0, 1, 0, 1]
    alone = Paint(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0]), torch.arange(3))
    assert make_folds(alone, 2).of is None
    # Photos of a rare concept go into different folds, so that each fold sees it.
    many = Paint(
        torch.tensor([*range(3)] * 2 + [0, 1] * 9),
        torch.arange(12).repeat_interleave(2),
        torch.arange(24),
    )
    rare = many._replace(concept=torch.tensor([2 if i in (0, 10) else i % 2 for i in range(24)]))
    assert make_folds(rare, 8).by_photo


def test_blocks_are_connected_parts_of_a_concept():
    patch = torch.arange(64)
    paint = Paint(
        (patch % 8 >= 4).long(), torch.zeros(64, dtype=torch.long), patch
    )  # two halves, 8 x 4 patches each
    folds = make_folds(paint, 8)
    for fold in range(5):
        rows = (patch[(folds.of == fold) & (paint.concept == 0)] // 8).unique()
        assert len(rows) <= 3
        assert (rows.diff() == 1).all()


def test_equal_patches_and_constant_states_are_no_error():
    paint = painted(12, photos=3, concepts=2)
    folds = make_folds(paint, 8)
    for x in (torch.ones(12, 30), states_of(paint, 30)[:1].expand(12, -1), torch.zeros(12, 5)):
        probes = solve_concepts({"a": x}, paint, folds)
        assert probes.logits(x, "a").isfinite().all()


def test_work_ends_where_the_check_raises(monkeypatch):
    paint = painted(30, photos=3)
    monkeypatch.setattr(concept_probes, "CHUNK_NUMEL", 1)
    states = {str(i): states_of(paint, 40) for i in range(4)}
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve_concepts(states, paint, make_folds(paint, 8), check)
    assert len(calls) == 2
