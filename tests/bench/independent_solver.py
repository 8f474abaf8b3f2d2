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
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
BATCH = 8
IGNORED = 255
NORM_EPS = 1e-5  # of BatchNorm
# Steps end where a step's relative decrease is about what float32 losses resolve.
OPTIONS = {"maxiter": 500, "maxfun": 1000, "ftol": 1e-7, "gtol": 1e-6, "maxcor": 20}
Photos = tuple[Tensor, list[Tensor]]  # states f32[N, T, d] and N masks uint8[H, W]
Probe = tuple[Tensor, Tensor]  # weights f64[K, d] of states and biases f64[K]


@torch.inference_mode()
def read_split(model, folder: Path, split: str, layer: int, px: int) -> Photos:
    """Return the states of the patches, and the masks; pixels are normalised as a DINOv2 expects."""
    files = sorted((folder / "images" / split).iterdir())
    photos = [
        Image.open(file).convert("RGB").resize((px, px), Image.Resampling.BICUBIC) for file in files
    ]
    pixels = torch.stack([torch.tensor(np.asarray(photo)).permute(2, 0, 1) for photo in photos])
    pixels = (pixels / 255 - MEAN) / DEVIATION
    states = [
        model(part, output_hidden_states=True).hidden_states[layer][:, 1:].clone()
        for part in pixels.split(BATCH)
    ]
    masks = [Image.open(folder / "annotations" / split / f"{file.stem}.png") for file in files]
    return torch.cat(states), [torch.tensor(np.asarray(mask)) for mask in masks]


def upsampled(logits: Tensor, mask: Tensor) -> Tensor:
    """Return logits f[T, K] of a square grid as pixels f[1, K, H, W] of a mask."""
    side = round(len(logits) ** 0.5)
    maps = logits.T.reshape(1, -1, side, side)
    return F.interpolate(maps, mask.shape, mode="bilinear", align_corners=False)


def soft_labels(photos: Photos, classes: int) -> Tensor:
    """Return the pixels of each class that each token stands for, f64[N T, K].

    The gradient of the summed logits of the right classes is the transpose of F.interpolate.
    """
    labels = []
    for states, mask in zip(*photos, strict=True):
        logits = torch.zeros(len(states), classes, requires_grad=True)
        right = F.one_hot(mask.long().clamp(max=classes), classes + 1)[..., :classes]
        (upsampled(logits, mask)[0] * right.permute(2, 0, 1)).sum().backward()
        labels.append(logits.grad)
    return torch.cat(labels).double()


def within_class_covariance(states: Tensor, labels: Tensor) -> Tensor:
    """Return the pooled covariance f64[d, d] of states f64[n, d] with soft labels f64[n, K]."""
    covariance = 0
    for weight in labels.T[labels.sum(0) > 0]:
        centred = states - weight @ states / weight.sum()
        covariance = covariance + centred.T @ (weight[:, None] * centred)
    return covariance / labels.sum()


