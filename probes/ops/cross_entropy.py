"""Cross-entropy of bilinearly upsampled logits at the mask's own resolution, exact, for many probes at once.

With z the logits on the patch grid and U the bilinear upsampling (`bilinear.py`), the loss summed over valid pixels is

    sum_px [ logsumexp_k (U z)  -  (U z)[label] ]   =   sum_px logsumexp_k (U z)  -  <z, T>,     T = U^T onehot(label)

Two things follow. The labels enter through T alone, `f[B, K, h, w]`: computed once, shared by all probes, and no gather
or scatter ever touches a full-resolution tensor. And the gradient is `U^T softmax(U z) - T`, which the pass that sums
the logsumexp has at hand: it is computed in the forward, chunk by chunk, and backward only scales it. No tensor is
larger than a chunk or than K * h * W, stretched in one direction only.

Why not smaller masks? Labels taken at the token grid cost 3 mIoU points; pixels may be skipped (`label_stride`), the
interpolation may not.

Legend: P probes, B images, K classes, h w patch grid, H W pixels, R C pixel rows and columns of one chunk.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .bilinear import Plan, band_rows, compute_dtype, make_plan
from .geometry import GridPlacement
from .kernels import use_triton

# Where no logit of a grid node lies further below the node's best, exp cannot vanish in float32 at any pixel (its
# nearest node weighs at least 1/4, so its sum is at least exp(-0.75 * 80)), and no maximum need be subtracted there.
SAFE_RANGE = 80.0
# Logits are scaled once, on the grid: exp(x) = exp2(x * LOG2_E), and torch's exp2 is four times as fast on a CPU.
LOG2_E = math.log2(math.e)


def upsampled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = 255,
    *,
    view: GridPlacement | None = None,
    label_stride: int = 1,
    rows: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Returns the cross-entropy of the upsampled logits: a scalar, or f[P] for P probes that share the target.

    For each probe the same as `F.cross_entropy(F.interpolate(logits, target.shape[-2:], mode="bilinear"), target,
    ignore_index=ignore_index)`, save that a batch without a valid pixel gives 0 and no gradient instead of NaN.
    Computed and returned in float32 for half-precision logits, also under autocast; in float64 for float64. (On a GPU
    its matrix products follow `torch.set_float32_matmul_precision`.)

    Args:
        logits: f[B, K, h, w] or f[P, B, K, h, w], finite, of any magnitude.
        target: i64[B, H, W] or uint8[B, H, W], classes 0 .. K-1 or `ignore_index`.
        ignore_index: label of the pixels that do not count.
        view: where the grid lies on the pixels of `target`; by default it divides them.
        label_stride: s > 1 takes only each s-th pixel row and column, from `s // 2` on. The upsampling is the same.
        rows: at most so many pixel rows at a time; by default as many as suit the cache.
        reduction: "mean" over the valid pixels, or "sum", for callers who average over batches themselves.

    Raises:
        ValueError: shapes or arguments do not fit, or a label is neither a class nor `ignore_index`. Labels are only
            checked on a CPU: on a GPU the check would wait for the device; there a wrong label makes the loss of the
            Triton kernel NaN.
    """
    _check_arguments(logits, target, label_stride, rows, reduction)
    probes = logits if logits.ndim == 5 else logits[None]
    n_probes, n_images, classes, *grid = probes.shape
    dtype, size = compute_dtype(logits), tuple(target.shape[1:])
    target = strided(target, label_stride)
    valid = target != ignore_index
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    with torch.autocast(logits.device.type, enabled=False):
        if use_triton(logits):
            from probes.ops.kernels.cross_entropy import cross_entropy_sum
            from probes.ops.kernels.grid_cells import cells

            axes = cells(tuple(grid), size, view or GridPlacement.whole(size), label_stride, logits.device)
            losses = _CrossEntropySum.apply(probes, cross_entropy_sum, target, *axes, ignore_index, needs_grad)
        else:
            labels = target.masked_fill(~valid, 0)
            if labels.device.type == "cpu":
                _check_labels(labels, classes, ignore_index)
            images = n_probes * n_images
            plan = make_plan(
                images, classes, tuple(grid), size, dtype, logits.device, view=view, stride=label_stride, max_rows=rows
            )
            losses = _CrossEntropySum.apply(probes, _sum_in_chunks, labels, valid, plan, needs_grad)
        if reduction == "mean":
            losses = losses / valid.sum().clamp(min=1)
    return losses if logits.ndim == 5 else losses[0]


