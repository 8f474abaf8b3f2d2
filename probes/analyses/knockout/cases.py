"""The cases of a knockout: images in which patches are wrongly predicted as a class c (App. C.1).

    layer 0          the adapter's probe
    n_c(0)           patches wrongly predicted as c: labelled, and most of their labelled pixels are of another class
    n_c(l)           the same count at layer l over all patches: n_c(l) / n_c(0) can exceed 1, as in Fig. 11
    correct class    most frequent true class of the patches in n_c(0); the first in the list of classes if tied
    B_c              patches that the probe at site `block_by` predicts as c, correctly or not (Eq. 1)

The outcomes of a case at layer l, under one condition:

    rate             n_c(l) / n_c(0), the paper's; unbounded
    still_wrong      share of the patches in n_c(0) that are still predicted as c: within 0..1, so without new mistakes,
                     and where none is corrected, nothing can make it worse

The paper does not say which layer's predictions define B_c. The adapter's are the default, as for n_c(0). Its text
speaks of correctly classified tokens, but Eq. 1 blocks all that are predicted as c.

Shapes: B images, K classes, T patches, L layers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llava_bidir.common.errors import UserError
from probes.models.frozen_mllm import FrozenMLLM
from probes.models.knockout import Knockout
from probes.models.sites import ADAPTER
from probes.runs.probe_run import ProbeRun


class PatchReader:
    """Predict the class of each patch at each layer, with the model and the probes of a run that has all layers."""

    def __init__(self, run: ProbeRun):
        self.mllm: FrozenMLLM = run.mllm()
        self.layers = run.layers
        device = self.mllm.device
        self.probes = {site: probe.to(device) for site, probe in run.probes().items()}

    def predict(self, pixels: Tensor, knockout: Knockout | None = None) -> Tensor:
        """Return the predicted class of each patch at the adapter and after each layer, long[L + 1, B, T]."""
        return self.predict_states(self.mllm.states(pixels, self.layers, knockout))

    def predict_states(self, states: dict[str, Tensor]) -> Tensor:
        """Return the predicted class of each patch, long[L + 1, B, T], from the states f[B, T, d] of each layer."""
        predicted = []
        for site in self.layers:
            logits = self.probes[site](states[site].float())
            predicted.append(logits.argmax(-1))
        return torch.stack(predicted).cpu()


@dataclass
class ConfusionCase:
    """An image in which patches are wrongly predicted as a class c."""

    image: int  # index in the split
    row: int  # position in the batch
    patches: int  # n_c(0)
    anchors: int  # number of tokens in blocked["correct"]
    wrong_class: int  # c
    correct_class: int  # most frequent true class of the mistaken patches
    mistaken: Tensor  # bool[T], the patches in n_c(0)
    truth: Tensor  # long[T], true classes, -1 if unlabelled
    # bool[T] by condition: "incorrect" (B_c), "correct" (B of the correct class)
    blocked: dict[str, Tensor]

    def outcomes(self, predicted: Tensor) -> dict[str, Tensor]:
        """Return the outcomes at each layer, f[L + 1] by name, from the predictions long[L + 1, T]."""
        as_wrong = predicted == self.wrong_class
        is_other = (self.truth != self.wrong_class) & (self.truth >= 0)
        count = (as_wrong & is_other).sum(-1)
        return {
            "rate": count / self.patches,
            "still_wrong": as_wrong[:, self.mistaken].float().mean(-1),
        }


def find_cases(
    predicted: Tensor,
    truth: Tensor,
    index: Tensor,
    wrong_class: int,
    block_layer: int = 0,
    min_patches: int = 1,
) -> list[ConfusionCase]:
    """Return the images with at least `min_patches` patches wrongly predicted as `wrong_class` at layer 0.

    Args:
        predicted: long[L + 1, B, T] of the unmodified model.
        truth: long[B, T], -1 for unlabelled patches.
        index: long[B], indices in the split.
        wrong_class, min_patches: c, and the smallest n_c(0) of a case.
        block_layer: Layer whose predictions define the blocked tokens.
    """
    cases = []
    for row, image in enumerate(index.tolist()):
        true = truth[row]
        reference = predicted[block_layer, row]
        other_class = (true != wrong_class) & (true >= 0)
        mistaken = (predicted[0, row] == wrong_class) & other_class
        if mistaken.sum() < min_patches:
            continue
        correct_class = true[mistaken].mode().values.item()
        blocked = {"incorrect": reference == wrong_class, "correct": reference == correct_class}
        case = ConfusionCase(
            image=image,
            row=row,
            patches=int(mistaken.sum()),
            anchors=int(blocked["correct"].sum()),
            wrong_class=wrong_class,
            correct_class=correct_class,
            mistaken=mistaken,
            truth=true,
            blocked=blocked,
        )
        cases.append(case)
    return cases


def confused_classes(run: ProbeRun, count: int) -> list[str]:
    """Return the `count` classes with the most wrongly predicted pixels at the adapter, most frequent first.

    Raises:
        UserError: The run has no adapter site, or `count` is not within 1..K.
    """
    names = run.metrics["classes"]
    if not 1 <= count <= len(names):
        expected = f"expected N from 1 to {len(names)}, the number of classes of {run.path}"
        raise UserError(f"--classes auto:{count}: {expected}")
    if ADAPTER not in run.sites:
        raise UserError(
            f"--classes auto:{count}: {run.path} has no adapter probe to rank classes by; name the classes"
        )
    site = run.sites.index(ADAPTER)
    wrong = run.counts.predicted[site] - run.counts.intersection[site]
    order = np.argsort(-wrong.sum(0).numpy(), kind="stable")
    return [names[k] for k in order[:count]]
