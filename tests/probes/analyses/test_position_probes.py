"""Probes of single positions against weighted discriminants in numpy, and on simulated states."""

import numpy as np
import pytest
import torch
from probes.analyses.starvation.position_probes import PositionMoments

pytestmark = pytest.mark.numerics

B, T, K, D, R = 120, 6, 3, 5, 0.05


def draw(shift: float = 1.0, images: int = B, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states f64[B, T, D], whose means and noise differ by position times `shift`, and soft labels f64[B, T, K].

    A class has the mean of another one at the next position, so that a shared probe cannot tell them apart.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    classes = torch.randint(K, (images, T), generator=torch.Generator().manual_seed(seed + 1))
    noise = torch.randn(T, D, D, generator=torch.Generator().manual_seed(100), dtype=torch.float64)
    means, mixing = 3 * torch.eye(K, D, dtype=torch.float64), torch.eye(D).double() + 0.1 * shift * noise
    moved = (classes + torch.arange(T)) % K if shift else classes
    states = means[moved] + torch.einsum("btd,tde->bte", normal(images, T, D), mixing) + 7
    labels = torch.zeros(images, T, K, dtype=torch.float64).scatter_(2, classes[..., None], 4.0)
    return states, labels + 0.5 * torch.rand(images, T, K, generator=generator, dtype=torch.float64)


def moments(x, labels, positions: int = T, folds: int = 2, step: int = B) -> PositionMoments:
    """Return the moments of images that are added `step` at a time, the first half of them in fold 0."""
    sums = PositionMoments(x.flatten(0, 1).mean(0).float(), folds, T, positions, K)
    for fold, images in enumerate((slice(0, len(x) // 2), slice(len(x) // 2, None))):
        for part in zip(x[images].split(step), labels[images].split(step), strict=True):
            sums.update(*part, fold)
    return sums


def weighted_discriminant(x: np.ndarray, weights: np.ndarray, read: np.ndarray) -> np.ndarray:
    """Return the logits of states `read` f[n, D], from tokens f[m, D] with a weight per class f[m, K], by loops."""
    total, means = weights.sum(), [np.average(x, axis=0, weights=weights[:, k]) for k in range(K)]
    within = np.zeros((D, D))
    for k in range(K):
        for token, weight in zip(x, weights[:, k], strict=True):
            within += weight * np.outer(token - means[k], token - means[k]) / total
    within = (1 - R) * within + R * np.diag(np.diag(within))
    logits = []
    for k in range(K):
        direction = np.linalg.solve(within, means[k])
        logits.append(read @ direction - means[k] @ direction / 2 + np.log(weights[:, k].sum() / total))
    return np.stack(logits, -1)


def relative(logits) -> np.ndarray:
    """Return logits up to what all classes share."""
    logits = np.asarray(logits, dtype=float)
    return logits - logits.mean(-1, keepdims=True)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("positions", [T, 2])
def test_equals_discriminants_of_weighted_tokens(shrinkage, positions):
    x, labels = draw()
    ours = moments(x, labels, positions).solve([0.5, R], shrinkage)(x)[1]
    tokens, soft = x.flatten(0, 1).numpy(), labels.flatten(0, 1).numpy()
    for p in range(T):
        own = np.tile(np.arange(T) == p, B)[:, None] if p < positions else 0
        share = shrinkage / T if p < positions else 1
        mixed = soft * (share + (1 - shrinkage) * own)
        expected = weighted_discriminant(tokens, mixed, x[:, p].numpy())
        np.testing.assert_allclose(relative(ours[:, p]), relative(expected), rtol=1e-3, atol=1e-3)


def test_batches_add_up_and_a_fold_can_be_left_out():
    x, labels = draw()
    together, apart = moments(x, labels), moments(x, labels, step=7)
    torch.testing.assert_close(together.solve([R], 0.3)(x), apart.solve([R], 0.3)(x), rtol=1e-4, atol=1e-4)
    alone = PositionMoments(together.moments.pivot, 1, T, T, K)
    alone.update(x[B // 2 :], labels[B // 2 :], 0)
    left, expected = together.solve([R], 0.3, without=0), alone.solve([R], 0.3)
    torch.testing.assert_close(left(x), expected(x), rtol=1e-4, atol=1e-4)


def test_probe_of_a_position_reads_what_a_shared_one_cannot():
    """Classes change places from position to position: one probe for all is at chance, each alone is not."""
    x, labels = draw(images=600)
    unseen, truth = draw(images=600, seed=7)
    truth, sums = truth.argmax(-1), moments(x, labels)
    accuracy = lambda shrinkage: (sums.solve([R], shrinkage)(unseen)[0].argmax(-1) == truth).double().mean(0)
    assert accuracy(1.0).mean() < 0.4, "chance is 1/3"
    assert accuracy(0.1).min() > 0.9


def test_position_without_labels_is_finite_and_equals_the_shared_probe():
    x, labels = draw()
    labels[:, 2] = 0
    sums = moments(x, labels)
    shared = sums.solve([R], 1.0)(x)[0][:, 2]
    np.testing.assert_allclose(relative(sums.solve([R], 0.1)(x)[0][:, 2]), relative(shared), rtol=1e-3, atol=1e-3)
