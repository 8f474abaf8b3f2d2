"""The model: causal equals stock LLaVA, the mask reaches attention, generation equals full forwards."""

import json

import pytest
import reference
import tiny_models
import torch
from tolerances import rounding
from transformers import AutoModelForImageTextToText

from llava_bidir import IMAGE_ATTENTION
from llava_bidir.model.modeling_llava_bidir import CACHE

pytestmark = pytest.mark.numerics

MASKS = tuple(IMAGE_ATTENTION)
DEPTH = 7  # layers from the pixels to the logits
# two images of 4 tokens, one image, text only, and a short row
BATCH = ("tiiiittiiiitt", "ttiiiittt", "tttttttt", "tiiiit")


def batch(pad: str = "right"):
    ids, mask = tiny_models.ids(*BATCH, pad=pad)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": tiny_models.pixels(4),
    }


def states(model, **inputs):
    return model(
        **inputs,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", ["right", "left"])
def test_causal_equals_stock_llava_bit_for_bit(attn_implementation, pad):
    ours = tiny_models.model("causal", attn_implementation)
    stock = tiny_models.stock(ours)
    inputs = batch(pad)
    assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)
    if pad == "left":
        kwargs = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(ours.generate(**inputs, **kwargs), stock.generate(**inputs, **kwargs))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", ["right", "left"])
def test_states_equal_an_attention_written_out_under_the_looped_mask(
    name, attn_implementation, pad
):
    model = tiny_models.model(name, attn_implementation)
    inputs = batch(pad)
    ours = states(model, **inputs)
    decoder = model.model.language_model
    padding = inputs["attention_mask"]
    masks = reference.mask_by_loop(name, inputs["input_ids"] == tiny_models.IMAGE_ID, padding)
    for row in range(len(BATCH)):
        real = padding[row].bool()
        # rotary embeddings are relative, so padding on the left has no effect
        positions = torch.arange(int(real.sum()))
        mask = masks[row][real][:, real]
        expected = reference.llama_states(
            decoder, ours[0][row : row + 1, real], [mask[None]] * 3, positions
        )
        for layer in (0, 1):  # the last entry of hidden_states is normed
            near = rounding(expected[layer], layer + 1)
            torch.testing.assert_close(ours[layer + 1][row, real], expected[layer][0], **near)


def test_save_and_load_keep_the_mask_and_the_logits(tmp_path):
    model = tiny_models.model("bidirectional")
    inputs = batch()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["image_attention"] == "bidirectional"
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlavaBidirForConditionalGeneration"
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    code = {
        "modeling_llava_bidir.py",
        "attention.py",
    }  # for trust_remote_code, of fine-tunes and merged models, too
    assert code <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_images_after_cached_tokens_are_rejected(name):
    """Whatever the caller and this transformers call the cache."""
    model = tiny_models.model("bidirectional")
    ids, _ = tiny_models.ids("tt")
    cache = model(input_ids=ids, use_cache=True)[CACHE]
    later, _ = tiny_models.ids("iiii")
    with pytest.raises(ValueError, match="got images after cached tokens"):
        model(
            input_ids=later,
            pixel_values=tiny_models.pixels(1),
            **{name: cache},
        )
