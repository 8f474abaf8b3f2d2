"""LLaVA-1.5 with selectable attention among image tokens.

One class implements all masks: ``config.image_attention`` names an entry of :mod:`.attention`. ``causal`` equals stock
LLaVA bit for bit. The model type is not ``llava``, because the stock class would ignore the extra key and run the model
causally. Exported checkpoints contain this file, :mod:`.configuration_llava_bidir` and :mod:`.attention`
(``trust_remote_code``), so they import nothing else of the package.

Shapes: B batch, N tokens of this call.
"""

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Cache,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MetaClip2VisionConfig,
    MetaClip2VisionModel,
    PreTrainedConfig,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import PrefixChange, WeightTransform
from transformers.masking_utils import create_causal_mask
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging, torch_compilable_check

from .attention import block_ids_of
from .configuration_llava_bidir import LlavaBidirConfig

logger = logging.get_logger(__name__)

# Backends that apply any mask. Flash attention 2 and 3 support padding masks only and silently ignore other masks.
MASKED_BACKENDS = ("sdpa", "eager", "flex_attention")
# Kinds of layers that apply a mask. Linear attention and convolutions do not; chunks and indexers are not implemented.
FULL = "full_attention"
SLIDING = "sliding_attention"
# Settings of what LLMs do with the products of their heads, with the value that changes nothing.
NEUTRAL = {"logits_scaling": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None}


class LlavaBidirForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` whose LLM runs under ``config.image_attention``.

    Image tokens are those of a call with `pixel_values` or `mm_encoder_outputs`. Without either, all tokens are text
    and causal. A caller that puts image features into `inputs_embeds` itself has to pass a 4D `attention_mask`.

    Raises:
        ValueError: The attention backend or the layers of the LLM would ignore the mask.
    """

    config: LlavaBidirConfig

    def __init__(self, config: LlavaBidirConfig):
        check_mask_reaches_layers(config.image_attention, config.get_text_config())
        super().__init__(config)
        # LlavaModel drops CLS before these hooks run
        if config.register_tokens:
            patches = slice(config.register_tokens, None)
            self.model.multi_modal_projector.register_forward_pre_hook(
                lambda module, args: (args[0][:, patches],)
            )
        if config.encoder_norm:
            self.model.multi_modal_projector.register_forward_pre_hook(
                lambda module, args: (self.normed(args[0]),)
            )

    def normed(self, states: Tensor) -> Tensor:
        """Return the encoder's states f[B, T, d] after its final norm."""
        return self.model.vision_tower.get_submodule(self.config.encoder_norm)(states)

    def post_init(self):
        """Replace the parent's head and its name of the embeddings by those of the LLM, before weights are tied."""
        text_config = self.config.get_text_config()
        words = text_config.vocab_size
        head = nn.Linear(text_config.hidden_size, words, bias=self.config.lm_head_bias)
        self.set_output_embeddings(head)
        embeddings = self.get_input_embeddings()
        modules = self.named_modules()
        name = next(name for name, module in modules if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        super().post_init()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Set the head, whose logits become those of the LLM; transformers calls it after resizing, too."""
        self.lm_head = LogitHead(new_embeddings, self.config.get_text_config())

    # All parameters of the parent, in any version, are named, because generate() decides by the signature what it
    # passes and how it repeats the images of a prompt for its beams.
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """Apply ``config.image_attention``, or in its place an `attention_mask` of the caller's.

        Such a mask is 4D, boolean (True = attend) or additive, a BlockMask of flex attention, or a dict of masks by
        kind of layer.

        Without an `attention_mask`, `position_ids` have to count up by 1: rows of several samples are refused.
        """
        cache = past_key_values if cache is None else cache  # its former name
        has_images = pixel_values is not None or bool(mm_encoder_outputs)
        if attention_mask is None and position_ids is not None and position_ids.ndim == 2:
            several = (
                "position_ids restart within a row; pass one sample per row, or an attention_mask"
            )
            torch_compilable_check((position_ids.diff() == 1).all(), several)
        needs_mask = self.config.image_attention != "causal" and _is_padding_mask(attention_mask)
        if needs_mask and has_images:
            # A branch on the cache's length would break torch.export: it is a tensor in a static cache.
            torch_compilable_check(
                cache is None or cache.get_seq_length() == 0,
                f"image_attention={self.config.image_attention!r}: got images after cached tokens; pass all images of "
                "a prompt in the first forward, since image tokens attend to later image tokens",
            )
            attention_mask = build_masks(
                self.config.image_attention,
                self.config.get_text_config(),
                self._is_image(input_ids, inputs_embeds),
                attention_mask,
                cache=cache,
                dtype=self.dtype,
            )
        elif needs_mask and inputs_embeds is not None and not torch.compiler.is_compiling():
            logger.warning_once(
                "inputs_embeds without pixel_values are read as text, so attention is causal; if they contain image "
                f"features, pass a 4D attention_mask for image_attention={self.config.image_attention!r}"
            )
        if not _is_padding_mask(attention_mask):
            attention_mask = self._backend_masks(attention_mask)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            cache=cache,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, input_ids, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        """Leave the mask of a prompt with images to forward(); generate() would use a causal one with static caches."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        if inputs.get("pixel_values") is not None or inputs.get("mm_encoder_outputs"):
            inputs["attention_mask"] = attention_mask
        return inputs

    def _backend_masks(self, masks):
        """Return a mask, or a dict of masks, in the form that the attention backend applies.

        Only sdpa reads booleans. Eager and flex attention add a mask to the scores, and would add True as 1.

        Raises:
            ValueError: A mask has integers.
        """
        if isinstance(masks, dict):
            return {kind: self._backend_masks(mask) for kind, mask in masks.items()}
        if not isinstance(masks, Tensor) or masks.is_floating_point():
            return masks
        if masks.dtype != torch.bool:
            raise ValueError(
                f"attention_mask is {masks.dtype} of shape {list(masks.shape)}; expected booleans (True = attend), or "
                "floats that are added to the scores; pass attention_mask.bool()"
            )
        if self.config.get_text_config()._attn_implementation == "sdpa":
            return masks
        blocked = torch.finfo(self.dtype).min
        return torch.zeros_like(masks, dtype=self.dtype).masked_fill(~masks, blocked)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Write the model by the same names of weights whether it was built, or loaded from a file with other names.

        The encoder's and the LLM's are those of released checkpoints. The prefixes of the parts are those of the
        modules: the stock class renames prefixes in a "llava" only.
        """
        self._weight_conversions = [c for c in released_names(self) if c.scope_prefix]
        super().save_pretrained(save_directory, *args, **kwargs)

    def _is_image(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return bool[B, N], True at image tokens; without ids, where embeddings equal the image token's, as LLaVA."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.full((), self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)


class LogitHead(nn.Linear):
    """Head of an LLM, a linear layer whose products become the LLM's own logits: divided, multiplied or soft-capped.

    Source: the `forward` of transformers' GraniteForCausalLM, CohereForCausalLM and Gemma2ForCausalLM.

    Args:
        linear: Layer whose weights it takes.
        text_config: Configuration of the LLM.
    """

    def __init__(self, linear: nn.Linear, text_config: PreTrainedConfig):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.text_config = text_config

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits f[..., V] of states f[..., d]."""
        logits = super().forward(states)
        steps = logit_steps(self.text_config)
        if divisor := steps.get("logits_scaling"):
            logits = logits / divisor
        if factor := steps.get("logit_scale"):
            logits = logits * factor
        if cap := steps.get("final_logit_softcapping"):
            logits = torch.tanh(logits / cap) * cap
        return logits


def logit_steps(text_config: PreTrainedConfig) -> dict[str, float]:
    """Return the settings of an LLM's head that change logits."""
    values = {name: getattr(text_config, name, None) for name in NEUTRAL}
    return {name: value for name, value in values.items() if value not in (None, NEUTRAL[name])}


def released_names(model: LlavaForConditionalGeneration) -> list[WeightTransform]:
    """Return the conversions whose reverse gives weights the names and shapes that they have in released LLaVAs.

    As `model._weight_conversions` they make `save_pretrained` independent of the model's history. By itself it reverses
    those of the file that a model was loaded from. For other models it leaves out prefixes: `vision_model` of CLIP and
    SigLIP, without which transformers before 5 initialises the encoder at random and only warns.
    """
    return [
        conversion
        for conversion in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(conversion, PrefixChange) or conversion.scope_prefix == "vision_tower"
    ]


def _is_padding_mask(attention_mask) -> bool:
    """Return True for None or a 2D mask. 4D masks, BlockMasks of flex attention and dicts are used unchanged."""
    return attention_mask is None or (
        isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
    )


def layer_kinds(text_config: PreTrainedConfig) -> list[str]:
    """Return the kinds of layers in a decoder by transformers' names, in order of first use."""
    if getattr(text_config, "layer_types", None):
        return list(dict.fromkeys(text_config.layer_types[: text_config.num_hidden_layers]))
    return [SLIDING if getattr(text_config, "sliding_window", None) else FULL]


def check_mask_reaches_layers(name: str, text_config: PreTrainedConfig) -> None:
    """Raise ValueError if a mask other than "causal" does not reach all layers of a decoder."""
    others = sorted({*layer_kinds(text_config)} - {FULL, SLIDING})
    if others and name != "causal":
        raise ValueError(
            f"image_attention={name!r}: {text_config.model_type} has {', '.join(others)} layers, which take no mask, "
            "so image tokens would stay causal in them; use image_attention='causal' or another LLM"
        )


def build_masks(
    name: str,
    text_config: PreTrainedConfig,
    is_image: Tensor,
    padding: Tensor | None = None,
    **kwargs,
):
    """Return the LLM's mask, or a dict of masks by kind of layer if it has several; see :func:`build_mask`."""
    check_mask_reaches_layers(name, text_config)
    kinds = layer_kinds(text_config)
    masks = {
        kind: build_mask(name, text_config, is_image, padding, kind=kind, **kwargs)
        for kind in kinds
    }
    return masks if len(kinds) > 1 else masks[kinds[0]]


def build_mask(
    name: str,
    text_config: PreTrainedConfig,
    is_image: Tensor,
    padding: Tensor | None = None,
    *,
    kind: str = FULL,
    cache: Cache | None = None,
    dtype: torch.dtype = torch.float32,
):
    """Return the mask of one kind of layers: bool[B, 1, N, N] (True = attend) for sdpa, additive for eager.

    Args:
        name: Name of a registered image attention.
        text_config: Configuration of the LLM, which names the backend.
        is_image: bool[B, N], True at image tokens.
        padding: 0/1 [B, N], 0 at padding on either side; None without padding.
        kind: FULL, or SLIDING for layers that attend no further back than their window, also among image tokens
            (Gemma 3's masks).
        cache: The empty cache to be filled, if any. Its size sets the mask's last axis.
        dtype: Dtype of an additive mask.

    Raises:
        ValueError: The backend cannot apply the mask.
    """
    if text_config._attn_implementation not in MASKED_BACKENDS:
        raise ValueError(
            f"attn_implementation={text_config._attn_implementation!r} ignores masks, so "
            f"image_attention={name!r} would silently run as causal; use one of {', '.join(MASKED_BACKENDS)}: "
            "from_pretrained(..., attn_implementation='sdpa')"
        )
    if kind == SLIDING and text_config._attn_implementation == "flex_attention":
        raise ValueError(
            "flex_attention is not supported with sliding windows; use attn_implementation='sdpa'"
        )
    block_ids = block_ids_of(name)
    windows = cache.is_sliding if cache is not None and kind == SLIDING else []
    mask = create_causal_mask(
        text_config,
        # embeddings: only their shape is used
        torch.empty(*is_image.shape, 0, dtype=dtype, device=is_image.device),
        padding,
        cache,
        block_sequence_ids=block_ids and block_ids(is_image),
        # layers of a kind have caches of one size
        layer_idx=windows.index(True) if True in windows else None,
        allow_is_causal_skip=False,
    )
    if kind == SLIDING:
        near = torch.ones_like(mask, dtype=torch.bool).triu(1 - text_config.sliding_window)
        mask = mask.masked_fill(
            ~near, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        )
    return mask


# Weight files use the names of llava checkpoints. Without this mapping, transformers would not find the LLM head of a
# released LLaVA and would re-initialise it with only a warning.
register_checkpoint_conversion_mapping(
    LlavaBidirForConditionalGeneration.__name__,
    get_checkpoint_conversion_mapping("llava"),
    overwrite=True,
)
# a vision tower that AutoModel of transformers does not know, and LlavaModel builds by it
AutoModel.register(MetaClip2VisionConfig, MetaClip2VisionModel, exist_ok=True)
# the second one is for "any-to-any"
for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(LlavaBidirConfig, LlavaBidirForConditionalGeneration, exist_ok=True)
AutoProcessor.register(LlavaBidirConfig, LlavaProcessor, exist_ok=True)
# Each save_pretrained copies this code, so that fine-tunes load with trust_remote_code, too.
LlavaBidirForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
