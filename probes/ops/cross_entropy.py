"""Cross-entropy of bilinearly upsampled logits at the resolution of the mask, at the cost of the token grid.

With z the logits on the token grid and U the bilinear upsampling (`bilinear.py`), the loss summed over valid pixels is

    sum_px [ logsumexp_k (U z)  -  (U z)[label] ]   =   sum_px logsumexp_k (U z)  -  <z, T>,     T = U^T onehot(label)

- The labels enter through T only, which is exact.
- The first term is a smooth function of the position within a cell of the grid: a few nodes integrate it
  (`quadrature.py`). The cost depends on the grid and the number of nodes, not on the size of the mask.
- The gradient is `U^T (mass * softmax) - T` at the nodes. It is computed in the forward; backward only scales it.
- T and the weights of the nodes are computed once per mask (`prepare_masks`) and serve any number of probes and steps.

README.md has the errors and times. Labels at the resolution of the token grid would cost 3 points of mIoU.

Legend: P probes, B images, K classes, h w token grid, H W pixels, My Mx nodes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .bilinear import compute_dtype
from .geometry import GridPlacement
from .kernels import limit_on, sum_dtype
from .quadrature import PreparedMasks, prepare_masks

# Nodes per cell and axis for a mask that is prepared for one call: preparing it costs more than these.
SCORE_NODES = 8
# If no logit of a token is further below the token's maximum, exp cannot underflow in float32 at any node: the nearest
# token has weight >= 1/4, so the sum is >= exp(-0.75 * 80). Subtracting the maximum per node is then unnecessary.
SAFE_RANGE = 80.0
# Logits are computed in bits: 2**x takes torch a third of the time of e**x on a CPU of AMD.
BITS = 1 / math.log(2)
# Elements of a chunk of grids, whose rows become rows of nodes in bands of as many elements: on a CPU 4 MB: with
# 1 MB, calls take a fifth of the time.
CHUNK_NUMEL = {"cpu": 2**20, "cuda": 2**26}


def upsampled_cross_entropy(
    logits: Tensor,
    target: Tensor | PreparedMasks,
    ignore_index: int = 255,
    *,
    view: GridPlacement | None = None,
    nodes: int | None = SCORE_NODES,
) -> Tensor:
    """Return the cross-entropy of the upsampled logits: a scalar, or f[P] for P probes that share the target.

    For each probe, equals `F.cross_entropy(F.interpolate(logits, target.shape[-2:], mode="bilinear"), target,
    ignore_index=ignore_index)`, except that a batch without valid pixels has loss 0 and zero gradient instead of NaN.
    The error falls with the number of nodes: README.md has numbers. `nodes=None` is exact, and as slow as the mask is
    large.

    To train a linear head on the patch features of any encoder, f[B, K, h, w] from a 1 x 1 convolution::

        masks = probes.prepare_masks(target, num_classes, grid=(h, w))    # once per image, e.g. in the data set
        loss = probes.upsampled_cross_entropy(head(features), masks)
        loss.backward()

    Half-precision logits are computed and returned in float32, also under autocast; float64 logits in float64. (On a
    GPU, matrix products follow `torch.set_float32_matmul_precision`.)

    Args:
        logits: f[B, K, h, w] or f[P, B, K, h, w], finite, of any magnitude.
        target: Integer [B, H, W], classes 0 .. K-1 or `ignore_index`, or bool; or the result of `prepare_masks`, to
            which the next three arguments were given.
        ignore_index: Label of the pixels that are excluded.
        view: Position of the grid on the pixels of `target`. None: the grid covers them exactly.
        nodes: Nodes per cell and axis; None for all pixels.

    Raises:
        ValueError: An argument is invalid, or a label is neither a class nor `ignore_index` (checked on a CPU only).
    """
    classes, *grid = logits.shape[-3:]
    masks = target
    if isinstance(target, Tensor):
        masks = prepare_masks(
            target,
            classes,
            tuple(grid),
            nodes,
            ignore_index,
            view=view,
            dtype=compute_dtype(logits),
        )
    if masks.soft.shape != logits.shape[-4:]:
        raise ValueError(
            f"expected logits f[B, K, h, w] or f[P, B, K, h, w] of {list(masks.soft.shape)}, got {list(logits.shape)}"
        )
    by_probe = logits if logits.ndim == 5 else logits[None]
    losses = differentiable_sum(loss_and_gradient, by_probe, masks)
    losses = losses / masks.pixels.sum().clamp(min=1).to(losses.dtype)
    return losses if logits.ndim == 5 else losses[0]


ImageLoss = Callable[[Tensor, PreparedMasks, bool], tuple[Tensor, Tensor | None]]


def differentiable_sum(image_loss: ImageLoss, logits: Tensor, masks: PreparedMasks) -> Tensor:
    """Return the loss of each probe summed over images, f[P], as a function that autograd can differentiate.

    Args:
        image_loss: Returns loss and gradient as :func:`loss_and_gradient` does.
        logits: f[P, B, K, h, w].
        masks: B masks.
    """
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    return _DifferentiableSum.apply(logits, image_loss, masks, needs_grad)


class _DifferentiableSum(torch.autograd.Function):
    """The gradient is computed in forward; backward only scales it."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, image_loss: ImageLoss, masks: PreparedMasks, needs_grad: bool
    ) -> Tensor:
        totals, grads = image_loss(logits, masks, needs_grad)
        ctx.save_for_backward(grads)
        ctx.logits_dtype = logits.dtype
        return totals.sum(1).to(compute_dtype(logits))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple:
        (grads,) = ctx.saved_tensors
        return (
            (grads * grad_output[:, None, None, None, None]).to(ctx.logits_dtype),
            None,
            None,
            None,
        )


