"""Which tokens attend to which, measured in the layers of a loaded model, whatever its config says.

The model's own forward runs once on an image of noise between text, with the masks that it makes itself. At each layer
of the LLM the gradient of the output of a token with respect to all inputs of the layer is computed: it is exactly zero
at a token that it does not attend to. The gradient of each layer alone tells a layer that ignores the mask from one
that receives what an earlier layer has mixed. If the model is loaded under another mask among image tokens than its
own, the forward is that of `probes`, which replaces the mask.

Every token of the text and of an image of up to 256 tokens is measured; of a larger image, 256 tokens drawn at random,
since each costs a backward pass of each layer.

Shapes: N tokens, M tokens that are measured, d width, L layers.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import check_outputs

from .attention_masks import (
    Masks,
    as_list,
    build_decoder_masks,
    decode_under,
    is_allowed,
    supports_masks,
)
from .families.our_code import FULL, SLIDING, layer_kinds
from .hooks import around
from .sites import layer_site

# Those that attend, then those that are attended to; "text" alone is the text after an image token, or before it where
# the text is later.
DIRECTIONS = {  # whether image tokens attend, whether to image tokens, and whether to what comes earlier
    "image to earlier image": (True, True, True),
    "image to later image": (True, True, False),
    "image to text before": (True, False, True),
    "image to text after": (True, False, False),
    "text to image": (False, True, True),
    "text to earlier text": (False, False, True),
    "text before to image": (False, True, False),
    "text to later text": (False, False, False),
}
MOST_IMAGE_TOKENS = 256  # that are measured
TEXT_AFTER = 8  # tokens


@dataclass(frozen=True)
class Direction:
    """Whether some tokens attend to others, over the layers of one kind.

    Args:
        name: "image to later image", ...: those that attend, then those that are attended to.
        measured: Share of the pairs of tokens in which the second is attended to, 0..1.
        claimed: The same by the mask that config and family name; None if the layers have no mask, so that only what
            they must not see is known.
        forbidden: Share of the pairs that the mask forbids and that were seen all the same.
        layers: Names of the layers in which measured and claimed pairs differ.
    """

    name: str
    measured: float
    claimed: float | None
    forbidden: float
    layers: list[str]


@dataclass(frozen=True)
class MeasuredMask:
    """The mask of a model as measured, and as its config and family name it.

    Args:
        image_attention: Name of the mask among image tokens that is claimed.
        kinds: Kind of each layer, as transformers names it, L of them.
        seen: bool[L, M, N]: a measured token attends to the token.
        claimed: bool[L, M, N]: a measured token may attend to the token.
        tokens: long[M], which of the N are measured.
        is_image: bool[N].
    """

    image_attention: str
    kinds: list[str]
    seen: Tensor
    claimed: Tensor
    tokens: Tensor
    is_image: Tensor

    def directions(self) -> dict[str, list[Direction]]:
        """Return the directions by kind of layer."""
        return {
            kind: [self._direction(name, pairs, kind) for name, pairs in self._pairs().items()]
            for kind in dict.fromkeys(self.kinds)
        }

    def disagreements(self) -> list[str]:
        """Return a sentence for each direction whose measured pairs are not those that are claimed."""
        sentences = []
        for directions in self.directions().values():
            for direction in directions:
                if not direction.layers:
                    continue
                sees = "is attended to, against the mask"
                if not direction.forbidden:
                    sees = "is not attended to, though the mask allows it"
                sentences.append(f"{direction.name}: {sees}, in {', '.join(direction.layers)}")
        return sentences

    def __str__(self) -> str:
        lines = []
        for kind, directions in self.directions().items():
            lines.append(
                f"{kind} ({self.kinds.count(kind)} layers)".ljust(28) + "measured  claimed"
            )
            for direction in directions:
                claimed = "-" if direction.claimed is None else _format_share(direction.claimed)
                measured = _format_share(direction.measured)
                lines.append(f"  {direction.name:<26}{measured:<10}{claimed}")
        return "\n".join(lines)

    def _pairs(self) -> dict[str, Tensor]:
        """Return the pairs of each direction, bool[M, N]; only those that there are."""
        attending = self.tokens[:, None]
        attended = torch.arange(len(self.is_image))
        pairs = {}
        for name, (from_image, to_image, is_earlier) in DIRECTIONS.items():
            fits = (self.is_image[attending] == from_image) & (self.is_image == to_image)
            in_order = attended < attending if is_earlier else attended > attending
            pairs[name] = fits & in_order
        return {name: is_pair for name, is_pair in pairs.items() if is_pair.any()}

    def _direction(self, name: str, pairs: Tensor, kind: str) -> Direction:
        """Compare what was measured with what is claimed, for the layers of one kind."""
        layers = [i for i, other in enumerate(self.kinds) if other == kind]
        seen = self.seen[layers][:, pairs]  # bool[layers, pairs]
        claimed = self.claimed[layers][:, pairs]
        wrong = seen & ~claimed
        if kind in (FULL, SLIDING):
            differs = seen != claimed
            share = claimed.float().mean().item()
        else:  # recurrent layers and convolutions see a part of what comes earlier
            differs = wrong
            share = None
        differing = differs.any(1).nonzero().flatten().tolist()
        names = [layer_site(layers[i] + 1) for i in differing]
        return Direction(
            name=name,
            measured=seen.float().mean().item(),
            claimed=share,
            forbidden=wrong.float().mean().item(),
            layers=names,
        )


def _format_share(share: float) -> str:
    if share in (0, 1):
        return "yes" if share else "no"
    return f"{share:.0%}"


@torch.no_grad()
def measure_mask(mllm: nn.Module, seed: int = 0) -> MeasuredMask:
    """Measure which tokens attend to which in each layer of a :class:`FrozenMLLM`.

    Args:
        mllm: A loaded model, best in float32: in float16, small weights of attention are rounded to zero.
        seed: Seed of the image of noise and of the directions in which gradients are computed.

    Raises:
        UserError: A layer has no gradient, or states are NaN or infinite.
    """
    text = mllm.ids.new_full((1, TEXT_AFTER), _text_id(mllm.text_config))
    ids = torch.cat([mllm.ids, text], 1)
    is_image = ids == mllm.model.config.image_token_id
    masks = _masks(mllm, is_image)
    generator = torch.Generator().manual_seed(seed)
    measured = _measured_tokens(is_image[0].cpu(), generator)
    along = torch.randn(mllm.text_config.hidden_size, generator=generator)
    with ExitStack() as stack:
        if mllm.image_attention != mllm.own_image_attention:
            stack.enter_context(decode_under(mllm.decoder, masks))
        run = partial(_run_noise, mllm, ids, is_image, seed)
        seen = seen_in_layers(mllm.layers, tokens=measured, along=along, run=run)
    kinds = _kinds_of_layers(mllm.text_config, len(seen))
    return MeasuredMask(
        image_attention=mllm.image_attention,
        kinds=kinds,
        seen=seen,
        claimed=_claimed(masks, kinds, tokens=ids.shape[1])[:, measured],
        tokens=measured,
        is_image=is_image[0].cpu(),
    )


def seen_in_layers(
    layers: Sequence[nn.Module], tokens: Tensor, along: Tensor, run: Callable[[], Any]
) -> Tensor:
    """Return which inputs of each layer tokens of the first image attend to while a model runs, bool[L, M, N].

    Args:
        layers: The layers, in forward order.
        tokens: long[M].
        along: Direction f[d] of the outputs whose gradient is computed.
        run: The forward.

    Raises:
        UserError: A layer has no gradient, or states are NaN or infinite.
    """
    seen: list[Tensor] = []

    def measure(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run a layer with a gradient, and keep which of its inputs the tokens see."""
        site = layer_site(len(seen) + 1)
        states, *others = args or [kwargs.pop("hidden_states")]
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            outputs = forward(states, *others, **kwargs)
            after = outputs[0] if isinstance(outputs, tuple) else outputs
            check_outputs("states", {site: after})
            if not after.requires_grad:
                raise UserError(f"the mask of {site} is not measured: the layer has no gradient")
            projected = after[0] @ along.to(after)
            seen.append(_seen_tokens(states, projected[tokens]))
        if isinstance(outputs, tuple):
            return (after.detach(), *outputs[1:])
        return after.detach()

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(around(layer, measure))
        run()
    return torch.stack(seen)


