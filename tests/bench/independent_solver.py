"""Compare solved probes of a bare encoder with scipy's L-BFGS on F.interpolate, at one layer and strength.

    python tests/bench/independent_solver.py RUN [--layer 9] [--px 224]

RUN is a run of `probes solve` on a DINOv2 and a folder data set. Nothing of `probes` is used: states are hidden states
of transformers, the loss is the cross-entropy of every labelled pixel under F.interpolate, and the minimiser is
scipy's, which starts at zero. Read from RUN: model, data, strength, and the probe to compare with.

The objective is the documented one,

    mean cross-entropy over labelled pixels + r/2 sum_kj D_j w_kj^2

where D_j is the variance of channel j within classes. Pixels pull on tokens as the bilinear weights say.

Legend: N images, T tokens, d width, K classes, h w grid, H W pixels.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from extract_states import read_split
from safetensors.torch import load_file
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

IGNORED = 255
NORM_EPS = 1e-5  # of BatchNorm
# Steps end where a step's relative decrease is about what float32 losses resolve.
OPTIONS = {
    "maxiter": 500,
    "maxfun": 1000,
    "ftol": 1e-7,
    "gtol": 1e-6,
    "maxcor": 20,
}


class Split(NamedTuple):
    """Photos of a split: states f32[N, T, d] and N masks uint8[H, W]."""

    states: Tensor
    masks: list[Tensor]


def upsampled(logits: Tensor, mask: Tensor) -> Tensor:
    """Return logits f[T, K] of a square grid as pixels f[1, K, H, W] of a mask."""
    side = round(len(logits) ** 0.5)
    maps = logits.T.reshape(1, -1, side, side)
    return F.interpolate(maps, mask.shape, mode="bilinear", align_corners=False)


def soft_labels(split: Split, classes: int) -> Tensor:
    """Return the pixels of each class that each token stands for, f64[N, T, K].

    The gradient of the summed logits of the right classes is the transpose of F.interpolate.
    """
    labels = []
    for mask in split.masks:
        logits = torch.zeros(split.states.shape[1], classes, requires_grad=True)
        right = F.one_hot(mask.long().clamp(max=classes), classes + 1)[..., :classes]
        (upsampled(logits, mask)[0] * right.permute(2, 0, 1)).sum().backward()
        labels.append(logits.grad)
    return torch.stack(labels).double()


def within_class_covariance(states: Tensor, labels: Tensor) -> Tensor:
    """Return the pooled covariance f64[d, d] of states f[N, T, d] with soft labels f64[N, T, K]."""
    x = states.flatten(0, 1).double()
    weight = labels.flatten(0, 1)
    count = weight.sum(0)
    means = (weight.T @ x) / count.clamp(min=1e-30)[:, None]
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for of_class, mean in zip(weight.T, means, strict=True):
        centred = x - mean
        covariance += centred.T @ (of_class[:, None] * centred)
    return covariance / count.sum()


class Objective:
    """The objective as a function of a point that scipy moves.

    A point f64[K, d + 1] has biases in its last column. The others times `basis`^T are weights of states that are
    centred and divided by their standard deviation within classes: of these, the penalty is a plain sum of squares.
    The basis makes the curvature along all axes about the same. Any other one has the same minimum, after more steps.

    Args:
        split: Training photos.
        classes: K.
        strength: r.
    """

    def __init__(self, split: Split, classes: int, strength: float):
        covariance = within_class_covariance(split.states, soft_labels(split, classes))
        self.deviation = covariance.diagonal().sqrt()
        correlation = covariance / torch.outer(self.deviation, self.deviation)
        spectrum, vectors = torch.linalg.eigh(correlation)
        self.basis = vectors / (spectrum.clamp(min=0) + strength).sqrt()
        self.mean = split.states.flatten(0, 1).double().mean(0)
        self.states = ((split.states - self.mean) / self.deviation).float()
        self.masks = [mask.long() for mask in split.masks]
        self.pixels = sum(int((mask != IGNORED).sum()) for mask in self.masks)
        self.classes = classes
        self.strength = strength
        self.evaluations = 0

    def __call__(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the value and the gradient f64[K (d + 1)] at a point f64[K (d + 1)]."""
        self.evaluations += 1
        weights = self._weights(point)
        probe = weights.float().requires_grad_()
        loss = 0.0
        for states, mask in zip(self.states, self.masks, strict=True):
            logits = states @ probe[:, :-1].T + probe[:, -1]
            photo = F.cross_entropy(
                upsampled(logits, mask), mask[None], ignore_index=IGNORED, reduction="sum"
            )
            photo.backward()
            loss += photo.item()
        gradient = probe.grad.double() / self.pixels
        gradient[:, :-1] += self.strength * weights[:, :-1]
        penalty = self.strength / 2 * weights[:, :-1].square().sum().item()
        gradient = torch.cat([gradient[:, :-1] @ self.basis, gradient[:, -1:]], 1)
        return loss / self.pixels + penalty, gradient.flatten().numpy()

    def _weights(self, point: np.ndarray) -> Tensor:
        """Return the weights of scaled states and the biases f64[K, d + 1] at a point."""
        coordinates = torch.tensor(point).view(self.classes, -1)
        return torch.cat([coordinates[:, :-1] @ self.basis.T, coordinates[:, -1:]], 1)

    def point_of(self, weight: Tensor, bias: Tensor) -> np.ndarray:
        """Return weights f64[K, d] of states and biases f64[K] as a point."""
        coordinates = torch.linalg.solve(self.basis, (weight * self.deviation).T).T
        centred = bias + weight @ self.mean
        return torch.cat([coordinates, centred[:, None]], 1).flatten().numpy()

    def probe_at(self, point: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the weights f64[K, d] of states and the biases f64[K] at a point."""
        weights = self._weights(point)
        weight = weights[:, :-1] / self.deviation
        return weight, weights[:, -1] - weight @ self.mean


def score(split: Split, weight: Tensor, bias: Tensor) -> tuple[float, list[np.ndarray]]:
    """Return the mIoU of a probe, and its predictions int64[H, W] of labelled pixels (else 255)."""
    classes = len(bias)
    right, union = torch.zeros(classes), torch.zeros(classes)
    predictions = []
    for states, mask in zip(split.states, split.masks, strict=True):
        logits = (states.double() @ weight.T + bias).float()
        predicted = upsampled(logits, mask)[0].argmax(0).where(mask != IGNORED, IGNORED)
        predictions.append(predicted.numpy())
        for k in range(classes):
            right[k] += ((predicted == k) & (mask == k)).sum()
            union[k] += ((predicted == k) | (mask == k)).sum()
    return (right / union).nanmean().item(), predictions


def read_probe(run: Path, site: str) -> tuple[Tensor, Tensor]:
    """Return the weights f64[K, d] and biases f64[K] of a probe of a run, its normalisation included."""
    tensors = load_file(run / "probes.safetensors")
    weight, bias, mean, variance = (
        tensors[f"{site}.{name}"].double()
        for name in ("head.weight", "head.bias", "norm.running_mean", "norm.running_var")
    )
    weight = weight / (variance + NORM_EPS).sqrt()
    return weight, bias - weight @ mean


def agreement(ours: Iterable[np.ndarray], theirs: Iterable[np.ndarray]) -> float:
    """Return the share of labelled pixels for which two probes predict the same class."""
    same, labelled = 0, 0
    for a, b in zip(ours, theirs, strict=True):
        same += ((a == b) & (a != IGNORED)).sum()
        labelled += (a != IGNORED).sum()
    return same / labelled


def main() -> None:
    """Print objective, gradient and mIoU of both probes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--px", type=int, default=224)
    args = parser.parse_args()
    site = f"layer_{args.layer:02d}"
    manifest = json.loads((args.run / "manifest.json").read_text())
    metrics = json.loads((args.run / "metrics.json").read_text())
    (path,) = (entry for entry in metrics["path"]["optimum"]["sites"] if entry["site"] == site)
    data = Path(manifest["data"]["root"])
    model = AutoModel.from_pretrained(metrics["mllm"]).eval()
    training, validation = (
        Split(*read_split(model, data, split, args.layer, args.px))
        for split in ("training", "validation")
    )
    objective = Objective(training, len(metrics["classes"]), path["chosen"])
    start = np.zeros(objective.classes * (training.states.shape[2] + 1))
    found = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        options=OPTIONS,
    )
    evaluations = objective.evaluations
    solved = read_probe(args.run, site)
    value, gradient = objective(objective.point_of(*solved))
    print(f"{site} of {metrics['dataset']}, {args.px} px, strength {path['chosen']:.3g}")
    miou, predictions = score(validation, *objective.probe_at(found.x))
    print(f"scipy:  {found.fun:.7f} nats, gradient {np.abs(found.jac).max():.1e}, mIoU {miou:.5f}")
    print(f"        after {evaluations} evaluations: {found.message}")
    miou, of_run = score(validation, *solved)
    print(f"probes: {value:.7f} nats, gradient {np.abs(gradient).max():.1e}, mIoU {miou:.5f}")
    (entry,) = (entry for entry in metrics["sites"] if entry["site"] == site)
    print(f"        metrics.json says mIoU {entry['miou']:.5f}")
    print(f"same class: {agreement(predictions, of_run):.5f} of the labelled pixels")


if __name__ == "__main__":
    main()