class Objective:
    """The objective as a function of a point that scipy moves.

    A point f64[K, d + 1] has biases in its last column. The others times `basis`^T are weights of states that are
    centred and divided by their standard deviation within classes: of these, the penalty is a plain sum of squares.
    The basis makes the curvature along all axes about the same. Any other one has the same minimum, after more steps.

    Args:
        photos: Of training.
        classes: K.
        strength: r.
    """

    def __init__(self, photos: Photos, classes: int, strength: float):
        states = photos[0].flatten(0, 1).double()
        covariance = within_class_covariance(states, soft_labels(photos, classes))
        self.deviation = covariance.diagonal().sqrt()
        correlation = covariance / torch.outer(self.deviation, self.deviation)
        spectrum, vectors = torch.linalg.eigh(correlation)
        self.basis = vectors / (spectrum.clamp(min=0) + strength).sqrt()
        self.mean = states.mean(0)
        self.states = ((photos[0] - self.mean) / self.deviation).float()
        self.masks = [mask.long() for mask in photos[1]]
        self.pixels = sum(int((mask != IGNORED).sum()) for mask in self.masks)
        self.shape = (classes, states.shape[1] + 1)
        self.strength = strength

    def __call__(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the value and the gradient f64[K (d + 1)] at a point f64[K (d + 1)]."""
        weights, bias = self._weights(point)
        probe = torch.cat([weights, bias[:, None]], 1).float().requires_grad_()
        loss = 0.0
        for states, mask in zip(self.states, self.masks, strict=True):
            logits = upsampled(states @ probe[:, :-1].T + probe[:, -1], mask)
            photo = F.cross_entropy(logits, mask[None], ignore_index=IGNORED, reduction="sum")
            photo.backward()
            loss += photo.item()
        gradient = probe.grad.double() / self.pixels
        of_weights = (gradient[:, :-1] + self.strength * weights) @ self.basis
        gradient = torch.cat([of_weights, gradient[:, -1:]], 1)
        value = loss / self.pixels + self.strength / 2 * weights.square().sum().item()
        return value, gradient.flatten().numpy()

    def _weights(self, point: np.ndarray) -> Probe:
        """Return the weights of scaled states and the biases at a point."""
        coordinates = torch.tensor(point).view(self.shape)
        return coordinates[:, :-1] @ self.basis.T, coordinates[:, -1]

    def point_of(self, weight: Tensor, bias: Tensor) -> np.ndarray:
        """Return a probe as a point."""
        coordinates = torch.linalg.solve(self.basis, (weight * self.deviation).T).T
        centred = bias + weight @ self.mean
        return torch.cat([coordinates, centred[:, None]], 1).flatten().numpy()

    def probe_at(self, point: np.ndarray) -> Probe:
        """Return the probe of states at a point."""
        weights, bias = self._weights(point)
        weight = weights / self.deviation
        return weight, bias - weight @ self.mean


def score(photos: Photos, weight: Tensor, bias: Tensor) -> tuple[float, Tensor]:
    """Return the mIoU of a probe, and its predictions int64[n] of the labelled pixels."""
    predictions = []
    for states, mask in zip(*photos, strict=True):
        logits = (states.double() @ weight.T + bias).float()
        predictions.append(upsampled(logits, mask)[0].argmax(0)[mask != IGNORED])
    predicted = torch.cat(predictions)
    truth = torch.cat([mask[mask != IGNORED] for mask in photos[1]])
    iou = [
        ((predicted == k) & (truth == k)).sum() / ((predicted == k) | (truth == k)).sum()
        for k in range(len(bias))
    ]
    return torch.stack(iou).nanmean().item(), predicted


def read_probe(run: Path, site: str) -> Probe:
    """Return a probe of a run, its normalisation included."""
    tensors = load_file(run / "probes.safetensors")
    weight, bias, mean, variance = (
        tensors[f"{site}.{name}"].double()
        for name in ("head.weight", "head.bias", "norm.running_mean", "norm.running_var")
    )
    weight = weight / (variance + NORM_EPS).sqrt()
    return weight, bias - weight @ mean


def main() -> None:
    """Print objective, gradient and mIoU of both probes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--px", type=int, default=224)
    args = parser.parse_args()
    site = f"layer_{args.layer:02d}"
    data = json.loads((args.run / "manifest.json").read_text())["data"]["root"]
    metrics = json.loads((args.run / "metrics.json").read_text())
    (path,) = (entry for entry in metrics["path"]["optimum"]["sites"] if entry["site"] == site)
    model = AutoModel.from_pretrained(metrics["mllm"]).eval()
    training, validation = (
        read_split(model, folder=Path(data), split=split, layer=args.layer, px=args.px)
        for split in ("training", "validation")
    )
    objective = Objective(training, len(metrics["classes"]), path["chosen"])
    start = np.zeros(objective.shape).ravel()
    minimum = minimize(objective, start, jac=True, method="L-BFGS-B", options=OPTIONS)
    solved = objective.point_of(*read_probe(args.run, site))
    print(f"{site} of {metrics['dataset']}, {args.px} px, strength {path['chosen']:.3g}")
    print(f"scipy ended after {minimum.nfev} evaluations: {minimum.message}")
    predictions = []
    for name, point in (("scipy", minimum.x), ("probes", solved)):
        value, gradient = objective(point)
        miou, predicted = score(validation, *objective.probe_at(point))
        largest = np.abs(gradient).max()
        print(f"{name}: {value:.7f} nats, gradient {largest:.1e}, mIoU {miou:.5f}")
        predictions.append(predicted)
    same = (predictions[0] == predictions[1]).double().mean()
    print(f"same class: {same:.5f} of the labelled pixels")


if __name__ == "__main__":
    main()
