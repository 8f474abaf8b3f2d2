"""Attention knockout among image tokens (paper, Eq. 1).

A(t <- s) = -inf for all image tokens t and all s in B_c: no image token may attend to a blocked token; blocked tokens
still attend to all others. The pairs are removed from the mask of the model; padding, causality and text rows remain.
Beyond the paper, a knockout can be limited to layers, and can differ between the rows of a batch.

Shapes: B batch, T image tokens, N tokens, the last Q of them as queries, L layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava_bidir.common.arguments import check_is_list
from llava_bidir.common.errors import UserError

from .attention_masks import Masks, as_list, is_allowed


@dataclass(frozen=True)
class Knockout:
    """Blocked attention among image tokens.

    Args:
        blocked: bool[B, T], image tokens that no image token may attend to (B_c of Eq. 1).
        layers: Decoder layers to cut, numbered 1..L as in the site names; or bool[B, L], layers per row of the batch.
            None cuts all layers, as the paper does.
    """

    blocked: Tensor
    layers: Sequence[int] | Tensor | None = None

    def cut(self, mask: Tensor, is_image: Tensor) -> Tensor:
        """Return the mask without the blocked pairs of image tokens.

        With tokens p (prefix) and i (image), the second image token blocked, under a causal mask::

            i  1 1 0 0        i  1 1 0 0
            i  1 1 1 0   ->   i  1 1 0 0
            i  1 1 1 1        i  1 1 0 1

        Args:
            mask: bool[B, 1, Q, N], True = may attend, or what eager attention adds to the scores. Its rows include all
                image tokens.
            is_image: bool[N].

        Raises:
            UserError: `blocked` does not fit the mask, or a row would have no keys (a softmax over nothing attends to
                all tokens, also later ones, or is NaN).
        """
        images = mask.shape[0]
        tokens = int(is_image.sum())
        given = self.blocked
        if (
            not isinstance(given, Tensor)
            or given.dtype != torch.bool
            or given.shape != (images, tokens)
        ):
            if isinstance(given, Tensor):
                got = f"{given.dtype} {list(given.shape)}"
            else:
                got = f"{type(given)}, no tensor"
            raise UserError(
                f"blocked must be bool[{images}, {tokens}] (images, image tokens); got {got}"
            )
        blocked = given.to(mask.device)
        rows = is_image[-mask.shape[-2] :].nonzero()
        columns = is_image.nonzero().flatten()
        cut = mask.clone()
        forbidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        cut[:, 0, rows, columns] = cut[:, 0, rows, columns].masked_fill(blocked[:, None], forbidden)
        left = is_allowed(cut[:, 0, rows.flatten()]).any(-1)
        if not left.all():
            image, token = (~left).nonzero()[0].tolist()
            raise UserError(
                f"blocking {int(blocked[image].sum())} tokens leaves image token {token} of image {image} in the "
                "batch without any token to attend to; use a prefix before the image or block fewer tokens"
            )
        return cut

    def first_layer(self, layers: nn.ModuleList) -> int:
        """Return the first layer 1..L that is cut in any row of the batch; L + 1 for none."""
        chosen = _select_layers(self.layers, len(self.blocked), len(layers)).any(0).nonzero()
        return int(chosen.min()) + 1 if len(chosen) else len(layers) + 1

    def by_row(self, layers: nn.ModuleList) -> tuple[list[bytes], Tensor]:
        """Return what each row of the batch cuts, equal for equal cuts, and the layers in which it does, bool[B, L].

        Raises:
            UserError: A layer is out of range.
        """
        blocked = self.blocked.cpu()
        chosen = _select_layers(self.layers, len(blocked), len(layers)).cpu()
        return [row.numpy().tobytes() for row in blocked], chosen & blocked.any(1, keepdim=True)

    def select_layers(self, layers: nn.ModuleList) -> Tensor:
        """Return the layers that each row of the batch cuts, bool[B, L].

        Raises:
            UserError: A layer is out of range.
        """
        return _select_layers(self.layers, len(self.blocked), len(layers))

    @contextmanager
    def apply(
        self, layers: nn.ModuleList, masks: Masks, is_image: Tensor, depth: int
    ) -> Iterator[None]:
        """Replace the mask of the chosen decoder layers by the cut one while the context is open.

        `masks` [B, 1, Q, N] are those that the model runs with; `depth` layers run before the forward stops.

        Raises:
            UserError: A layer is out of range.
            RuntimeError: A chosen layer ran with another mask, so that the knockout would have no effect.
        """
        images = len(as_list(masks)[0])
        replaced = []
        chosen = _select_layers(self.layers, images, len(layers))
        in_all_rows = chosen.all(0).tolist()
        on_device = chosen.to(as_list(masks)[0].device)
        cuts = [(mask, self.cut(mask, is_image)) for mask in as_list(masks)]

        def replace(layer: int, kwargs: dict) -> dict:
            given = kwargs.get("attention_mask")
            rows = on_device[:, layer - 1, None, None, None]
            for mask, cut in cuts:
                if given is mask or _is_copy(given, mask):
                    replaced.append(layer)
                    new = cut if in_all_rows[layer - 1] else torch.where(rows, cut, mask)
                    return {**kwargs, "attention_mask": new.to(given.device)}
            raise RuntimeError(f"layer {layer} runs with another mask than the one to cut: {given}")

        cut_layers = (chosen.any(0).nonzero().flatten() + 1).tolist()
        with ExitStack() as hooks:
            for layer in cut_layers:

                def hook(_, args, kwargs, layer=layer):
                    return (args, replace(layer, kwargs))

                hooks.callback(
                    layers[layer - 1]
                    .self_attn.register_forward_pre_hook(hook, with_kwargs=True)
                    .remove
                )
            yield
        missed = {layer for layer in cut_layers if layer <= depth} - set(replaced)
        if missed:
            raise RuntimeError(f"the knockout did not reach layers {sorted(missed)}")


def _is_copy(given: Tensor | None, mask: Tensor) -> bool:
    """Return True if `given` is the mask on another device; a device map copies the inputs of layers."""
    return (
        isinstance(given, Tensor)
        and given.device != mask.device
        and torch.equal(given.to(mask.device), mask)
    )


def _select_layers(chosen: Sequence[int] | Tensor | None, rows: int, count: int) -> Tensor:
    """Return the chosen layers, numbered 1..count, per row of the batch, bool[rows, count]."""
    if isinstance(chosen, Tensor):
        if chosen.dtype != torch.bool or chosen.shape != (rows, count):
            raise UserError(
                f"layers must be bool[{rows}, {count}] (images, layers), got {chosen.dtype} {list(chosen.shape)}"
            )
        return chosen
    chosen = range(1, count + 1) if chosen is None else chosen
    check_is_list("layers of a knockout", chosen, "[1, 2]")
    for number in chosen:
        if isinstance(number, bool) or not 1 <= number <= count:
            raise UserError(
                f"knockout layer {number} is out of range; this model has layers 1..{count}"
            )
    return torch.tensor([number in chosen for number in range(1, count + 1)]).expand(rows, count)
