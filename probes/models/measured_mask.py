"""Which tokens attend to which, measured in the layers of a loaded model, whatever its config says.

The model's own forward runs once on an image of noise between text, with the masks that it makes itself. At each layer
of the LLM the states of one block of tokens are disturbed, the layer runs again, and a token whose output moves attends
to the block. Disturbing the input of each layer alone tells a layer that ignores the mask from one that receives what
an earlier layer has mixed. If the model is loaded under another mask among image tokens than its own, the forward is
that of `probes`, which replaces the mask.

Blocks are the text before the image, four parts of the image in raster order, and the text after it. Which tokens have
moved is decided by the movements of the layer themselves, see :func:`_threshold`.

Shapes: N tokens, K blocks, d width, L layers.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_bidir.common.hf import check_outputs

from .attention_masks import as_list, build_decoder_masks, decode_under, is_allowed, supports_masks
from .families.our_code import FULL, SLIDING, layer_kinds
from .sites import layer_site

IMAGE_BLOCKS = 4
# Those that attend, then those that are attended to; "text" alone is the text after the image, or before it where the
# text is later.
DIRECTIONS = (
    "image to earlier image",
    "image to later image",
    "image to text before",
    "image to text after",
    "text to image",
    "text to earlier text",
    "text before to image",
    "text to later text",
)
TEXT_AFTER = 8  # tokens


@dataclass(frozen=True)
class Direction:
    """Whether some tokens attend to others, over the layers of one kind.

    Args:
        name: "image to later image", ...: those that attend, then those that are attended to.
        measured: Share of the pairs of a token and a block in which the block is attended to, 0..1.
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
        moved: bool[L, N, K]: a token's output moves if the block is disturbed.
        claimed: bool[L, N, K]: the token may attend to a token of the block.
        blocks: Tokens of each block.
    """

    image_attention: str
    kinds: list[str]
    moved: Tensor
    claimed: Tensor
    blocks: list[Tensor]

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
        """Return the pairs of tokens and blocks of each direction, bool[N, K]."""
        before, *image, after = self.blocks
        shape = self.moved.shape[1:]
        pairs = {name: torch.zeros(shape, dtype=torch.bool) for name in DIRECTIONS}
        last = len(image) + 1
        for i, queries in enumerate(image):
            pairs["image to earlier image"][queries, 1 : 1 + i] = True
            pairs["image to later image"][queries, 2 + i : last] = True
            pairs["image to text before"][queries, 0] = True
            pairs["image to text after"][queries, last] = True
        pairs["text to image"][after, 1:last] = True
        pairs["text to earlier text"][after, 0] = True
        pairs["text before to image"][before, 1:last] = True
        pairs["text to later text"][before, last] = True
        if not len(before):  # no token is disturbed
            pairs["image to text before"][:] = False
            pairs["text to earlier text"][:] = False
        return {name: of_name for name, of_name in pairs.items() if of_name.any()}

    def _direction(
        self,
        name: str,
        pairs: Tensor,
        kind: str,
    ) -> Direction:
        """Compare what was measured with what is claimed, for the layers of one kind."""
        layers = [i for i, other in enumerate(self.kinds) if other == kind]
        moved = self.moved[layers][:, pairs]  # bool[layers, pairs]
        claimed = self.claimed[layers][:, pairs]
        wrong = moved & ~claimed
        if kind in (FULL, SLIDING):
            differs = moved != claimed
            share = claimed.float().mean().item()
        else:  # recurrent layers and convolutions see a part of what comes earlier
            differs = wrong
            share = None
        differing = differs.any(1).nonzero().flatten().tolist()
        names = [layer_site(layers[i] + 1) for i in differing]
        return Direction(
            name,
            moved.float().mean().item(),
            share,
            wrong.float().mean().item(),
            names,
        )


def _format_share(share: float) -> str:
    if share in (0, 1):
        return "yes" if share else "no"
    return f"{share:.0%}"


@torch.no_grad()
def measure_mask(mllm: nn.Module, seed: int = 0) -> MeasuredMask:
    """Measure which tokens attend to which in each layer of a :class:`FrozenMLLM`.

    Args:
        mllm: A loaded model, best in float32: differences must exceed the rounding of its dtype.
        seed: Seed of the image of noise and of the disturbances.

    Raises:
        UserError: States are NaN or infinite.
    """
    text = mllm.ids.new_full((1, TEXT_AFTER), _text_id(mllm.model.config))
    ids = torch.cat([mllm.ids, text], 1)
    is_image = ids == mllm.model.config.image_token_id
    blocks = _blocks(is_image[0])
    rng = np.random.default_rng(seed)
    side = mllm.family.side_px(mllm.model.config)
    noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    pixels = mllm.preprocess(noise).to(mllm.device, mllm.model.dtype)
    text_config = mllm.model.config.get_text_config()
    moved: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        for i, layer in enumerate(mllm.decoder.layers):

            def disturb(
                module,
                args,
                kwargs,
                output,
                i=i,
            ):
                clean = output[0] if isinstance(output, tuple) else output
                check_outputs("states", {layer_site(i + 1): clean})

                def run_again(states: Tensor) -> Tensor:
                    return _run_again(module, states, args, kwargs)

                states = args[0] if args else kwargs["hidden_states"]
                moved[i] = _moved_tokens(run_again, states, clean, blocks, generator)

            stack.callback(layer.register_forward_hook(disturb, with_kwargs=True).remove)
        if mllm.image_attention != mllm.own_image_attention:
            masks = build_decoder_masks(
                mllm.image_attention, text_config, is_image, mllm.model.dtype
            )
            stack.enter_context(decode_under(mllm.decoder, masks))
        inputs = mllm.family.inputs(mllm.model, pixels, is_image)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "logits_to_keep" in signature(mllm.model.forward).parameters:
            inputs["logits_to_keep"] = 1
        mllm.model(**inputs, use_cache=False)
    kinds = _kinds_of_layers(text_config, len(moved))
    return MeasuredMask(
        mllm.image_attention,
        kinds,
        torch.stack([moved[i] for i in range(len(moved))]),
        _claimed(mllm, is_image, kinds, blocks),
        blocks,
    )


def _text_id(config: PreTrainedConfig) -> int:
    """Return the id of a token that is no placeholder: the end of a text."""
    ids = getattr(config.get_text_config(), "eos_token_id", None)
    if isinstance(ids, Sequence):
        ids = next(iter(ids), None)
    return 0 if ids is None else ids


def _blocks(is_image: Tensor) -> list[Tensor]:
    """Return the tokens of the text before the image, of the parts of the image, and of the text after it."""
    positions = is_image.nonzero().flatten().cpu()
    tokens = torch.arange(len(is_image))
    parts = [part for part in positions.chunk(IMAGE_BLOCKS) if len(part)]
    return [tokens[: positions[0]], *parts, tokens[-TEXT_AFTER:]]


def _moved_tokens(
    run: Callable[[Tensor], Tensor],
    states: Tensor,
    clean: Tensor,
    blocks: list[Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Run a layer with the states of each block disturbed; return which tokens' outputs move, bool[N, K]."""
    # by token, since a few tokens of an LLM can have outputs a thousand times as large as the others'
    size = clean[0].abs().amax(-1)
    movements = []
    for block in blocks:
        noise = torch.randn(len(block), states.shape[-1], generator=generator).to(states)
        disturbed = states.clone()
        rows = disturbed[:, block]
        scale = rows.square().mean(-1, keepdim=True).sqrt()
        disturbed[:, block] = rows + noise * scale
        out = run(disturbed)
        movements.append((out - clean)[0].abs().amax(-1) / size)
    movement = torch.stack(movements, 1)
    return (movement > _threshold(movement)).cpu()


