"""The model: causal equals stock LLaVA, the mask reaches attention, generation equals full forwards."""

import json

import pytest
import reference
import tiny_models
import torch
from tolerances import rounding
from transformers import AutoModelForImageTextToText

from llava_bidir import IMAGE_ATTENTION

pytestmark = pytest.mark.numerics

MASKS = tuple(IMAGE_ATTENTION)
DEPTH = 7  # layers from the pixels to the logits
# two images of 4 tokens, one image, text only, and a short row
BATCH = ("tiiiittiiiitt", "ttiiiittt", "tttttttt", "tiiiit")


def batch(pad: str = "right"):
    ids, mask = tiny_models.ids(*BATCH, pad=pad)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": tiny_models.pixels(4)}


def states(model, **inputs):
    return model(**inputs, output_hidden_states=True, use_cache=False).hidden_states


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
def test_states_equal_an_attention_written_out_under_the_looped_mask(name, attn_implementation, pad):
    model, inputs = tiny_models.model(name, attn_implementation), batch(pad)
    ours = states(model, **inputs)
    decoder, padding = model.model.language_model, inputs["attention_mask"]
    masks = reference.mask_by_loop(name, inputs["input_ids"] == tiny_models.IMAGE_ID, padding)
    for row in range(len(BATCH)):
        real = padding[row].bool()
        # rotary embeddings are relative, so padding on the left has no effect
        positions, mask = torch.arange(int(real.sum())), masks[row][real][:, real]
        expected = reference.llama_states(decoder, ours[0][row : row + 1, real], [mask[None]] * 3, positions)
        for layer in (0, 1):  # the last entry of hidden_states is normed
            near = rounding(expected[layer], layer + 1)
            torch.testing.assert_close(ours[layer + 1][row, real], expected[layer][0], **near)


@pytest.mark.parametrize("name", MASKS)
def test_change_of_the_last_image_token_reaches_the_queries_that_attend_to_it(name):
    """The test fails if the mask does not reach attention, a common silent bug."""
    model = tiny_models.model(name)
    ids, _ = tiny_models.ids("ttiiiitt")
    before, after = (tiny_models.states_after_bump(model, ids, bump) for bump in (0.0, 5.0))
    moved = [(a - b).abs().max(-1).values[0] for a, b in zip(after, before, strict=True)]
    is_image = [c == "i" for c in "ttiiiitt"]
    for query in range(8):
        sees = reference.allowed(name, is_image, query, 5)
        assert (moved[1][query] > 1e-3) == sees and (moved[1][query] == 0) == (not sees), query
    assert all(m[5] > 1e-3 for m in moved) and all(m[6] > 1e-3 for m in moved[1:])


def test_text_rows_stay_causal_under_bidirectional_attention():
    model = tiny_models.model("bidirectional")
    ids, _ = tiny_models.ids("tiiiittt")
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 90
    for a, b in zip(
        states(model, input_ids=ids, pixel_values=tiny_models.pixels(1)),
        states(model, input_ids=changed, pixel_values=tiny_models.pixels(1)),
        strict=True,
    ):
        assert torch.equal(a[:, :-1], b[:, :-1])


@pytest.mark.parametrize("name", MASKS)
def test_batch_equals_single(name):
    model, inputs = tiny_models.model(name), batch()
    together = model(**inputs).logits
    images = [2, 1, 0, 1]
    for row, count in enumerate(images):
        real = inputs["attention_mask"][row].bool()
        start = sum(images[:row])
        pixels = inputs["pixel_values"][start : start + count] if count else None
        alone = model(input_ids=inputs["input_ids"][row : row + 1, real], pixel_values=pixels).logits
        torch.testing.assert_close(together[row, real], alone[0], **rounding(alone, DEPTH))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_generation_with_any_cache_equals_recomputing_everything(name, attn_implementation):
    model, inputs = tiny_models.model(name, attn_implementation), batch("left")
    width, ids, mask = inputs["input_ids"].shape[1], inputs["input_ids"], inputs["attention_mask"]
    for _ in range(6):  # greedy decoding with one full forward per token
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[:, -1]
        ids, mask = torch.cat([ids, logits.argmax(-1)[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    expected = ids[:, width:]
    for kwargs in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        answer = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, **kwargs)[:, width:]
        assert torch.equal(answer, expected), kwargs


@pytest.mark.parametrize("name", ["bidirectional", "prefix"])
def test_generation_depends_on_the_mask(name):
    """If both generate and forward ignored the mask, the test above would pass."""
    inputs = batch("left")
    logits = [tiny_models.model(n)(**inputs).logits for n in ("causal", name)]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_save_and_load_keep_the_mask_and_the_logits(tmp_path):
    model, inputs = tiny_models.model("bidirectional"), batch()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["image_attention"] == "bidirectional"
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlavaBidirForConditionalGeneration"
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    code = {"modeling_llava_bidir.py", "attention.py"}  # for trust_remote_code, of fine-tunes and merged models, too
    assert code <= {file.name for file in tmp_path.iterdir()}


def test_images_after_cached_tokens_are_rejected():
    model = tiny_models.model("bidirectional")
    ids, _ = tiny_models.ids("tt")
    cache = model(input_ids=ids, use_cache=True).past_key_values
    later, _ = tiny_models.ids("iiii")
    with pytest.raises(ValueError, match="got images after cached tokens"):
        model(input_ids=later, pixel_values=tiny_models.pixels(1), past_key_values=cache)


def test_flash_attention_is_rejected_in_the_forward():
    model = tiny_models.model("bidirectional")
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    ids, _ = tiny_models.ids("tiiiit")
    with pytest.raises(ValueError, match="silently run as causal"):
        model(input_ids=ids, pixel_values=tiny_models.pixels(1))
