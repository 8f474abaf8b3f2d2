"""LLaVA-1.5 with selectable attention among image tokens.

One class implements all masks: ``config.image_attention`` names an entry of :mod:`.attention`. ``causal`` equals stock
LLaVA bit for bit. The model type is not ``llava``, because the stock class would ignore the extra key and run the model
causally. Exported checkpoints contain this file and :mod:`.attention` (``trust_remote_code``), so both import nothing
else of the package.

Shapes: B batch, N tokens of this call, P tokens in the cache before them.
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

# Backends that apply any mask. Flash attention 2 and 3 support padding masks only and silently ignore other masks.
MASKED_BACKENDS = ("sdpa", "eager", "flex_attention")


@strict
class LlavaBidirConfig(LlavaConfig):
    """LlavaConfig plus the mask, the resizing of images and the encoder's registers.

    Args:
        image_attention: Name of the mask among image tokens: "causal", "bidirectional" (Eq. 2), "prefix", or one that
            was registered with :func:`.attention.register_image_attention`.
        image_resize: How images become squares: "pad" adds borders of the mean colour (LLaVA's stage 2 and evaluation),
            "center_crop" cuts the sides off (LLaVA's stage 1).
        register_tokens: Number of encoder tokens between CLS and patches. They are dropped before the adapter; stock
            LLaVA would treat them as patches.
    """

    model_type = "llava_bidir"

    image_attention: str = "causal"
    image_resize: str = "pad"
    register_tokens: int = 0

    def __post_init__(self, **kwargs):
        kwargs.pop("adapter_gain", None)  # checkpoints of earlier versions have this key and the next one
        if resize := kwargs.pop("image_aspect", None):
            self.image_resize = "center_crop" if resize == "crop" else resize
        super().__post_init__(**kwargs)
        image_attention(self.image_attention)  # an unknown name fails here, not in the first forward


class LlavaBidirForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` whose LLM runs under ``config.image_attention``.

    Raises:
        ValueError: The attention backend would ignore the mask, or `input_ids`, which locate image tokens, are missing.
    """

    config: LlavaBidirConfig
    config_class = LlavaBidirConfig

    def __init__(self, config: LlavaBidirConfig):
        super().__init__(config)
        if config.register_tokens:
            patches = slice(config.register_tokens, None)  # LlavaModel drops CLS before this hook runs
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
        """Apply ``config.image_attention``; a 4D `attention_mask` (BlockMask for flex attention) is used unchanged."""
        if _is_padding_mask(attention_mask) and self.config.image_attention != "causal":
            if input_ids is None:
                raise ValueError(
                    f"image_attention={self.config.image_attention!r} locates image tokens by input_ids; "
                    "pass input_ids instead of inputs_embeds, or pass a 4D attention_mask"
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
        """Build the prefill mask from all ids; generate() would use a causal mask with a static cache."""
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
        """Return the LLM's mask for `input_ids` long[B, N] after P cached tokens; `padding` is 0/1 [B, P + N]."""
        is_image = input_ids == self.config.image_token_id
        cached = cache.get_seq_length() if cache is not None else 0
        if cached > 0 and is_image.any():
            raise ValueError(
                f"image_attention={self.config.image_attention!r}: got image tokens after {cached} cached tokens; "
                "pass all images of a prompt in the first forward, since image tokens attend to later image tokens"
            )
        if cached > 0 or not is_image.any():
            return padding  # only text rows, which are causal under every mask
        text_config = self.config.get_text_config()
        return build_mask(
            self.config.image_attention, text_config, is_image, padding, past_key_values=cache, dtype=self.dtype
        )


def _is_padding_mask(attention_mask) -> bool:
    """Return True for None or a 2D mask. 4D masks, BlockMasks of flex attention and dicts are used unchanged."""
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
    """Return the LLM's mask for its backend: bool[B, 1, N, N] (True = attend) for sdpa, additive for eager.

    Args:
        name: Name of a registered image attention.
        text_config: Configuration of the LLM, which names the backend.
        is_image: bool[B, N], True at image tokens.
        padding: 0/1 [B, N], 0 at padding on either side; None without padding.
        past_key_values: The empty cache to be filled, if any. Its size sets the mask's last axis.
        dtype: Dtype of an additive mask.

    Raises:
        ValueError: The backend cannot apply the mask.
    """
    block_ids = image_attention(name)
    if text_config._attn_implementation not in MASKED_BACKENDS:
        raise ValueError(
            f"attn_implementation={text_config._attn_implementation!r} ignores masks, so "
            f"image_attention={name!r} would silently run as causal; use one of {', '.join(MASKED_BACKENDS)}: "
            "from_pretrained(..., attn_implementation='sdpa')"
        )
    mask = create_causal_mask(
        config=text_config,
        inputs_embeds=torch.empty(*is_image.shape, 0, dtype=dtype, device=is_image.device),  # only its shape is used
        attention_mask=padding,
        past_key_values=past_key_values,
        block_sequence_ids=None if block_ids is None else block_ids(is_image),
        allow_is_causal_skip=False,
    )
    if mask is None or len(mask.shape) != 4:
        raise ValueError(f"transformers built {mask!r} for image_attention={name!r}; expected a 4D mask")
    return mask


# Weight files use the names of llava checkpoints. Without this mapping, transformers would not find the LLM head of a
# released LLaVA and would re-initialise it with only a warning.
register_checkpoint_conversion_mapping(
    LlavaBidirForConditionalGeneration.__name__, get_checkpoint_conversion_mapping("llava"), overwrite=True
)
AutoConfig.register(LlavaBidirConfig.model_type, LlavaBidirConfig, exist_ok=True)
AutoModelForImageTextToText.register(LlavaBidirConfig, LlavaBidirForConditionalGeneration, exist_ok=True)
