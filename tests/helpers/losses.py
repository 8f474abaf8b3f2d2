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

    def constant(self, pixels: Tensor) -> Tensor:
        return super().constant(self.smooth(pixels))
