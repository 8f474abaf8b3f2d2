"""Exact cross-entropy of bilinearly upsampled logits at the resolution of the mask, for many probes at once.

With z the logits on the patch grid and U the bilinear upsampling (`bilinear.py`), the loss summed over valid pixels is

    sum_px [ logsumexp_k (U z)  -  (U z)[label] ]   =   sum_px logsumexp_k (U z)  -  <z, T>,     T = U^T onehot(label)

- The labels enter through T only, `f[B, K, h, w]`. It is computed once and shared by all probes.
- The gradient is `U^T softmax(U z) - T`. It is computed in the forward, in the same pass over the chunks as the
  logsumexp; backward only scales it.
- No tensor is larger than a chunk or than K * h * W (upsampled along one axis only).

Labels at the resolution of the token grid would cost 3 mIoU points; `label_stride` skips pixels, not the interpolation.

Legend: P probes, B images, K classes, h w patch grid, H W pixels, R C pixel rows and columns of one chunk.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .bilinear import ResamplingPlan, band_rows, compute_dtype, make_plan
from .geometry import GridPlacement
from .kernels import use_triton

# If no logit of a node is further below the node's maximum, exp cannot underflow in float32 at any pixel: the nearest
# node has weight >= 1/4, so the sum is >= exp(-0.75 * 80). Subtracting the maximum per pixel is then unnecessary.
SAFE_RANGE = 80.0
# exp(x) = exp2(x * LOG2_E), scaled once on the grid. torch's exp2 is four times as fast as exp on a CPU.
LOG2_E = math.log2(math.e)


def upsampled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = 255,
    *,
    view: GridPlacement | None = None,
    label_stride: int = 1,
    reduction: str = "mean",
) -> Tensor:
    """Return the cross-entropy of the upsampled logits: a scalar, or f[P] for P probes that share the target.

    For each probe, equals `F.cross_entropy(F.interpolate(logits, target.shape[-2:], mode="bilinear"), target,
    ignore_index=ignore_index)`, except that a batch without valid pixels has loss 0 and zero gradient instead of NaN.
    Half-precision logits are computed and returned in float32, also under autocast; float64 logits in float64. (On a
    GPU, matrix products follow `torch.set_float32_matmul_precision`.)

    Args:
        logits: f[B, K, h, w] or f[P, B, K, h, w], finite, of any magnitude.
        target: i64[B, H, W] or uint8[B, H, W], classes 0 .. K-1 or `ignore_index`.
        ignore_index: Label of the pixels that are excluded.
        view: Position of the grid on the pixels of `target`. None: the grid covers them exactly.
        label_stride: s > 1 uses every s-th pixel row and column only, from `s // 2` on. The upsampling is the same.
        reduction: "mean" over the valid pixels, or "sum".

    Raises:
        ValueError: An argument is invalid, or a label is neither a class nor `ignore_index`. Labels are checked on a
            CPU only, since that would synchronise a GPU; the Triton kernel returns NaN for invalid labels.
    """
    _check_arguments(logits, target, label_stride, reduction)
    probes = logits if logits.ndim == 5 else logits[None]
    n_probes, n_images, classes, *grid = probes.shape
    dtype, size = compute_dtype(logits), tuple(target.shape[1:])
    target = subsample(target, label_stride)
    valid = target != ignore_index
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    with torch.autocast(logits.device.type, enabled=False):
        if use_triton(logits):
            from probes.ops.kernels.cross_entropy import cross_entropy_sum
            from probes.ops.kernels.grid_cells import cells

            axes = cells(tuple(grid), size, view or GridPlacement.full(size), label_stride, logits.device)
            losses = _CrossEntropySum.apply(probes, cross_entropy_sum, target, *axes, ignore_index, needs_grad)
        else:
            labels = target.masked_fill(~valid, 0)
            if labels.device.type == "cpu":
                _check_labels(labels, classes, ignore_index)
            images = n_probes * n_images
            plan = make_plan(images, classes, tuple(grid), size, dtype, logits.device, view=view, stride=label_stride)
            losses = _CrossEntropySum.apply(probes, _sum_in_chunks, labels, valid, plan, needs_grad)
        if reduction == "mean":
            losses = losses / valid.sum().clamp(min=1)
    return losses if logits.ndim == 5 else losses[0]


def soft_labels(
    target: Tensor,
    classes: int,
    grid: tuple[int, int],
    ignore_index: int = 255,
    *,
    view: GridPlacement | None = None,
    label_stride: int = 1,
) -> Tensor:
    """Return T = U^T onehot(target), f64[B, h * w, K]: the weight of each class at each token.

    T is the adjoint of the bilinear upsampling U of :func:`upsampled_cross_entropy`, whose arguments have the same
    names. The sum of T is the number of labelled pixels.
    """
    target, size = subsample(target, label_stride), tuple(target.shape[1:])
    valid = target != ignore_index
    plan = make_plan(1, classes, tuple(grid), size, torch.float64, target.device, view=view, stride=label_stride)
    soft = _soft_labels(target.masked_fill(~valid, 0), valid.double(), classes, plan)  # [B, h, K, w]
    return soft.transpose(2, 3).flatten(1, 2)


def subsample(target: Tensor, stride: int) -> Tensor:
    """Return every stride-th pixel row and column of a mask [..., H, W], from `stride // 2` on."""
    return target[..., stride // 2 :: stride, stride // 2 :: stride]


def _check_arguments(logits: Tensor, target: Tensor, label_stride: int, reduction: str) -> None:
    if logits.ndim not in (4, 5) or 0 in logits.shape or not logits.is_floating_point():
        raise ValueError(f"expected logits f[B, K, h, w] or f[P, B, K, h, w], got {logits.dtype}{list(logits.shape)}")
    n_images = logits.shape[-4]
    if target.ndim != 3 or len(target) != n_images or 0 in target.shape or target.is_floating_point():
        raise ValueError(
            f"expected an integer target [B={n_images}, H, W] for logits {list(logits.shape)}, "
            f"got {target.dtype}{list(target.shape)}"
        )
    if label_stride < 1 or label_stride // 2 >= min(target.shape[1:]):
        raise ValueError(f"label_stride={label_stride} leaves no pixel of {list(target.shape[1:])}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')


def _check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    for label in map(int, labels.aminmax()):
        if not 0 <= label < classes:
            raise ValueError(f"label {label} is neither a class in [0, K={classes}) nor ignore_index={ignore_index}")


class _CrossEntropySum(torch.autograd.Function):
    """Sum over valid pixels, f[P, B, K, h, w] -> f[P]; `sum_and_gradient` computes it and its gradient in forward."""

    @staticmethod
    def forward(ctx, logits: Tensor, sum_and_gradient: Callable, *args) -> Tensor:
        totals, grads = sum_and_gradient(logits, *args)
        ctx.save_for_backward(grads)
        ctx.logits_dtype = logits.dtype
        return totals.to(compute_dtype(logits))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple:
        (grads,) = ctx.saved_tensors
        grad = (grads * grad_output[:, None, None, None, None]).to(ctx.logits_dtype)
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)


def _sum_in_chunks(
    logits: Tensor, labels: Tensor, valid: Tensor, plan: ResamplingPlan, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the loss summed over valid pixels, f64[P], and its gradient f[P, B, K, h, w] if `needs_grad`."""
    dtype = plan.rows.dtype
    n_probes, n_images = logits.shape[:2]
    # A chunk holds as many probes as fit, and several images only if it holds all probes: probes share the labels.
    p_step, b_step = min(n_probes, plan.images), max(1, plan.images // n_probes)
    totals = logits.new_zeros(n_probes, dtype=torch.float64)
    grads = torch.empty_like(logits, dtype=dtype) if needs_grad else None
    for b in range(0, n_images, b_step):
        images = slice(b, b + b_step)
        weight = valid[images].to(dtype)
        soft = _soft_labels(labels[images], weight, logits.shape[2], plan)
        for p in range(0, n_probes, p_step):
            chunk = slice(p, p + p_step), images
            z = logits[chunk].to(dtype).transpose(2, 3).contiguous()  # [P, B, h, K, w]
            # Shifting all logits of a node does not change the loss. This shift keeps both of its sums small.
            z = (z - z.amax(-2, keepdim=True)) * LOG2_E
            lse, grad = _logsumexp_sum(z, weight, plan, needs_grad)
            totals[chunk[0]] += lse - (z * soft).flatten(1).sum(1, dtype=torch.float64)
            if needs_grad:
                grads[chunk] = grad.sub_(soft).transpose(2, 3)
    return totals / LOG2_E, grads


def _soft_labels(labels: Tensor, weight: Tensor, classes: int, plan: ResamplingPlan) -> Tensor:
    """Return T = U^T onehot(labels), f[B, h, K, w], from labels i[B, H, W] and weight f[B, H, W] (1 if valid, else 0).

    Each pixel votes for its class at the two grid rows around it, in its own column; then columns are summed.
    """
    (n_images, _, width), h = labels.shape, plan.rows.shape[1]
    votes = weight.new_zeros(n_images, h + 1, classes, width)  # row h is below the last grid row and stays zero
    index = labels.long() * width + plan.nodes[:, None] * (classes * width) + torch.arange(width, device=labels.device)
    upper = weight * plan.rows.gather(1, plan.nodes[:, None])
    votes.flatten(1).scatter_add_(1, index.flatten(1), upper.flatten(1))
    index += classes * width
    votes.flatten(1).scatter_add_(1, index.flatten(1), (weight - upper).flatten(1))
    return votes[:, :h] @ plan.cols.T


def _logsumexp_sum(z: Tensor, weight: Tensor, plan: ResamplingPlan, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return the sum over valid pixels of log2 sum_k exp2(U z), f64[P], and the softmax term of the gradient.

    Args:
        z: f[P, B, h, K, w], in units of log 2, with maximum 0 per node.
        weight: f[B, H, W], 1 if valid, else 0.
        plan: Result of `make_plan`.
        needs_grad: If False, skip the second result, U^T softmax(U z), f[P, B, h, K, w].
    """
    subtract_max = z.device.type != "cpu" or not z.amin() >= -SAFE_RANGE * LOG2_E  # reading it would synchronise a GPU
    total = z.new_zeros(len(z), dtype=torch.float64)
    grad = torch.zeros_like(z) if needs_grad else None
    for tile in plan.tiles:
        cols = plan.cols[:, tile]
        stretched = z @ cols  # [P, B, h, K, C]
        adjoint = torch.zeros_like(stretched) if needs_grad else None
        for band in plan.bands:
            px = slice(band.start, band.stop)
            weight_px = weight[:, px, None, tile]
            up = band_rows(stretched, band)  # [P, B, R, K, C]
            if subtract_max:
                top = up.amax(-2, keepdim=True)
                up.sub_(top).clamp_(min=-100)  # 2**-100 does not change a sum >= 1; below -126 exp2 is slow
            mass = up.exp2_().sum(-2, keepdim=True)
            lse = mass.log2() + top if subtract_max else mass.log2()
            total += (lse * weight_px).flatten(1).sum(1, dtype=torch.float64)
            if needs_grad:
                up *= weight_px / mass  # softmax, 0 at ignored pixels
                adjoint[:, :, band.lo : band.hi] += (band.weights @ up.flatten(-2)).unflatten(-1, up.shape[-2:])
        if needs_grad:
            grad += adjoint @ cols.T
    return total, grad
