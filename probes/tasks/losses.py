"""The loss of probes whose targets are classes: all that `fit` and `solve` know of what they minimise.

Another loss is a subclass of it, and `loss` of a task; `solve` needs a convex one.
`tests/probes/tasks/test_losses.py` compares the parts of a loss with one another.

Legend: P probes, B images, K classes, h w token grid.
"""

import torch
from torch import Tensor

from probes.ops.cross_entropy import loss_and_gradient
from probes.ops.quadrature import PreparedMasks


class SoftmaxCurvature:
    """The matrix diag(p) - p p^T of the probabilities p of a pixel, of any loss that is logsumexp - a linear function.

    Args:
        logits: f[..., K].
    """

    def __init__(self, logits: Tensor):
        self.probability = logits.softmax(-1)

    def diagonal(self) -> Tensor:
        """Return the diagonal f[..., K]."""
        return self.probability * (1 - self.probability)

    def trace(self) -> Tensor:
        """Return the sum of the diagonal f[...], at least 0: how unsure a probe is; 0 where a logit is not finite."""
        trace = 1 - self.probability.square().sum(-1)
        return trace.nan_to_num(0).clamp(min=0)

    def times(self, change: Tensor) -> Tensor:
        """Return the product with f[..., K]."""
        product = self.probability * change
        product -= self.probability * product.sum(-1, keepdim=True)
        return product


class CrossEntropy:
    """The paper's loss: minus the logarithm of the probability of a pixel's class."""

    def describe(self) -> str:
        """Return class and settings, for the identity of a run: "LabelSmoothing(share=0.2)"."""
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def of_images(
        self, logits: Tensor, masks: PreparedMasks, needs_grad: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss of upsampled logits, summed over the pixels of each image, f64[P, B], and its gradient.

        Args:
            logits: On the token grid, f[P, B, K, h, w].
            masks: B masks.
            needs_grad: If False, the gradient is None, else f[P, B, K, h, w].
        """
        return loss_and_gradient(logits, masks, needs_grad)

    def curvature(self, logits: Tensor) -> SoftmaxCurvature:
        """Return the second derivative by the logits f[..., K] of a pixel, which must not depend on its class."""
        return SoftmaxCurvature(logits)

    def constant(self, pixels: Tensor) -> Tensor:
        """Return the logits f64[K] of lowest loss that are the same everywhere.

        They are the logarithms of the frequencies. A class without pixels has half a pixel.

        Args:
            pixels: f64[K], labelled pixels of each class.
        """
        return torch.where(pixels > 0, pixels, 0.5).log() - pixels.sum().log()
