"""The objective of the linear probes of one site: the task's loss on the states of all images, with a penalty.

The objective of a strength r is convex:

    f(w, b) = mean loss of the upsampled logits over labelled pixels + r/2 w^T D w        (D: space.py)

w is in coordinates in which D is the identity and the pooled within-class covariance diag(s) (`space.py`). There,
p_k (1 - p_k) s_j + r, with p the frequencies of the classes, is about the curvature along w_kj. L-BFGS starts from the
Hessian on some nodes of the masks (`curvature.py`).

States stay as the model has given them, in memory or in a mapped file. An evaluation maps its points to weights of
x - mean, adds up the images chunk by chunk, each made float32 once for all problems, and maps the gradient back.

Legend: P problems solved together, F folds, B images, T tokens, d width, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.ops.lbfgs import Objective
from probes.ops.quadrature import PreparedMasks
from probes.tasks.losses import CrossEntropy

from .held_out import lone_classes
from .space import SiteSpace, float_chunks, full_precision

NODES = 5  # of a cell of the token grid along each axis: the loss is exact to five digits


class SiteProblem:
    """The objective of a site, on all images and without each fold of them.

    It computes on the device of the masks; states may be on another one.

    Args:
        loss: Of the logits.
        states: f[B, T, d], of any dtype.
        masks: Of the images.
        fold_of: i64[B], fold of each image.
        scored: The masks by which folds are tested, from `scored_masks`; None where each class is in two folds, or
            there is one fold.

    Raises:
        UserError: No class is in two folds.
    """

    def __init__(
        self,
        loss: CrossEntropy,
        states: Tensor,
        masks: PreparedMasks,
        fold_of: Tensor,
        scored: PreparedMasks | None = None,
    ):
        self.lone = lone_classes(masks, fold_of)  # bool[F, K]
        self.loss = loss
        self.states = states
        self.masks = masks
        self.scored_masks = masks if scored is None else scored
        folds = range(len(self.lone))
        self.folds = [(fold_of == fold).nonzero().flatten() for fold in folds]
        self.space = SiteSpace.of(states, masks.soft)
        self.pixels = torch.stack([masks.pixels[images].sum() for images in self.folds])

    @property
    def start(self) -> Tensor:
        """The constant prediction, f64[K, d + 1]: w = 0, and the best biases."""
        bias = self.loss.constant(self.space.pixels)
        weights = bias.new_zeros(len(bias), len(self.space.spectrum))
        return torch.cat([weights, bias[:, None]], 1)

    def objective(self, strengths: Tensor, left_out: Sequence[int | None]) -> Objective:
        """Return value f64[P] and gradient f64[P, K, d + 1] of P problems as a function of their points.

        Args:
            strengths: f64[P].
            left_out: P folds, or None for all images.
        """
        ridge = self.space.ridge(strengths)
        pixels = self._pixels_without(left_out)

        def value_and_gradient(points: Tensor, problems: list[int]) -> tuple[Tensor, Tensor]:
            value = points.new_zeros(len(points))
            gradient = torch.zeros_like(points)
            probes = self.space.to_states(points)
            for fold in range(len(self.folds)):
                used = [i for i, problem in enumerate(problems) if left_out[problem] != fold]
                if used:
                    loss, by_probe = self.sums(fold, probes=probes[used], masks=self.masks)
                    value[used] += loss
                    gradient[used] += by_probe
            penalty = ridge[problems] * points
            penalty_value = (penalty * points).sum((1, 2)) / 2
            by_point = self.space.from_gradient(gradient) / pixels[problems, None, None]
            return value / pixels[problems] + penalty_value, by_point + penalty

        return value_and_gradient

    def _pixels_without(self, left_out: Sequence[int | None]) -> Tensor:
        """Return the labelled pixels f64[P] outside the folds that are left out."""
        total = self.pixels.sum()
        pixels = []
        for fold in left_out:
            if fold is None:
                pixels.append(total)
            else:
                pixels.append(total - self.pixels[fold])
        return torch.stack(pixels)

    def held_out_loss(self, points: Tensor) -> float:
        """Return the mean loss of the pixels that test folds, each under the point f64[F, K, d + 1] of its fold."""
        masks = self.scored_masks
        losses = []
        for fold, probe in enumerate(self.space.to_states(points)):
            loss, _ = self.sums(fold, probes=probe[None], masks=masks, needs_grad=False)
            losses.append(loss)
        mean = torch.cat(losses).sum() / masks.pixels.sum()
        return mean.item()

    @full_precision()
    def sums(
        self, fold: int, probes: Tensor, masks: PreparedMasks, needs_grad: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return the summed loss f64[P] of probes on the images of a fold, and its gradient f64[P, K, d + 1].

        Args:
            fold: The fold.
            probes: f64[P, K, d + 1], weights of x - mean, and biases.
            masks: Of all images, on the device of the probes.
            needs_grad: If False, the gradient is None.
        """
        count, classes, _ = probes.shape
        rows = probes.flatten(0, 1).float()
        weights = rows[:, :-1].contiguous()
        bias = rows[:, -1:]
        grid = tuple(masks.soft.shape[2:])
        total = probes.new_zeros(count)
        gradient = torch.zeros_like(probes)
        for part, x in float_chunks(
            self.states, images=self.folds[fold], mean=self.space.mean, rows=len(rows)
        ):
            # tokens are innermost, as the loss needs them
            by_class = (weights @ x.T).add_(bias).view(count, classes, -1, *grid)
            logits = by_class.transpose(1, 2)
            losses, by_logits = self.loss.of_images(
                logits, masks=masks[part], needs_grad=needs_grad
            )
            total += losses.sum(1)
            if needs_grad:
                by_row = by_logits.transpose(1, 2).flatten(2).flatten(0, 1)
                gradient[..., :-1] += (by_row @ x).view(count, classes, -1)
                gradient[..., -1] += by_row.sum(1).view(count, classes)
        if not needs_grad:
            return total, None
        return total, gradient