def strided(target: Tensor, stride: int) -> Tensor:
    """Returns each stride-th pixel row and column of a mask [..., H, W], from `stride // 2` on."""
    return target[..., stride // 2 :: stride, stride // 2 :: stride]


def _check_arguments(logits: Tensor, target: Tensor, label_stride: int, rows: int | None, reduction: str) -> None:
    if logits.ndim not in (4, 5) or 0 in logits.shape or not logits.is_floating_point():
        raise ValueError(f"logits must be f[B, K, h, w] or f[P, B, K, h, w], got {logits.dtype}{list(logits.shape)}")
    n_images = logits.shape[-4]
    if target.ndim != 3 or len(target) != n_images or 0 in target.shape or target.is_floating_point():
        raise ValueError(
            f"target must be integer [B={n_images}, H, W] for logits {list(logits.shape)}, "
            f"got {target.dtype}{list(target.shape)}"
        )
    if label_stride < 1 or label_stride // 2 >= min(target.shape[1:]):
        raise ValueError(f"label_stride={label_stride} leaves no pixel of {list(target.shape[1:])}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')


def _check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    for label in map(int, labels.aminmax()):
        if not 0 <= label < classes:
            raise ValueError(f"label {label} is neither in [0, K={classes}) nor ignore_index={ignore_index}")


class _CrossEntropySum(torch.autograd.Function):
    """f[P, B, K, h, w] -> f[P], the sum over valid pixels; `sum_and_gradient(logits, *args)` gives it, and the gradient
    along with it, in the forward."""

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
        return (grads * grad_output[:, None, None, None, None]).to(ctx.logits_dtype), *[None] * (
            len(ctx.needs_input_grad) - 1
        )


def _sum_in_chunks(
    logits: Tensor, labels: Tensor, valid: Tensor, plan: Plan, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns the loss summed over valid pixels, f64[P], and its gradient f[P, B, K, h, w] if that is needed."""
    dtype = plan.rows.dtype
    n_probes, n_images = logits.shape[:2]
    # A chunk takes as many probes as fit, and further images only once it has all probes: they share the labels.
    p_step, b_step = min(n_probes, plan.images), max(1, plan.images // n_probes)
    totals = logits.new_zeros(n_probes, dtype=torch.float64)
    grads = torch.empty_like(logits, dtype=dtype) if needs_grad else None
    for b in range(0, n_images, b_step):
        images = slice(b, b + b_step)
        keep = valid[images].to(dtype)
        soft = _soft_labels(labels[images], keep, logits.shape[2], plan)
        for p in range(0, n_probes, p_step):
            chunk = slice(p, p + p_step), images
            z = logits[chunk].to(dtype).transpose(2, 3).contiguous()  # [P, B, h, K, w]
            # A shift of all logits of a node leaves the loss alone; this one makes it a difference of small sums.
            z = (z - z.amax(-2, keepdim=True)) * LOG2_E
            lse, grad = _logsumexp_sum(z, keep, plan, needs_grad)
            totals[chunk[0]] += lse - (z * soft).flatten(1).sum(1, dtype=torch.float64)
            if needs_grad:
                grads[chunk] = grad.sub_(soft).transpose(2, 3)
    return totals / LOG2_E, grads


def _soft_labels(labels: Tensor, keep: Tensor, classes: int, plan: Plan) -> Tensor:
    """Returns T = U^T onehot(labels), f[B, h, K, w], from integer labels [B, H, W] and keep f[B, H, W], 1 where valid.

    Each pixel votes for its class at the two grid rows around it, in its own column; the columns are then gathered.
    """
    (n_images, _, width), h = labels.shape, plan.rows.shape[1]
    votes = keep.new_zeros(n_images, h + 1, classes, width)  # row h: what is below the last row, always zero
    index = labels.long() * width + plan.nodes[:, None] * (classes * width) + torch.arange(width, device=labels.device)
    upper = keep * plan.rows.gather(1, plan.nodes[:, None])
    votes.flatten(1).scatter_add_(1, index.flatten(1), upper.flatten(1))
    index += classes * width
    votes.flatten(1).scatter_add_(1, index.flatten(1), (keep - upper).flatten(1))
    return votes[:, :h] @ plan.cols.T


def _logsumexp_sum(z: Tensor, keep: Tensor, plan: Plan, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the sum over valid pixels of log2 sum_k exp2(U z), f64[P], and softmax's share of the gradient.

    Args:
        z: f[P, B, h, K, w], in units of log 2, 0 at the best class of each node.
        keep: f[B, H, W], 1 where valid.
        plan: from `make_plan`.
        needs_grad: False leaves out the second result, U^T softmax(U z), f[P, B, h, K, w], and its cost.
    """
    subtract_max = z.device.type != "cpu" or not z.amin() >= -SAFE_RANGE * LOG2_E  # on a GPU, looking would wait for it
    total = z.new_zeros(len(z), dtype=torch.float64)
    grad = torch.zeros_like(z) if needs_grad else None
    for tile in plan.tiles:
        cols = plan.cols[:, tile]
        stretched = z @ cols  # [P, B, h, K, C]
        adjoint = torch.zeros_like(stretched) if needs_grad else None
        for band in plan.bands:
            px = slice(band.start, band.stop)
            keep_px = keep[:, px, None, tile]
            up = band_rows(stretched, band)  # [P, B, R, K, C]
            if subtract_max:
                top = up.amax(-2, keepdim=True)
                up.sub_(top).clamp_(min=-100)  # 2**-100 is nothing to a sum of 1 or more; below -126 exp2 is slow
            mass = up.exp2_().sum(-2, keepdim=True)
            lse = mass.log2() + top if subtract_max else mass.log2()
            total += (lse * keep_px).flatten(1).sum(1, dtype=torch.float64)
            if needs_grad:
                up *= keep_px / mass  # softmax, 0 where ignored
                adjoint[:, :, band.lo : band.hi] += (band.weights @ up.flatten(-2)).unflatten(-1, up.shape[-2:])
        if needs_grad:
            grad += adjoint @ cols.T
    return total, grad
