"""Config of LLaVA-1.5 with selectable attention among image tokens; reading one imports no class of a model."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlavaConfig

from .attention import block_ids_of


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
        encoder_norm: Path in the encoder of the norm that is applied to the layer that the adapter reads; "" for none.
        lm_head_bias: Whether the LLM's head has a bias (Phi); that of stock LLaVA has none.
    """

    model_type = "llava_bidir"

    image_attention: str = "causal"
    image_resize: str = "pad"
    register_tokens: int = 0
    encoder_norm: str = ""
    lm_head_bias: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # an unknown name fails here, not in the first forward
        block_ids_of(self.image_attention)


AutoConfig.register(LlavaBidirConfig.model_type, LlavaBidirConfig, exist_ok=True)
# Each save_pretrained copies this code, so that fine-tunes load with trust_remote_code, too.
LlavaBidirConfig.register_for_auto_class()
