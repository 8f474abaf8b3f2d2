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
    log_odds         mean over the patches in n_c(0) of the logit of their own true class minus that of c, in nats;
                     needs no threshold, and rises where patches are corrected
    lean             of the patches of class c or the correct class that layer 0 predicts as either, the share predicted
                     as c minus the share predicted as the correct class: the probe's criterion between the two

The paper does not say which layer's predictions define B_c. The adapter's are the default, as for n_c(0). Its text
speaks of correctly classified tokens, but Eq. 1 blocks all that are predicted as c. Block set "correct" follows the
text: of B of the correct class the correctly predicted patches, of B_c the wrongly predicted ones.

Shapes: B images, C cases, K classes, T patches, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llava_bidir.common.errors import UserError
from probes.models.attention_masks import as_list, is_allowed
from probes.models.frozen_mllm import FrozenMLLM
from probes.models.knockout import Knockout
from probes.models.sites import ADAPTER
from probes.results.probe_run import ProbeRun

from .schema import LEAN


class PatchReader:
    """Predict the class of each patch at each layer, with the model and the probes of a run that has all layers."""

    def __init__(self, run: ProbeRun):
        self.mllm: FrozenMLLM = run.mllm()
        self.layers = run.layers
        self.probes = {site: probe.to(self.mllm.device) for site, probe in run.probes().items()}

    @property
    def attention_heads(self) -> int:
        """A, query heads of a decoder layer."""
        return self.mllm.model.config.get_text_config().num_attention_heads

    def visible(self) -> tuple[Tensor, Tensor]:
        """Return the image tokens that each one sees in any layer, bool[T, T], and how many other tokens, long[T]."""
        nothing = Knockout(torch.zeros(1, self.mllm.grid[0] * self.mllm.grid[1], dtype=torch.bool))
        mask = torch.stack([is_allowed(mask[0, 0]) for mask in as_list(self.mllm.attention_masks(1, nothing))]).any(0)
        image, rows = self.mllm.is_image, mask[self.mllm.is_image]
        return rows[:, image].cpu(), rows[:, ~image].sum(1).cpu()

    def predict(self, pixels: Tensor, knockout: Knockout | None = None) -> Tensor:
        """Return the predicted class of each patch at the adapter and after each layer, long[L + 1, B, T]."""
        return self.predict_states(self.mllm.states(pixels, self.layers, knockout))

    def predict_states(self, states: dict[str, Tensor]) -> Tensor:
        """Return the predicted class of each patch, long[L + 1, B, T], from the states f[B, T, d] of each layer."""
        return torch.stack([self._logits(states, site).argmax(-1) for site in self.layers]).cpu()

    def measure(self, states: dict[str, Tensor], cases: Sequence["ConfusionCase"]) -> list[dict[str, Tensor]]:
        """Return the outcomes of each case, f[L + 1] by name, from the states f[C, T, d] of one batch row per case."""
        predicted, odds = [], []
        pairs = [[case.truth.clamp(min=0), torch.full_like(case.truth, case.wrong_class)] for case in cases]
        true_and_wrong = torch.stack([torch.stack(pair, -1) for pair in pairs]).to(self.mllm.device)  # long[C, T, 2]
        for site in self.layers:
            logits = self._logits(states, site)
            predicted.append(logits.argmax(-1))
            true, wrong = logits.gather(-1, true_and_wrong).unbind(-1)
            odds.append(true - wrong)
        predicted, odds = torch.stack(predicted, 1).cpu(), torch.stack(odds, 1).cpu()
        return [case.outcomes(*values) for case, *values in zip(cases, predicted, odds, strict=True)]

    def _logits(self, states: dict[str, Tensor], site: str) -> Tensor:
        return self.probes[site](states[site].float())


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
    confusable: Tensor  # bool[T], patches of c or the correct class that layer 0 predicts as either
    truth: Tensor  # long[T], true classes, -1 if unlabelled
    blocked: dict[str, Tensor]  # bool[T] by condition: "incorrect" (B_c), "correct" (B of the correct class)

    def outcomes(self, predicted: Tensor, log_odds: Tensor) -> dict[str, Tensor]:
        """Return the outcomes at each layer, f[L + 1] by name.

        Takes the predictions long[L + 1, T] and each patch's logit of its true class minus that of c, f[L + 1, T].
        """
        wrong, correct = predicted == self.wrong_class, predicted == self.correct_class
        share = lambda hit, patches: hit[:, patches].float().mean(-1)
        return {
            "rate": (wrong & (self.truth != self.wrong_class) & (self.truth >= 0)).sum(-1) / self.patches,
            "still_wrong": share(wrong, self.mistaken),
            "log_odds": log_odds[:, self.mistaken].mean(-1),
            LEAN: share(wrong, self.confusable) - share(correct, self.confusable),
        }


def find_cases(
    predicted: Tensor,
    truth: Tensor,
    index: Tensor,
    wrong_class: int,
    block_layer: int = 0,
    min_patches: int = 1,
    block_set: str = "predicted",
) -> list[ConfusionCase]:
    """Return the images with at least `min_patches` patches wrongly predicted as `wrong_class` at layer 0.

    Args:
        predicted: long[L + 1, B, T] of the unmodified model.
        truth: long[B, T], -1 for unlabelled patches.
        index: long[B], indices in the split.
        wrong_class, min_patches: c, and the smallest n_c(0) of a case.
        block_layer, block_set: Layer whose predictions define the blocked tokens, and which of them: see above.
    """
    cases = []
    for row, image in enumerate(index.tolist()):
        true, reference = truth[row], predicted[block_layer, row]
        other_class = (true != wrong_class) & (true >= 0)
        mistaken = (predicted[0, row] == wrong_class) & other_class
        if mistaken.sum() < min_patches:
            continue
        correct_class = true[mistaken].mode().values.item()
        incorrect, correct = reference == wrong_class, reference == correct_class
        if block_set == "correct":
            incorrect, correct = incorrect & other_class, correct & (true == correct_class)
        counts, blocked = (int(mistaken.sum()), int(correct.sum())), {"incorrect": incorrect, "correct": correct}
        pair = torch.tensor([wrong_class, correct_class])
        confusable = torch.isin(true, pair) & torch.isin(predicted[0, row], pair)
        classes, patches = (wrong_class, correct_class), (mistaken, confusable, true)
        cases.append(ConfusionCase(image, row, *counts, *classes, *patches, blocked))
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
        raise UserError(f"--classes auto:{count}: {run.path} has no adapter probe to rank classes by; name the classes")
    site = run.sites.index(ADAPTER)
    wrong = (run.counts.predicted[site] - run.counts.intersection[site]).sum(0).numpy()
    return [names[k] for k in np.argsort(-wrong, kind="stable")[:count]]
