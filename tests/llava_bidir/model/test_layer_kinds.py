"""Answers with every cache, also of LLMs with sliding windows, and refusal of layers without a mask."""

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
ROWS = ("ttiiiittiiiitttt", "ttttiiiitt", "tttt")
IMAGES = (2, 1, 0)  # of each row
NEW = 8
LLMS = {"llama": tiny_models.llama_config(), **SLIDING_LLMS}
CACHES = ({}, {"use_cache": False}, {"cache_implementation": "static"})
BEAMS = {"num_beams": 3, "num_return_sequences": 2}
GREEDY = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "eos_token_id": tiny_models.IMAGE_ID,  # which is suppressed
    "suppress_tokens": [tiny_models.IMAGE_ID],
    "return_dict_in_generate": True,
    "output_logits": True,
    "output_scores": True,
}


def stock_logits(stock, name: str, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return the logits f[NEW, V] of an answer in a row without padding, under masks from a loop, without a cache."""
    full = reference.mask_by_loop(name, ids == tiny_models.IMAGE_ID, torch.ones_like(ids))
    places = range(ids.shape[1])
    near = torch.tensor([[q - k < WINDOW for k in places] for q in places])
    masks = {FULL: full, SLIDING: full & near}
    for kind, mask in masks.items():
        masks[kind] = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None]
    kinds = layer_kinds(stock.config.text_config)
    out = stock(
        input_ids=ids,
        attention_mask=masks if len(kinds) > 1 else masks[next(iter(kinds))],
        pixel_values=pixels if len(pixels) else None,
        use_cache=False,
    )
    return out.logits[0, -NEW - 1 : -1]


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "sdpa") for name in MASKS), ("bidirectional", "eager")]
)
@pytest.mark.parametrize("llm", LLMS)
@torch.no_grad()
def test_answers_with_every_cache_are_those_of_full_forwards(llm, backend, name):
    """About the images of their prompt, also in beams; sliding layers keep their window."""
    model = tiny_models.model(name, backend, text_config=LLMS[llm])
    stock = tiny_models.stock(model)
    ids, padding = tiny_models.ids(*ROWS, pad="left")
    pixels = tiny_models.pixels(sum(IMAGES))
    beams = BEAMS if llm == "llama" else {}
    for cache in CACHES:
        out = model.generate(
            input_ids=ids, attention_mask=padding, pixel_values=pixels, **GREEDY, **cache, **beams
        )
        for i, sequence in enumerate(out.sequences):
            row = i * len(ROWS) // len(out.sequences)
            real = torch.cat([padding[row].bool(), torch.ones(NEW, dtype=torch.bool)])
            logits = stock_logits(
                stock, name=name, ids=sequence[real][None], pixels=pixels.split(IMAGES)[row]
            )
            if beams:
                score = logits.log_softmax(-1).gather(1, sequence[-NEW:, None]).mean()
                torch.testing.assert_close(out.sequences_scores[i], score, rtol=1e-4, atol=1e-4)
            else:
                step_logits = torch.stack(out.logits, 1)[i]
                torch.testing.assert_close(step_logits, logits, rtol=1e-3, atol=1e-3)


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
