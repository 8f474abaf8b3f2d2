"""Logits of a LLaVA from reference.py: no layer, mask or attention of the packages takes part."""

import reference
import torch
from torch import Tensor


@torch.no_grad()
def llava_logits(
    model,
    image_attention: str,
    ids: Tensor,
    pixels: Tensor | None,
) -> Tensor:
    """Return the logits f[N, V] of a sample without padding.

    Args:
        model: `LlavaBidirForConditionalGeneration` with a Llama, used for its weights, and for the features of images.
        image_attention: Name of the mask.
        ids: i64[N].
        pixels: f[I, 3, H, W], or None without images.
    """
    is_image = ids == model.config.image_token_id
    embedded = model.get_input_embeddings()(ids)
    if pixels is not None:
        embedded[is_image] = torch.cat(list(model.get_image_features(pixels).pooler_output))
    decoder = model.model.language_model
    mask = reference.mask_by_loop(image_attention, is_image[None], torch.ones_like(ids)[None])
    masks = [mask] * len(decoder.layers)
    states = reference.llama_states(decoder, embedded[None], masks, torch.arange(len(ids)))
    return model.lm_head(decoder.norm(states[-1]))[0]