def _masks(mllm: nn.Module, is_image: Tensor) -> Masks | None:
    """Return the masks that config and family name, [1, 1, N, N]; None if the layers have none."""
    if not supports_masks(mllm.text_config):
        return None
    return build_decoder_masks(
        mllm.image_attention,
        text_config=mllm.text_config,
        is_image=is_image,
        dtype=mllm.model.dtype,
    )


def _text_id(text_config: PreTrainedConfig) -> int:
    """Return the id of a token that is no placeholder: the end of a text."""
    ids = getattr(text_config, "eos_token_id", None)
    if isinstance(ids, Sequence):
        ids = next(iter(ids), None)
    return ids or 0


def _measured_tokens(is_image: Tensor, generator: torch.Generator) -> Tensor:
    """Return the tokens that are measured, long[M]: those of the text, and of the image all or some."""
    of_image = is_image.nonzero().flatten()
    drawn = of_image[torch.randperm(len(of_image), generator=generator)[:MOST_IMAGE_TOKENS]]
    return torch.cat([(~is_image).nonzero().flatten(), drawn]).sort().values


def _run_noise(mllm: nn.Module, ids: Tensor, is_image: Tensor, seed: int) -> None:
    """Run the model's own forward on an image of noise between text."""
    side = mllm.family.side_px(mllm.model.config)
    levels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    pixels = mllm.preprocess(Image.fromarray(levels)).to(mllm.device, mllm.model.dtype)
    inputs = mllm.family.inputs(mllm.model, pixels, is_image)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "logits_to_keep" in signature(mllm.model.forward).parameters:
        inputs["logits_to_keep"] = 1
    mllm.model(**inputs, use_cache=False)


def _seen_tokens(states: Tensor, outputs: Tensor) -> Tensor:
    """Return which inputs f[1, N, d] of a layer have a gradient from each output f[M], bool[M, N]."""
    seen = []
    for output in outputs:
        gradient = torch.autograd.grad(output, states, retain_graph=True)[0]
        seen.append((gradient[0] != 0).any(-1))
    return torch.stack(seen).cpu()


def _kinds_of_layers(text_config: PreTrainedConfig, layers: int) -> list[str]:
    """Return the kind of each layer."""
    if getattr(text_config, "layer_types", None):
        return list(text_config.layer_types[:layers])
    return layer_kinds(text_config) * layers


def _claimed(masks: Masks | None, kinds: list[str], tokens: int) -> Tensor:
    """Return which tokens each token may attend to, bool[L, N, N], by masks or, without any, causally."""
    distinct = list(dict.fromkeys(kinds))
    if masks is None:
        allowed = [torch.ones(tokens, tokens, dtype=torch.bool).tril()] * len(distinct)
    else:
        allowed = [is_allowed(mask)[0, 0].cpu() for mask in as_list(masks)]
    by_kind = dict(zip(distinct, allowed, strict=True))
    return torch.stack([by_kind[kind] for kind in kinds])
