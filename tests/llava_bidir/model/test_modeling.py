"""The model: causal equals stock LLaVA, the mask reaches attention, generation equals full forwards."""

import inspect

import pytest
import reference
import tiny_models
import torch
from tiny_llms import SLIDING_LLMS, WINDOW
from tolerances import rounding
from transformers import LlavaForConditionalGeneration

from llava_bidir import IMAGE_ATTENTION, LlavaBidirForConditionalGeneration
from llava_bidir.model import modeling_llava_bidir
from llava_bidir.model.modeling_llava_bidir import FULL, SLIDING

pytestmark = pytest.mark.numerics

MASKS = tuple(IMAGE_ATTENTION)
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
            decoder,
            inputs=ours[0][row : row + 1, real],
            masks=[mask[None]] * 3,
            positions=positions,
        )
        for layer in (0, 1):  # the last entry of hidden_states is normed
            near = rounding(expected[layer], layer + 1)
            torch.testing.assert_close(ours[layer + 1][row, real], expected[layer][0], **near)


@pytest.mark.parametrize("llm", ["llama", "gemma3"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_mask_of_the_callers_equals_the_models_own(backend, name, llm):
    """As booleans, as floats, and in a dict of kinds of layers; eager attention would add True to the scores as 1."""
    settings = {"text_config": SLIDING_LLMS["gemma3"]} if llm == "gemma3" else {}
    model = tiny_models.model(name, backend, **settings)
    ids, padding = tiny_models.ids("tiiiittiiiitt")
    inputs = {"input_ids": ids, "pixel_values": tiny_models.pixels(2)}
    mask = reference.mask_by_loop(name, ids == tiny_models.IMAGE_ID, padding)[:, None]
    masks = [mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)]
    if settings:
        masks = [{FULL: mask, SLIDING: mask & torch.ones_like(mask).triu(1 - WINDOW)}]
    expected = model(**inputs).logits
    for given in masks:
        logits = model(**inputs, attention_mask=given).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_mask_of_integers_is_refused(backend):
    model = tiny_models.model("bidirectional", backend)
    ids, _ = tiny_models.ids("tttt")
    mask = torch.ones(1, 1, 4, 4, dtype=torch.long).tril()
    with pytest.raises(ValueError, match="attention_mask is torch.int64 .* expected booleans"):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_images_after_cached_tokens_are_rejected(name):
    """By its present name, and by that in earlier versions of transformers."""
    model = tiny_models.model("bidirectional")
    ids, _ = tiny_models.ids("tt")
    cache = model(input_ids=ids, use_cache=True).cache
    later, _ = tiny_models.ids("iiii")
    with pytest.raises(ValueError, match="got images after cached tokens"):
        model(input_ids=later, pixel_values=tiny_models.pixels(1), **{name: cache})


@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_positions_that_restart_within_a_row_are_refused(name):
    """transformers separates samples of a row in some backends and caches, and mixes them in others."""
    model = tiny_models.model(name)
    ids, _ = tiny_models.ids("tiiiittttt")
    inputs = {"input_ids": ids, "pixel_values": tiny_models.pixels(1)}
    one = torch.arange(10)[None]
    packed = torch.cat([one[:, :7], one[:, :3]], 1)
    with pytest.raises(ValueError, match="position_ids restart within a row; pass one"):
        model(**inputs, position_ids=packed)
    assert torch.equal(model(**inputs, position_ids=one).logits, model(**inputs).logits)


def test_forward_names_every_parameter_of_the_parents():
    """generate() reads the signature to decide what it passes; a missing name changes results without an error."""
    ours, stock = (
        set(inspect.signature(cls.forward).parameters)
        for cls in (LlavaBidirForConditionalGeneration, LlavaForConditionalGeneration)
    )
    assert stock <= ours, f"forward does not name {stock - ours}"


@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_an_image_token_in_an_answer_is_text(name):
    model = tiny_models.model(name)
    ids, _ = tiny_models.ids("ttiiiitt")
    pixels = tiny_models.pixels(1)
    out = model.generate(
        input_ids=ids,
        pixel_values=pixels,
        max_new_tokens=5,
        do_sample=False,
        sequence_bias=[[[tiny_models.IMAGE_ID], 1e4]],
        return_dict_in_generate=True,
        output_logits=True,
    )
    answer = out.sequences[:, 8:]
    assert answer.tolist() == [[tiny_models.IMAGE_ID] * 5]
    is_image = torch.cat([ids == tiny_models.IMAGE_ID, torch.zeros(1, 5, dtype=torch.bool)], 1)
    embedded = model.get_input_embeddings()(out.sequences)
    embedded[is_image] = torch.cat(list(model.get_image_features(pixels).pooler_output))
    states = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=reference.mask_by_loop(name, is_image, torch.ones_like(is_image))[:, None],
        use_cache=False,
    ).last_hidden_state
    expected = model.lm_head(states[:, -6:-1])
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MASKS)
def test_embeddings_that_may_contain_images_are_causal_with_a_warning(name, monkeypatch):
    """Features that a caller merged cannot be told from text; a mask of the caller's own says what they are."""
    model = tiny_models.model(name)
    warnings = []
    monkeypatch.setattr(modeling_llava_bidir.logger, "warning_once", warnings.append)
    embedded = model.get_input_embeddings()(torch.arange(6)[None])
    model(inputs_embeds=embedded, attention_mask=torch.ones(1, 1, 1, 6).bool())
    assert not warnings
    model(inputs_embeds=embedded)
    assert ["pass a 4D attention_mask" in text for text in warnings] == [True] * (name != "causal")