def _threshold(movement: Tensor) -> float:
    """Return the movement above which a token of a layer has moved.

    Tokens that do not attend to a block move by rounding or not at all, all others by orders of magnitude more. Between
    one rounding and half of a number's digits, the threshold is the middle of the widest gap that the movements leave,
    on a log scale. These two limits make a gap where all tokens move, or none.

    Args:
        movement: f[N, K], largest change of a token's output, relative to its largest output.
    """
    rounding = torch.finfo(movement.dtype).eps
    limits = movement.new_tensor([rounding, rounding**0.5])
    between = movement.flatten().clamp(*limits.tolist())
    levels = torch.cat([between, limits]).log().sort().values
    widest = int(levels.diff().argmax())
    return float(levels[widest : widest + 2].mean().exp())


def _run_again(
    layer: nn.Module,
    states: Tensor,
    args: tuple,
    kwargs: dict,
) -> Tensor:
    """Return the output of a layer on other states. Dictionaries that layers share keep what is in them."""
    kwargs = {
        name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()
    }
    if args:
        args = (states, *args[1:])
    else:
        kwargs["hidden_states"] = states
    out = layer.forward(*args, **kwargs)  # without hooks, this one among them
    return out[0] if isinstance(out, tuple) else out


def _kinds_of_layers(text_config: PreTrainedConfig, layers: int) -> list[str]:
    """Return the kind of each layer."""
    if getattr(text_config, "layer_types", None):
        return list(text_config.layer_types[:layers])
    return layer_kinds(text_config) * layers


def _claimed(
    mllm: nn.Module,
    is_image: Tensor,
    kinds: list[str],
    blocks: list[Tensor],
) -> Tensor:
    """Return which tokens may attend to a token of each block, bool[L, N, K], by the name of the mask."""
    text_config = mllm.model.config.get_text_config()
    distinct = list(dict.fromkeys(kinds))
    tokens = is_image.shape[1]
    if supports_masks(text_config):
        masks = build_decoder_masks(mllm.image_attention, text_config, is_image, mllm.model.dtype)
        allowed = [is_allowed(mask)[0, 0].cpu() for mask in as_list(masks)]
    else:
        allowed = [torch.ones(tokens, tokens, dtype=torch.bool).tril()] * len(distinct)
    by_kind = dict(zip(distinct, allowed, strict=True))
    by_layer = []
    for kind in kinds:
        reached = [by_kind[kind][:, block].any(1) for block in blocks]
        by_layer.append(torch.stack(reached, 1))
    return torch.stack(by_layer)
