"""What a pass over all images gives about the probes of one site, exactly: losses and gradients at their points.

Legend: W strengths in the window, F folds, G = F + 1 probes of a strength, or 1 when the strength is settled,
B images, T tokens, K classes, d width.
"""

import torch
from torch import Tensor

from probes.ops.quadrature import PreparedMasks
from probes.tasks.losses import Loss

from .moments import Moments, SiteSpace, full_precision
from .objective import loss_sums
from .pixel_sample import Pixels


class PassSums:
    """Losses and gradients of a site's probes, summed over the images of a pass.

    Args:
        loss: Of the logits.
        mean: f64[d], of the states.
        points: f64[W, G, K, d + 1], weights of x - mean, and biases.
        left_out: The fold that each of the G probes leaves out.
        folds: F.
    """

    def __init__(
        self,
        loss: Loss,
        mean: Tensor,
        points: Tensor,
        left_out: list[int | None],
        folds: int,
    ):
        self.loss = loss
        self.mean = mean.float()
        self.points = points
        self.left_out = left_out
        self.value = points.new_zeros(points.shape[:2])
        self.gradient = torch.zeros_like(points)
        self.held_out = points.new_zeros(len(points), folds)
        self.scored = points.new_zeros(())  # pixels that test folds

    def add(
        self,
        states: Tensor,
        masks: PreparedMasks,
        scored: PreparedMasks,
        folds: list[int],
    ) -> None:
        """Add images of states f[B, T, d].

        Args:
            states: Of B images.
            masks: Of the images.
            scored: The masks by which folds are tested; see `held_out.py`.
            folds: The fold of each image.
        """
        x = states.float() - self.mean
        inputs = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        self.scored += scored.pixels.sum()
        for fold in sorted(set(folds)):
            images = [i for i, own in enumerate(folds) if own == fold]
            self._add_fold(inputs[images], masks[images], scored[images], fold)

    def _add_fold(
        self,
        inputs: Tensor,
        masks: PreparedMasks,
        scored: PreparedMasks,
        fold: int,
    ) -> None:
        used = [g for g, left_out in enumerate(self.left_out) if left_out != fold]
        points = self.points[:, used]
        value, gradient = loss_sums(self.loss, inputs, masks, points.flatten(0, 1))
        self.value[:, used] += value.view(points.shape[:2])
        self.gradient[:, used] += gradient.view_as(points)
        if fold in self.left_out:
            points = self.points[:, self.left_out.index(fold)]
            value, _ = loss_sums(self.loss, inputs, scored, points, needs_grad=False)
            self.held_out[:, fold] += value

    @full_precision()
    def uncertainty(self, states: Tensor, pixels: Pixels) -> Tensor:
        """Return how unsure a probe is of each pixel, f32[n]: the trace of the loss's curvature by logits.

        It is the probe of all images in the middle of the window.

        Args:
            states: f[B, T, d].
            pixels: n pixels of these images.
        """
        probe = self.points[len(self.points) // 2, -1].float()
        by_token = (states.float() - self.mean) @ probe[:, :-1].T + probe[:, -1]
        return self.loss.curvature(pixels.interpolate(by_token)).trace()

    def totals(self) -> tuple[Tensor, ...]:
        """Return the sums, which are added over processes in place."""
        return self.value, self.gradient, self.held_out, self.scored

    def means(self, space: SiteSpace, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `PassRefinement.accept_losses` takes; `pixels` f64[F] are the labelled ones of each fold."""
        total = pixels.sum()
        used = torch.stack(
            [total if fold is None else total - pixels[fold] for fold in self.left_out]
        )
        gradient = torch.cat(
            [space.from_gradient(self.gradient[..., :-1]), self.gradient[..., -1:]], -1
        )
        return self.value / used, gradient / used[:, None, None], self.held_out / self.scored


def null_gradient(loss: Loss, space: SiteSpace, moments: Moments) -> Tensor:
    """Return the gradient of the mean loss of all images at the constant prediction, f64[K, d + 1].

    The prediction is the same everywhere, so that the moments have its gradient.
    """
    count, first, _ = moments.without(None)
    first = first + count[:, None] * (moments.pivot.double() - space.mean)
    classes = torch.arange(len(count), device=count.device)
    _, by_logits = loss.of_pixels(loss.constant(count).expand(len(count), -1), classes)
    weights = space.from_gradient(by_logits.T @ first)
    biases = by_logits.T @ count
    return torch.cat([weights, biases[:, None]], 1) / count.sum()
