"""Masks of LLMs with sliding windows; refusal of layers without a mask."""

import shutil

import pytest
import reference
import tiny_models
import torch
from tiny_llms import SIZES, SLIDING_LLMS, UNMASKED_LLMS, WINDOW
from transformers import MistralConfig

from llava_bidir import IMAGE_ATTENTION
from llava_bidir.common.errors import UserError
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.modeling_llava_bidir import FULL, SLIDING, build_masks, layer_kinds

MASKS = tuple(IMAGE_ATTENTION)
ROWS = ("ttiiiittiiiitttt", "ttttiiiitt")
NEW = 8
IMAGES = (slice(0, 2), slice(2, 3))  # of each row


def batch() -> dict:
    ids, mask = tiny_models.ids(*ROWS, pad="left")
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": tiny_models.pixels(3),
    }


@torch.no_grad()
def stock_logits(model, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return the logits of a row without padding from stock LLaVA under masks from a loop, without a cache."""
    is_image = ids == tiny_models.IMAGE_ID
    full = reference.mask_by_loop(model.config.image_attention, is_image, torch.ones_like(ids))
    places = range(ids.shape[1])
    near = torch.tensor([[q - k < WINDOW for k in places] for q in places])
    masks = {FULL: full, SLIDING: full & near}
    for kind, mask in masks.items():
        masks[kind] = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None]
    several = len(layer_kinds(model.config.text_config)) > 1
    return tiny_models.stock(model)(
        input_ids=ids,
        attention_mask=masks if several else masks[SLIDING],
        pixel_values=pixels,
        use_cache=False,
    ).logits


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "sdpa") for name in MASKS), ("bidirectional", "eager")]
)
@pytest.mark.parametrize("llm", SLIDING_LLMS)
def test_sliding_layers_keep_their_window_with_every_cache(llm, backend, name):
    model = tiny_models.model(name, backend, text_config=SLIDING_LLMS[llm])
    inputs = batch()
    caches = ({}, {"use_cache": False}, {"cache_implementation": "static"})
    details = {
        "return_dict_in_generate": True,
        "output_logits": True,
        "suppress_tokens": [tiny_models.IMAGE_ID],
    }
    for cache in caches:
        out = model.generate(
            **inputs,
            **details,
            **cache,
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=[],
        )
        for row, real in enumerate(inputs["attention_mask"].bool()):
            ids = out.sequences[row][torch.cat([real, torch.ones(NEW, dtype=torch.bool)])][None]
            expected = stock_logits(model, ids, inputs["pixel_values"][IMAGES[row]])[
                0, -NEW - 1 : -1
            ]
            torch.testing.assert_close(
                torch.stack(out.logits, 1)[row], expected, rtol=1e-3, atol=1e-3
            )


def test_flex_attention_with_sliding_windows_is_refused():
    config = MistralConfig(**SIZES, sliding_window=WINDOW)
    config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention is not supported with sliding windows"):
        build_masks("bidirectional", config, torch.ones(1, 200, dtype=torch.bool))


@pytest.mark.parametrize("name", ["bidirectional", "prefix"])
@pytest.mark.parametrize("kind", UNMASKED_LLMS)
def test_layers_without_a_mask_are_refused_when_the_model_is_built(kind, name, parts, tmp_path):
    llm = str(shutil.copytree(parts[1], tmp_path / "llm"))
    UNMASKED_LLMS[kind].save_pretrained(llm)
    message = f"image_attention='{name}': .* has {kind} layers, which take no mask"
    with pytest.raises(UserError, match=message):
        build_model(parts[0], llm, build_processor(parts[0], llm), image_attention=name)
