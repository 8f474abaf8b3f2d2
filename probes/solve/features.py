"""Solve a linear probe on features of your own, without a model: `probes.solve_features`.

Shapes: N images, h w grid of the features, d width, K classes, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor, uint8

from llava_bidir.common.errors import UserError, error_context
from probes.compute.machine import solver_device
from probes.data.samplers import assign_folds
from probes.ops.geometry import GridPlacement, ignore_index_of, label_tensor
from probes.ops.quadrature import join_masks, prepare_masks
from probes.tasks import SEGMENTATION, TASKS

from .held_out import scored_masks
from .objective import NODES, SiteProblem
from .refinement import solve_classes
from .solution import Certificate


@dataclass(frozen=True)
class FeatureProbe:
    """A linear probe at the optimum of its loss.

    Args:
        weight: f32[K, d].
        bias: f32[K].
        strength: How much the weights are regularised.
        loss: Cross-entropy per pixel of images that were left out, in nats, at this strength; pixels of a class that no
            other fold has do not count.
        converged: The probe has a certificate: its gradient is below 1e-3 of that at w = 0, and a further step would
            lower the loss by less than 1e-4 nats.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    loss: float
    converged: bool

    def predict(self, features: Tensor, size: tuple[int, int]) -> np.ndarray:
        """Return the class of each pixel, uint8[N, H, W], of features f[N, h, w, d] whose grid covers `size` [H, W]."""
        logits = features.float() @ self.weight.T + self.bias
        by_class = logits.permute(0, 3, 1, 2)
        view = GridPlacement.full(size)
        return TASKS[SEGMENTATION].predict_pixels(by_class, size=size, view=view)


def solve_features(
    features: Tensor,
    masks: Sequence[np.ndarray | Tensor],
    classes: int,
    strength: float | None = None,
    folds: int = 4,
) -> FeatureProbe:
    """Return the linear probe of features at the optimum, as `probes solve` has it for the sites of a model.

    All is computed on the device of the features, which stay in memory; of a Mac's GPU, on the CPU.

    Args:
        features: f[N, h, w, d], on a grid that covers each image.
        masks: Classes of the pixels of each image, integers or bool [H, W], of any size; 255 is ignored, of more
            than 255 classes -1.
        classes: K.
        strength: Regularisation; None for the best one of held-out images.
        folds: Folds of images that choose it; copies of an image share one.

    Raises:
        UserError: Features and masks do not fit together, or a label is not a class.
    """
    check_features(features, masks=masks, strength=strength, folds=folds)
    problem = _feature_problem(features, masks=masks, classes=classes, folds=folds)
    strengths = None
    if strength is not None:
        strengths = [strength]
    solution = solve_classes(problem, strengths)
    weight = solution.weights[solution.row]
    shift = weight.double() @ solution.mean.double()  # bias is of features minus their mean
    bias = solution.bias[solution.row].double() - shift
    chosen = int(solution.chosen)
    certificate = Certificate(*solution.certificates[solution.row].tolist())
    return FeatureProbe(
        weight=weight.to(features.device),
        bias=bias.float().to(features.device),
        strength=solution.strengths[chosen].item(),
        loss=solution.loss[chosen].item(),
        converged=certificate.converged,
    )


def _feature_problem(
    features: Tensor, masks: Sequence[np.ndarray | Tensor], classes: int, folds: int
) -> SiteProblem:
    ignored = ignore_index_of(classes)
    prepare = partial(
        prepare_masks,
        num_classes=classes,
        grid=(features.shape[1], features.shape[2]),
        nodes=NODES,
        ignore_index=ignored,
    )
    parts = []
    for number, mask in enumerate(masks):
        with error_context(f"mask {number}"):
            parts.append(prepare(label_tensor(mask)[None]))
    prepared = join_masks(parts).to(solver_device(features.device))
    if not prepared.pixels.sum() > 0:
        raise UserError(f"no mask has a labelled pixel: all are {ignored}")
    contents = [x.detach().cpu().contiguous().view(uint8).numpy().tobytes() for x in features]
    fold_of = assign_folds([*map(hash, contents)], folds)  # copies of an image share one
    scored = scored_masks(
        prepared,
        fold_of=fold_of,
        target_of=lambda image: label_tensor(masks[image]).long(),
        prepare=prepare,
    )
    return SiteProblem(
        loss=TASKS[SEGMENTATION].loss,
        states=features.flatten(1, 2),
        masks=prepared,
        fold_of=fold_of,
        scored=scored,
    )


def check_features(
    features: Tensor, masks: Sequence[np.ndarray | Tensor], strength: float | None, folds: int
) -> None:
    """Raise a UserError unless features and masks fit together; for the arguments see :func:`solve_features`."""
    if not isinstance(features, Tensor):
        raise UserError(f"features must be a tensor, got {type(features).__name__}")
    if features.ndim != 4 or not features.is_floating_point():
        got = f"{features.dtype}{list(features.shape)}"
        raise UserError(f"features must be floats [images, rows, columns, width], got {got}")
    if len(features) != len(masks):
        raise UserError(f"got features of {len(features)} images, and {len(masks)} masks")
    if not 2 <= folds <= len(masks):
        raise UserError(f"folds must be 2 to {len(masks)}, the number of images; got {folds}")
    if not features.isfinite().all():
        raise UserError("features must be finite, but some are NaN or infinite")
    if strength is not None and not strength > 0:
        raise UserError(f"strength must be above 0, got {strength}")
