"""LLaVA-1.5 with a choice of attention among the image tokens.

One class for every mask: ``config.image_attention`` names an entry of :mod:`.attention`. ``causal`` is stock LLaVA bit
for bit. The model type is its own, because a stock ``llava`` class would load such a checkpoint, ignore the extra key
and run it causally. This file and :mod:`.attention` ship inside checkpoints (``trust_remote_code``), so they import
nothing else of the package.

Shapes: B batch, N tokens given in this call, P tokens in the cache before them.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Cache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_causal_mask

from .attention import image_attention

# Backends that apply an arbitrary mask. Flash-attention 2 and 3 take padding only and drop the rest without a word.
MASKED_BACKENDS = ("sdpa", "eager", "flex_attention")


@strict
class LlavaBidirConfig(LlavaConfig):
    """LlavaConfig plus what a LLaVA checkpoint otherwise leaves to chance.

    Args:
        image_attention: Name of the mask among image tokens: "causal", "bidirectional" (Eq. 2), "prefix", or whatever
            was registered with :func:`.attention.register_image_attention`.
        image_resize: How images become squares: "pad" with the mean colour (LLaVA's stage 2 and evaluation), "center_crop" to
            the centre (its stage 1).
        register_tokens: Tokens of the encoder between CLS and patches, which are kept from the adapter. A stock LLaVA
            would take them for patches.
        adapter_gain: Factor on the adapter's last weight at initialisation. Visual tokens of trained LLaVAs are many
            times longer than words; 1 is LLaVA's own.
    """

    model_type = "llava_bidir"

    image_attention: str = "causal"
    image_resize: str = "pad"
    register_tokens: int = 0
    adapter_gain: float = 1.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        image_attention(self.image_attention)  # an unknown name fails here, not in the first forward


class LlavaBidirForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` whose LLM runs under ``config.image_attention``.

    Raises:
        ValueError: The attention backend would drop the mask, or there are no `input_ids` to find the image tokens in.
    """

    config: LlavaBidirConfig
    config_class = LlavaBidirConfig

    def __init__(self, config: LlavaBidirConfig):
        super().__init__(config)
        if config.register_tokens:
            patches = slice(config.register_tokens, None)  # LlavaModel has dropped CLS by then
            self.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: (args[0][:, patches],))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ):
        """As the parent's; a 4D `attention_mask` (BlockMask under flex attention) is taken as final and passed on."""
        if _is_padding_mask(attention_mask) and self.config.image_attention != "causal":
            if input_ids is None:
                raise ValueError(
                    f"image_attention={self.config.image_attention!r} finds the image tokens in input_ids; "
                    "pass them instead of inputs_embeds, or pass a finished 4D attention_mask"
                )
            attention_mask = self._llm_mask(input_ids, attention_mask, past_key_values)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, past_key_values=None, attention_mask=None, **kwargs
    ):
        """Builds the prefill mask here, from all ids: generate() gives a static cache a plain causal one otherwise."""
        new_tokens = next_sequence_length or input_ids.shape[1]
        if new_tokens > 1 and _is_padding_mask(attention_mask) and self.config.image_attention != "causal":
            attention_mask = self._llm_mask(input_ids[:, -new_tokens:], attention_mask, past_key_values)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **kwargs,
        )

    def _llm_mask(self, input_ids: Tensor, padding: Tensor | None, cache: Cache | None):
        """The LLM's attention mask for `input_ids` long[B, N] behind P cached tokens; `padding` is 0/1 [B, P + N]."""
        is_image = input_ids == self.config.image_token_id
        cached = cache.get_seq_length() if cache is not None else 0
        if cached > 0 and is_image.any():
            raise ValueError(
                f"image_attention={self.config.image_attention!r}: image tokens arrived after {cached} cached tokens; "
                "all images of a prompt must be in the first forward, since earlier image tokens must see later ones"
            )
        if cached > 0 or not is_image.any():
            return padding  # nothing but text rows, and those are causal under every mask
        text_config = self.config.get_text_config()
        return build_mask(
            self.config.image_attention, text_config, is_image, padding, past_key_values=cache, dtype=self.dtype
        )


def _is_padding_mask(attention_mask) -> bool:
    """True for no mask or a 2D one; 4D masks, flex attention's BlockMask and dicts are finished."""
    return attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2)


def build_mask(
    name: str,
    text_config: PreTrainedConfig,
    is_image: Tensor,
    padding: Tensor | None = None,
    *,
    past_key_values: Cache | None = None,
    dtype: torch.dtype = torch.float32,
):
    """The LLM's mask as its backend wants it: bool[B, 1, N, N] for sdpa (True = may attend), additive for eager.

    Args:
        name: Registered image attention.
        text_config: Of the LLM; says which backend.
        is_image: bool[B, N], True at image tokens.
        padding: 0/1 [B, N], 0 at padding on either side; None where there is none.
        past_key_values: An empty cache, if one is going to be filled (its size fixes the mask's last axis).
        dtype: Of an additive mask.

    Raises:
        ValueError: The backend cannot apply the mask.
    """
    block_ids = image_attention(name)
    if text_config._attn_implementation not in MASKED_BACKENDS:
        raise ValueError(
            f"attn_implementation={text_config._attn_implementation!r} ignores masks, so that "
            f"image_attention={name!r} would silently run as causal; use one of {', '.join(MASKED_BACKENDS)}: "
            "from_pretrained(..., attn_implementation='sdpa')"
        )
    mask = create_causal_mask(
        config=text_config,
        inputs_embeds=torch.empty(*is_image.shape, 0, dtype=dtype, device=is_image.device),  # read for its shape only
        attention_mask=padding,
        past_key_values=past_key_values,
        block_sequence_ids=None if block_ids is None else block_ids(is_image),
        allow_is_causal_skip=False,
    )
    if mask is None or len(mask.shape) != 4:
        raise ValueError(f"transformers built no 4D mask for image_attention={name!r}, but {mask!r}")
    return mask


# Weights lie in files as in a llava. Without this, the head of a released one would not be found under its name there,
# and be drawn anew with no more than a warning.
register_checkpoint_conversion_mapping(
    LlavaBidirForConditionalGeneration.__name__, get_checkpoint_conversion_mapping("llava"), overwrite=True
)
AutoConfig.register(LlavaBidirConfig.model_type, LlavaBidirConfig, exist_ok=True)
AutoModelForImageTextToText.register(LlavaBidirConfig, LlavaBidirForConditionalGeneration, exist_ok=True)
