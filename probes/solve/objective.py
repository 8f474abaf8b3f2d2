"""The objective of linear probes of one site: the task's loss with a penalty, on images or pixels in memory.

The objective of a strength r is convex:

    f(w, b) = mean loss of the upsampled logits over labelled pixels + r/2 w^T D w        (D: moments.py)

w is in coordinates in which D is the identity and the pooled within-class covariance diag(s) (`moments.py`). There,
p_k (1 - p_k) s_j + r, with p the frequencies of the classes, is about the curvature along w_kj. That is what L-BFGS
starts from on a sample of pixels. With all images in memory it starts from the Hessian on some of their nodes
(`curvature.py`), which takes half the time.

`strength_path.py` finds the region of the best strength with two nodes per cell (`probes/ops`). What chooses among
neighbouring strengths, certificates, the last probes and reported losses use five.

Legend: P problems solved together, F folds, B images, T tokens, d width, K classes, n pixels.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from probes.ops.lbfgs import FirstGuess, Objective
from probes.ops.quadrature import PreparedMasks
from probes.tasks.losses import Loss

from .curvature import SampleHessian, first_damping, sample_nodes
from .held_out import class_pixels, lone_classes
from .moments import SiteSpace, full_precision

LOOSE_NODES = 2
TIGHT_NODES = 5
CHUNK_NUMEL = 2**24  # logits at a time
# Nodes of the sample in memory: one for two weights of a probe, at most one for eight tokens, at least 500. On 184
# photos of CamVid, twice as many take a tenth longer: there are fewer steps, but each costs more.
NODES_PER_WEIGHT = 0.5
TOKENS_PER_NODE = 8
LEAST_SAMPLED = 500
SAMPLE_RESIDUAL = 0.1  # of the step on the sample; with 0.03 it takes as many steps and more time
# the strongest and the weakest regularisation that is tried, in half decades: 1000 and 1e-8
STRONGEST = -6
WEAKEST = 16


def half_decades(first: int, last: int) -> tuple[float, ...]:
    """Return strengths in steps of half a decade, from strong to weak: 0 is 1, and 2 is 0.1."""
    return tuple(10 ** (-i / 2) for i in range(first, last + 1))


def half_decade(strength: float) -> int:
    """Return the index of a strength on the grid in half decades, 0 for 1 and 2 for 0.1."""
    return round(-2 * math.log10(strength))


class FoldProblem:
    """The objective of a site on the images of some folds; a subclass has them in memory.

    Args:
        space: Coordinates of the site.
        loss: Of the logits.
        pixels: f64[F], labelled pixels of each fold.
        scored: f64[F], those by which the fold is tested; see `held_out.py`.
        lone: bool[F, K], classes that the fold alone has, and that probes without it do not know.
    """

    has_nodes = True  # the number of nodes makes a difference

    def __init__(
        self,
        space: SiteSpace,
        loss: Loss,
        pixels: Tensor,
        scored: Tensor,
        lone: Tensor,
    ):
        self.space = space
        self.loss = loss
        self.pixels = pixels
        self.scored = scored
        self.lone = lone

    def sums(
        self,
        fold: int,
        points: Tensor,
        nodes: int,
        needs_grad: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the summed loss f64[P] of points f64[P, K, d + 1] on a fold, and its gradient."""
        raise NotImplementedError

    def scored_sum(self, fold: int, point: Tensor) -> Tensor:
        """Return the summed loss f64[] of a point f64[K, d + 1] on the pixels by which a fold is tested."""
        raise NotImplementedError

    @property
    def start(self) -> Tensor:
        """The constant prediction, f64[K, d + 1]: w = 0, and the best biases."""
        bias = self.loss.constant(self.space.pixels)
        weights = bias.new_zeros(len(bias), len(self.space.spectrum))
        return torch.cat([weights, bias[:, None]], 1)

    def first_guess(
        self,
        strengths: Tensor,
        left_out: Sequence[int | None],
        nodes: int,
        start: Tensor,
    ) -> FirstGuess | Tensor:
        """Return the first guess of the inverse Hessian for `minimise`.

        Args:
            strengths, left_out, nodes: As of :meth:`objective`.
            start: f64[P, K, d + 1], points from which it starts.
        """
        by_logits = self.loss.curvature(self.start[:, -1]).diagonal().clamp(min=1e-4)
        curvature = by_logits[:, None] * self.space.input_spectrum
        return 1 / (curvature + self.space.ridge(strengths))

    def objective(
        self,
        strengths: Tensor,
        left_out: Sequence[int | None],
        nodes: int,
    ) -> Objective:
        """Return value f64[P] and gradient f64[P, K, d + 1] of P problems as a function of their points.

        Args:
            strengths: f64[P].
            left_out: P folds, or None for all images.
            nodes: `LOOSE_NODES` or `TIGHT_NODES`.
        """
        ridge = self.space.ridge(strengths)

        def value_and_gradient(points: Tensor, problems: list[int]) -> tuple[Tensor, Tensor]:
            value = points.new_zeros(len(points))
            gradient = torch.zeros_like(points)
            for fold in range(len(self.pixels)):
                used = [i for i, problem in enumerate(problems) if left_out[problem] != fold]
                if used:
                    loss, by_point = self.sums(fold, points[used], nodes)
                    value[used] += loss
                    gradient[used] += by_point
            pixels = torch.stack([self._pixels_without(left_out[problem]) for problem in problems])
            penalty = ridge[problems] * points
            value = value / pixels + (penalty * points).sum((1, 2)) / 2
            return value, gradient / pixels[:, None, None] + penalty

        return value_and_gradient

    def _pixels_without(self, fold: int | None) -> Tensor:
        return self.pixels.sum() - (0 if fold is None else self.pixels[fold])

    def held_out_loss(self, points: Tensor) -> float:
        """Return the mean loss of the pixels that test folds, each under the point f64[F, K, d + 1] of its fold."""
        losses = [self.scored_sum(fold, point) for fold, point in enumerate(points)]
        return (torch.stack(losses).sum() / self.scored.sum()).item()


