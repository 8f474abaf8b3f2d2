"""Another loss of classes, as somebody would write it who wants to try it."""

from dataclasses import replace

from torch import Tensor

from probes.ops.quadrature import PreparedMasks
from probes.tasks.losses import CrossEntropy

CROSS_ENTROPY = CrossEntropy()


class LabelSmoothing(CrossEntropy):
    """The cross-entropy with labels of which a share is divided among all classes; `F.cross_entropy` has it, too."""

    def __init__(self, share: float):
        self.share = share

    def smooth(self, labels: Tensor, dim: int = -1) -> Tensor:
        mean = labels.mean(dim, keepdim=True)
        return (1 - self.share) * labels + self.share * mean

    def of_images(
        self, logits: Tensor, masks: PreparedMasks, needs_grad: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        soft = self.smooth(masks.soft, dim=1)
        return super().of_images(logits, replace(masks, soft=soft), needs_grad)

    def of_pixels(
        self, logits: Tensor, labels: Tensor, needs_grad: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        loss, gradient = super().of_pixels(logits, labels, needs_grad)
        at_label = labels.expand(loss.shape)[..., None]
        of_label = logits.gather(-1, at_label)[..., 0]
        loss = loss + self.share * (of_label - logits.mean(-1))
        if not needs_grad:
            return loss, None
        gradient = gradient - self.share / logits.shape[-1]
        added = gradient.new_full((), self.share).expand(at_label.shape)
        return loss, gradient.scatter_add(-1, at_label, added)

    def constant(self, pixels: Tensor) -> Tensor:
        return super().constant(self.smooth(pixels))
