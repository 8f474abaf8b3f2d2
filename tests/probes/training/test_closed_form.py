"""Moments and closed-form probes against scikit-learn, repeated pixels, and separate solves."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from probes.training.closed_form import STRENGTHS, solve_moments
from probes.training.moments import Moments

pytestmark = pytest.mark.numerics


def draw(tokens: int = 400, width: int = 7, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states f64[n, d] with unequal channels and correlations, and hard labels i64[n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (tokens,), generator=generator)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    means = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return means[labels] + noise @ mixing + 3.0, labels


def exact_moments(
    x: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return N, S, Q and the pivot of states f64[n, d] with soft labels f64[n, K], in float64 throughout."""
    pivot = x[:5].mean(0)
    x = x - pivot
    return weights.sum(0), weights.T @ x, (x * weights.sum(1, keepdim=True)).T @ x, pivot


def logits(form, x: torch.Tensor, strength: float) -> torch.Tensor:
    weights, bias = form.solve(strength)
    return (x - form.mean) @ form.to_states(weights).T + bias


def relative(z: torch.Tensor) -> torch.Tensor:
    """Return logits f[n, K] up to what all classes share."""
    return z - z.mean(-1, keepdim=True)


def test_equals_scikit_learn_on_hard_labels():
    x, labels = draw()
    form = solve_moments(*exact_moments(x, torch.eye(4, dtype=torch.float64)[labels]))
    theirs = LinearDiscriminantAnalysis(solver="eigen").fit(x.numpy(), labels.numpy())
    expected = torch.from_numpy(theirs.decision_function(x.numpy()))
    ours = logits(form, x, 0.0)
    torch.testing.assert_close(relative(ours), relative(expected), rtol=1e-8, atol=1e-8)


def test_all_strengths_from_one_decomposition_equal_separate_solves():
    x, labels = draw()
    count, first, second, pivot = exact_moments(x, torch.eye(4, dtype=torch.float64)[labels])
    form = solve_moments(count, first, second, pivot)
    means = np.stack([x[labels == k].numpy().mean(0) for k in range(4)])
    centred = x.numpy() - means[labels.numpy()]
    within = centred.T @ centred / len(x)
    target = np.diag(np.diag(within))
    for strength in STRENGTHS:
        weights = np.linalg.solve((1 - strength) * within + strength * target, (means - x.numpy().mean(0)).T).T
        bias = np.log(np.bincount(labels) / len(x)) - 0.5 * ((means - x.numpy().mean(0)) * weights).sum(1)
        expected = (x.numpy() - x.numpy().mean(0)) @ weights.T + bias
        torch.testing.assert_close(logits(form, x, strength), torch.from_numpy(expected), rtol=1e-7, atol=1e-7)


def test_dead_channels_and_rare_classes_give_finite_logits():
    x, labels = draw()
    x[:, 2] = 1.7  # constant
    x[:, 4] = x[:, 3]  # singular
    onehot = torch.zeros(400, 6, dtype=torch.float64)  # class 5 does not occur, class 4 once
    onehot[torch.arange(400), labels] = 1
    onehot[0] = torch.eye(6, dtype=torch.float64)[4]
    form = solve_moments(*exact_moments(x, onehot))
    for strength in STRENGTHS:
        z = logits(form, x, strength)
        assert z.isfinite().all() and (z.argmax(1) != 5).all()
    assert form.scale[2] == 0 and (form.scale > 0).sum() == 6


def test_float32_sums_or_a_missing_pivot_lose_small_variances():
    """A channel with mean 1,000 and deviation 0.05, as LLMs have: a plain float32 sum loses it."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(200, 2_000, 1, generator=generator, dtype=torch.float64)
    batches = (1000 + noise).float()
    variance = batches.double().var(correction=0).item()
    moments = Moments.zeros(batches[0].mean(0), 1, 1)
    plain_first, plain_second = torch.zeros(1), torch.zeros(1, 1)
    for x in batches:
        moments.update(x, torch.ones(len(x), 1, dtype=torch.float64), 0)
        plain_first, plain_second = plain_first + x.sum(0), plain_second + x.T @ x
    form = solve_moments(*moments.without(None), moments.pivot)
    tokens = batches[..., 0].numel()
    plain = (plain_second / tokens - (plain_first / tokens) ** 2).item()
    assert form.scale.item() ** -2 == pytest.approx(variance, rel=1e-4)
    assert abs(plain / variance - 1) > 1, "else the pivot and the float64 sums would not be needed"


def test_moments_stored_in_blocks_equal_whole_matrices(monkeypatch):
    """A width of several blocks, the last one smaller; two folds, a shift, and the sum with other images."""
    monkeypatch.setattr("probes.training.moments.BLOCK", 5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 13, generator=generator) + 3
    labels = torch.nn.functional.one_hot(torch.randint(3, (80,), generator=generator), 3).double()
    pivot = x[:40].mean(0)
    one, other = Moments.zeros(pivot, 2, 3), Moments.zeros(pivot + 1, 2, 3)
    assert one.second.shape == (2, 5 * 13 + 5 * 8 + 3 * 3)
    one.update(x[:30], labels[:30], 0)
    one.update(x[30:40], labels[30:40], 1)
    other.update(x[40:], labels[40:], 1)
    one.add(other)
    one.shift(torch.zeros(13))
    for fold, kept in ((None, x), (0, x[30:]), (1, x[:30])):
        count, first, second = one.without(fold)
        of = slice(None) if fold is None else slice(30, None) if fold == 0 else slice(30)
        torch.testing.assert_close(count, labels[of].sum(0))
        torch.testing.assert_close(first, labels[of].T @ x[of].double(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(second, kept.double().T @ kept.double(), rtol=1e-5, atol=1e-3)
