"""The cases of a knockout: images in which patches are taken for a class c that they are not. (App. C.1)

    layer 0          the adapter's probe
    n_c(0)           patches that it wrongly calls c: labelled, and mostly of another class
    n_c(l)           the same at layer l, at any patch: the rate n_c(l) / n_c(0) may pass 1, as in Fig. 11
    correct class    the most frequent true class of the patches in n_c(0); of several, the first in the list of classes
    B_c              the patches that `labels_from`'s probe calls c, rightly or wrongly (Eq. 1)

The paper does not say which layer's predictions define B_c; the adapter's are taken, as for n_c(0), unless another site
is named. Its text speaks of correctly classified tokens where Eq. 1 takes all that are predicted so: anchors "true"
takes, of each B_c, only those that are rightly (for the correct class) or wrongly (for c) predicted.

Shapes: B images, T patches, L layers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llava_bidir.common.errors import UserError
from probes.models.attention_masks import as_list
from probes.models.frozen_mllm import ADAPTER, FrozenMLLM
from probes.models.knockout import Knockout
from probes.results.probe_run import ProbeRun

ANCHORS = ("predicted", "true")


class PatchReader:
    """A model and its probes as one function: pixels in, the class of each patch at each layer out.

    Args:
        run: A finished probe run that has all layers.
    """

    def __init__(self, run: ProbeRun):
        self.mllm: FrozenMLLM = run.mllm()
        self.layers = run.layers
        self.heads = {site: head.to(self.mllm.device) for site, head in run.probes().items()}

    @property
    def attention_heads(self) -> int:
        """A, query heads of a decoder layer."""
        return self.mllm.model.config.get_text_config().num_attention_heads

    def visible(self) -> tuple[Tensor, Tensor]:
        """Which image token the mask, in any layer, lets attend to which, bool[T, T], and to how many other tokens,
        long[T].
        """
        nothing = Knockout(torch.zeros(1, self.mllm.grid[0] * self.mllm.grid[1], dtype=torch.bool))
        mask = torch.stack([mask[0, 0] for mask in as_list(self.mllm.attention_masks(1, nothing))]).any(0)
        image, rows = self.mllm.is_image, mask[self.mllm.is_image]
        return rows[:, image].cpu(), rows[:, ~image].sum(1).cpu()

    def predict(self, pixels: Tensor, knockout: Knockout | None = None) -> Tensor:
        """long[L + 1, B, T]: the predicted class of each patch, at the adapter and behind each layer."""
        states = self.mllm.states(pixels, self.layers, knockout)
        return torch.stack([self.heads[site](states[site].float()).argmax(-1) for site in self.layers]).cpu()


@dataclass
class ConfusionCase:
    """An image in which patches are taken for a class c that they are not.

    Args:
        image: Its index in the split.
        row: Its place in the batch.
        patches: n_c(0), how many there are.
        anchors: Patches that are predicted the correct class.
        wrong_class: c.
        correct_class: The most frequent true class of the patches wrongly predicted c.
        mistaken: bool[T], the patches in n_c(0).
        elsewhere: bool[T], labelled patches whose true class is not c.
        blocked: bool[T] by "incorrect" (B_c) and "correct" (B of the correct class).
    """

    image: int
    row: int
    patches: int
    anchors: int
    wrong_class: int
    correct_class: int
    mistaken: Tensor
    elsewhere: Tensor
    blocked: dict[str, Tensor]

    def wrong(self, predicted: Tensor) -> Tensor:
        """n_c(l): patches wrongly predicted c at each layer, f[L + 1], from predictions long[L + 1, T]."""
        return ((predicted == self.wrong_class) & self.elsewhere).sum(-1).float()


def find_cases(
    predicted: Tensor,
    truth: Tensor,
    index: Tensor,
    wrong_class: int,
    reference: int = 0,
    min_patches: int = 1,
    anchors: str = "predicted",
) -> list[ConfusionCase]:
    """The images of a batch in which at least `min_patches` patches are wrongly predicted `wrong_class` at layer 0.

    Args:
        predicted: long[L + 1, B, T] of the unmodified model.
        truth: long[B, T], -1 where unlabelled.
        index: long[B] in the split.
        wrong_class: c.
        reference: The layer whose predictions say what is blocked.
        min_patches: See above.
        anchors: "predicted" (Eq. 1) or "true", see the module's docstring.
    """
    cases = []
    for row, image in enumerate(index.tolist()):
        real, labels = truth[row], predicted[reference, row]
        elsewhere = (real != wrong_class) & (real >= 0)
        mistaken = (predicted[0, row] == wrong_class) & elsewhere
        if mistaken.sum() < min_patches:
            continue
        correct_class = real[mistaken].mode().values.item()
        blocked = {"incorrect": labels == wrong_class, "correct": labels == correct_class}
        if anchors == "true":
            blocked = {
                "incorrect": blocked["incorrect"] & elsewhere,
                "correct": blocked["correct"] & (real == correct_class),
            }
        patches, right = int(mistaken.sum()), int(blocked["correct"].sum())
        cases.append(
            ConfusionCase(image, row, patches, right, wrong_class, correct_class, mistaken, elsewhere, blocked)
        )
    return cases


def confused_classes(run: ProbeRun, count: int) -> list[str]:
    """The `count` classes that the adapter's probe most often predicts where they are not, by pixels of the split.

    Raises:
        UserError: The run has no adapter site, or `count` is not within 1..K.
    """
    names = run.metrics["classes"]
    if not 1 <= count <= len(names):
        raise UserError(f"--classes auto:{count}: N must lie within 1..{len(names)}, the classes of {run.path}")
    if ADAPTER not in run.sites:
        raise UserError(f"{run.path} has no probe at the adapter, by which confusions are ranked; name the classes")
    site = run.sites.index(ADAPTER)
    wrong = (run.counts.predicted[site] - run.counts.intersection[site]).sum(0).numpy()
    return [names[k] for k in np.argsort(-wrong, kind="stable")[:count]]