class SiteProblem(FoldProblem):
    """The objective of a site on images in memory.

    Args:
        loss: Of the logits.
        states: f[B, T, d], on the device of the computation.
        loose: The masks of the images, with few nodes.
        tight: The same with many nodes.
        fold_of: i64[B], fold of each image.
        scored: The masks with many nodes by which folds are tested, from `scored_masks`; None where each class is in
            two folds, or there is one fold.

    Raises:
        UserError: No class is in two folds.
        ValueError: `scored` has pixels of a class that only their fold has.
    """

    def __init__(
        self,
        loss: Loss,
        states: Tensor,
        loose: PreparedMasks,
        tight: PreparedMasks,
        fold_of: Tensor,
        scored: PreparedMasks | None = None,
    ):
        count = int(fold_of.max()) + 1
        by_class = class_pixels(tight, fold_of, count)
        scored_by_class = by_class if scored is None else class_pixels(scored, fold_of, count)
        lone = lone_classes(by_class)
        if (lone & (scored_by_class > 0)).any():
            raise ValueError(
                "a class is in one fold only, and its pixels test it; see `scored_masks`"
            )
        order = fold_of.argsort(stable=True)
        sizes = fold_of.bincount().tolist()
        space = SiteSpace.of(states, tight.soft)
        folds = [images.tolist() for images in order.split(sizes)]
        self.tokens = [space.coordinates(states[images]) for images in folds]
        both = (LOOSE_NODES, loose), (TIGHT_NODES, tight)
        self.masks = {nodes: [masks[images] for images in folds] for nodes, masks in both}
        self.scored_masks = self.masks[TIGHT_NODES]
        if scored is not None:
            self.scored_masks = [scored[images] for images in folds]
        pixels, tested = (
            torch.stack([masks.pixels.sum() for masks in of_folds])
            for of_folds in (self.masks[TIGHT_NODES], self.scored_masks)
        )
        super().__init__(
            space,
            loss,
            pixels,
            tested,
            lone,
        )

    def first_guess(
        self,
        strengths: Tensor,
        left_out: Sequence[int | None],
        nodes: int,
        start: Tensor,
    ) -> FirstGuess | Tensor:
        """Return the inverse of the Hessian on a sample of nodes of all images; arguments as of the base class.

        The curvature of the loss with few nodes is another one where logits are very rough; a step by it would be far
        too long for the loss with many.
        """
        weights = self.start.numel()
        tokens = sum(len(x) * x.shape[1] for x in self.tokens)
        most = min(round(NODES_PER_WEIGHT * weights), tokens // TOKENS_PER_NODE)
        count = max(LEAST_SAMPLED, most)
        sample = sample_nodes(
            self.loss,
            self.tokens,
            self.masks[nodes],
            count,
            start.mean(0),
        )
        damping = first_damping(weights, len(sample.weights))

        def inverse_hessian(points: Tensor, gradient: Tensor) -> Callable[[Tensor], Tensor]:
            hessian = SampleHessian(
                self.loss,
                sample,
                points,
                gradient,
                left_out,
                self.space.ridge(strengths),
                self.space.input_spectrum,
                torch.full_like(strengths, damping),
            )
            return partial(hessian.solve, residual=SAMPLE_RESIDUAL)

        return inverse_hessian

    def sums(
        self,
        fold: int,
        points: Tensor,
        nodes: int,
        needs_grad: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the summed loss of points on a fold, and its gradient; `nodes` as for :meth:`objective`."""
        return loss_sums(self.loss, self.tokens[fold], self.masks[nodes][fold], points, needs_grad)

    def scored_sum(self, fold: int, point: Tensor) -> Tensor:
        """Return the summed loss f64[] of a point f64[K, d + 1] on the pixels by which a fold is tested."""
        masks = self.scored_masks[fold]
        return loss_sums(self.loss, self.tokens[fold], masks, point[None], needs_grad=False)[0][0]


class PixelProblem(FoldProblem):
    """The objective of a site on a sample of pixels; there are no nodes.

    Args:
        space: Coordinates of the site.
        loss: Of the logits.
        inputs: f32[n, d + 1], states in the coordinates, and ones.
        labels: i64[n].
        weights: f64[n], labelled pixels that each one stands for.
        fold_of: i64[n], fold of the image of each pixel.
        folds: Number of folds.
    """

    has_nodes = False

    def __init__(
        self,
        space: SiteSpace,
        loss: Loss,
        inputs: Tensor,
        labels: Tensor,
        weights: Tensor,
        fold_of: Tensor,
        folds: int,
    ):
        counts = weights.new_zeros(folds, len(space.pixels))
        counts.index_put_((fold_of, labels), weights, accumulate=True)
        lone = lone_classes(counts)
        scored = weights.masked_fill(lone[fold_of, labels], 0)
        parts = [(fold_of == fold).nonzero().flatten() for fold in range(folds)]
        self.parts = [(inputs[part], labels[part], weights[part].float()) for part in parts]
        self.scored_weights = [scored[part].float() for part in parts]
        pixels, tested = (
            torch.stack([of_all[part].sum() for part in parts]) for of_all in (weights, scored)
        )
        super().__init__(
            space,
            loss,
            pixels,
            tested,
            lone,
        )

    @full_precision()
    def sums(
        self,
        fold: int,
        points: Tensor,
        nodes: int,
        needs_grad: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the summed loss of points on a fold, and its gradient."""
        inputs, labels, weights = self.parts[fold]
        count, classes = points.shape[:2]
        logits = (inputs @ points.flatten(0, 1).T.to(inputs)).view(-1, count, classes)
        losses, by_logits = self.loss.of_pixels(logits, labels[:, None], needs_grad)
        total = (losses * weights[:, None]).sum(0, dtype=torch.float64)
        if not needs_grad:
            return total, None
        by_logits *= weights[:, None, None]
        return total, (by_logits.flatten(1).T @ inputs).view_as(points).double()

    @full_precision()
    def scored_sum(self, fold: int, point: Tensor) -> Tensor:
        """Return the summed loss f64[] of a point f64[K, d + 1] on the pixels by which a fold is tested."""
        inputs, labels, _ = self.parts[fold]
        losses, _ = self.loss.of_pixels(inputs @ point.T.to(inputs), labels, needs_grad=False)
        return (losses * self.scored_weights[fold]).sum(dtype=torch.float64)


@full_precision()
def loss_sums(
    loss: Loss,
    tokens: Tensor,
    masks: PreparedMasks,
    points: Tensor,
    needs_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss f64[P] of P linear probes on the same images, and its gradient f64[P, K, n].

    Args:
        loss: Of the logits.
        tokens: f32[B, T, n], the inputs of the probes.
        masks: B masks.
        points: f64[P, K, n], weights of the inputs.
        needs_grad: If False, the gradient is None.
    """
    n_probes, classes = points.shape[:2]
    weights = points.flatten(0, 1).to(tokens)
    grid = tuple(masks.soft.shape[2:])
    total = torch.zeros(n_probes, dtype=torch.float64, device=points.device)
    gradient = torch.zeros_like(points) if needs_grad else None
    step = max(1, CHUNK_NUMEL // (len(weights) * tokens.shape[1]))
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)
        x = tokens[start : start + step].flatten(0, 1)
        # tokens are innermost, as the loss needs them
        by_class = (weights @ x.T).view(n_probes, classes, -1, *grid)
        losses, by_logits = loss.of_images(by_class.transpose(1, 2), masks[part], needs_grad)
        total += losses.sum(1)
        if needs_grad:
            by_weight_row = by_logits.transpose(1, 2).flatten(2).flatten(0, 1)
            gradient += (by_weight_row @ x).view_as(points)
    return total, gradient