@torch.no_grad()
def loss_and_gradient(
    logits: Tensor, masks: PreparedMasks, needs_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss of each probe and image, f64[P, B], and its gradient f[P, B, K, h, w] if `needs_grad`.

    Args:
        logits: f[P, B, K, h, w].
        masks: B masks.
        needs_grad: If False, the gradient is None.
    """
    n_probes, _, classes, h, w = logits.shape
    dtype = compute_dtype(logits)
    device = logits.device
    totals = torch.zeros(n_probes, len(masks), dtype=sum_dtype(device), device=device)
    grads = torch.empty(logits.shape, dtype=dtype, device=device) if needs_grad else None
    per_grid = classes * h * max(masks.mass.shape[2], w)  # before its rows become rows of nodes
    most = max(1, limit_on(device, CHUNK_NUMEL) // per_grid)  # grids in a chunk
    p_step = min(n_probes, most)
    b_step = max(1, most // n_probes)
    with torch.autocast(device.type, enabled=False):
        for images, rows, cols in masks.groups():
            indices = range(len(masks))[images] if isinstance(images, slice) else images
            for start in range(0, len(indices), b_step):
                part = indices[start : start + b_step]
                part = slice(part.start, part.stop) if isinstance(part, range) else part
                weights = masks.mass[part].to(dtype), masks.soft[part].to(dtype)
                for p in range(0, n_probes, p_step):
                    chunk = slice(p, p + p_step), part
                    z = logits[chunk].to(dtype)
                    totals[chunk], grad = _integrate(
                        z, *weights, rows.to(dtype), cols.to(dtype), needs_grad
                    )
                    if needs_grad:
                        grads[chunk] = grad
    return totals, grads


def _integrate(
    logits: Tensor, mass: Tensor, soft: Tensor, rows: Tensor, cols: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return :func:`loss_and_gradient` of logits f[P, B, K, h, w] in one chunk, in two matrix products each way."""
    by_row = logits.movedim(3, 0).contiguous()  # [h, P, B, K, w]
    # a shift of all logits of a token changes no loss
    by_row = (by_row - by_row.amax(3, keepdim=True)) * BITS
    # reading it would stall a GPU
    subtract_max = by_row.device.type != "cpu" or not by_row.amin() >= -SAFE_RANGE * BITS
    soft = soft.movedim(2, 0)[:, None]  # [h, 1, B, K, w]
    wide = sum_dtype(by_row.device)
    loss = -(by_row * soft).sum((0, 3, 4), dtype=wide)
    stretched = (by_row @ cols.T).flatten(1)  # [h, P * B * K * Mx]
    adjoint = torch.zeros_like(stretched) if needs_grad else None
    band = max(1, limit_on(by_row.device, CHUNK_NUMEL) // stretched.shape[1])
    for start in range(0, len(rows), band):
        nodes = rows[start : start + band]
        tokens = _tokens_beside(nodes)  # a third of them, if the band is a quarter of the rows
        nodes = nodes[:, tokens]
        # [My, P, B, K, Mx]
        up = (nodes @ stretched[tokens]).view(len(nodes), *by_row.shape[1:4], len(cols))
        weight = mass[:, start : start + band].transpose(0, 1)[:, None]  # [My, 1, B, Mx]
        if subtract_max:
            top = up.amax(3, keepdim=True)
            # 2**-140 does not change a sum >= 1; smaller ones are slow
            up.sub_(top).clamp_(min=-140)
        total = up.exp2_().sum(3)
        lse = total.log2() + top.squeeze(3) if subtract_max else total.log2()
        loss += (lse * weight).sum((0, 3), dtype=wide)
        if needs_grad:
            up *= (weight / total)[:, :, :, None]  # mass * softmax
            adjoint[tokens].addmm_(nodes.T, up.flatten(1))
    loss /= BITS
    if not needs_grad:
        return loss, None
    by_column = adjoint.view(*by_row.shape[:4], len(cols))
    gradient = by_column @ cols - soft
    return loss, gradient.movedim(0, 3)


def _tokens_beside(nodes: Tensor) -> slice:
    """Return the tokens that some nodes are interpolated from; f[n, tokens] are their weights."""
    if nodes.device.type != "cpu":  # reading them would stall a GPU
        return slice(None)
    used = nodes.any(0).nonzero().flatten().tolist()
    return slice(used[0], used[-1] + 1)
