"""Masks of LLMs with sliding windows; refusal of layers without a mask."""

import copy
import shutil

import pytest
import reference
import tiny_models
import torch
from tiny_llms import SIZES, SLIDING_LLMS, UNMASKED_LLMS, WINDOW
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

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


def looped_masks(config, name: str, is_image: torch.Tensor):
    """Return the additive mask f[1, 1, N, N] of each kind of layer, from a loop over pairs."""
    mask = reference.mask_by_loop(name, is_image, torch.ones_like(is_image))[:, None]
    near = torch.tensor(
        [[q - k < WINDOW for k in range(mask.shape[-1])] for q in range(mask.shape[-1])]
    )
    masks = {FULL: mask, SLIDING: mask & near}
    masks = {
        kind: torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) for kind, mask in masks.items()
    }
    return masks if len(layer_kinds(config)) > 1 else masks[SLIDING]


@torch.no_grad()
def stock_logits(model, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return the logits of a row without padding from stock LLaVA under looped masks, without a cache."""
    masks = looped_masks(
        model.config.text_config, model.config.image_attention, ids == tiny_models.IMAGE_ID
    )
    return tiny_models.stock(model)(
        input_ids=ids,
        attention_mask=masks,
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


@pytest.fixture
def build(parts, tmp_path):
    """Return a function that builds an MLLM with another LLM and a mask, and its processor."""

    def build_with(config, image_attention: str):
        llm = str(shutil.copytree(parts[1], tmp_path / "llm"))
        config.vocab_size = LlamaConfig.from_pretrained(llm).vocab_size
        AutoModelForCausalLM.from_config(config).save_pretrained(llm)
        processor = build_processor(parts[0], llm)
        return build_model(
            parts[0], llm, processor, image_attention=image_attention
        ).eval(), processor

    return build_with


@pytest.mark.parametrize("name", ["bidirectional", "prefix"])
@pytest.mark.parametrize("kind", UNMASKED_LLMS)
def test_layers_without_a_mask_are_refused_when_the_model_is_built(kind, name, build):
    message = f"image_attention='{name}': .* has {kind} layers, which take no mask"
    with pytest.raises(UserError, match=message):
        build(copy.deepcopy(UNMASKED_LLMS[kind]), name)
    with pytest.raises(ValueError, match=message):
        tiny_models.model(name, text_config=UNMASKED_LLMS[kind])
