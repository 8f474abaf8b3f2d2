"""Position alone: at the optimum of the probe's own loss, with its folds, and without the picture."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from probes.data.samplers import assign_folds
from probes.ops.geometry import Geometry
from probes.solve.position import TrainingTargets, solve_position
from probes.tasks import TASKS

CLASSES = 3
LAYOUTS = 10


def planted(seed: int, images: int = 8) -> tuple[list[dict], Geometry]:
    """Return targets whose classes have places, of several sizes and with ignored pixels, and a grid."""
    draw = np.random.default_rng(seed)
    rows, columns = draw.integers(2, 5, 2).tolist()
    sizes = draw.integers(9, 25, (2, 2)).tolist()
    targets = []
    for number in range(images):
        height, width = sizes[number % 2]
        places = np.mgrid[:height, :width] / max(height, width)
        slope = draw.normal(size=(CLASSES, 2))
        chance = np.einsum("ka,ahw->khw", slope + 3 * np.eye(CLASSES, 2), places)
        target = (chance + draw.gumbel(size=chance.shape)).argmax(0).astype(np.uint8)
        target[draw.random(target.shape) < 0.1] = 255
        targets.append({"target": target})
    return targets, Geometry(grid=(rows, columns), image_px=64, covered_px=64)


def pixel_rows(targets: list[dict], grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the bilinear weights of the tokens f64[n, T], and the class, of each labelled pixel."""
    maps = torch.eye(grid[0] * grid[1], dtype=torch.float64).unflatten(1, grid)[None]
    rows, classes = [], []
    for sample in targets:
        target = sample["target"].ravel()
        weights = F.interpolate(maps, sample["target"].shape, mode="bilinear")[0].flatten(1).T
        rows.append(weights.numpy()[target != 255])
        classes.append(target[target != 255])
    return np.concatenate(rows), np.concatenate(classes)


def cross_entropy(logits: np.ndarray, classes: np.ndarray) -> float:
    """Return the mean cross-entropy of logits f[n, K], in nats."""
    return F.cross_entropy(torch.tensor(logits), torch.tensor(classes).long()).item()


@pytest.mark.parametrize("seed", range(LAYOUTS))
def test_it_is_the_logistic_regression_of_pixels_on_their_bilinear_weights(seed):
    """By scikit-learn, with the ridge of probes: in units of the deviation of each feature within classes."""
    targets, geometry = planted(seed)
    folds = assign_folds(range(len(targets)), 4)
    task = TASKS["segmentation"]
    probe = solve_position(TrainingTargets(targets, task, CLASSES, geometry), folds)
    assert probe.converged

    rows, classes = pixel_rows(targets, geometry.grid)
    soft = np.stack([rows[classes == k].sum(0) for k in range(CLASSES)])
    shares = soft / soft.sum(1, keepdims=True)
    deviation = np.sqrt((soft * (1 - shares)).sum(0) / soft.sum())
    strength = probe.solution.strengths[probe.solution.chosen].item()
    reference = LogisticRegression(C=1 / (strength * len(rows)), tol=1e-9, max_iter=10_000)
    reference.fit(rows / deviation, classes)
    expected = cross_entropy(reference.decision_function(rows / deviation), classes)
    ours = rows @ probe.output.flatten(1).double().numpy().T
    assert cross_entropy(ours, classes) == pytest.approx(expected, abs=1e-4)
