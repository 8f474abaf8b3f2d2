"""Generation against forwards of stock LLaVA without a cache, under masks from a loop over pairs of tokens."""

import inspect

import pytest
import reference
import tiny_models
import torch
from transformers import LlavaForConditionalGeneration

from llava_bidir import IMAGE_ATTENTION, LlavaBidirForConditionalGeneration
from llava_bidir.model import modeling_llava_bidir

MASKS = tuple(IMAGE_ATTENTION)
NEW = 5
# rows with two, one and no images; each row has other images
ROWS = ("tiiiittiiiitt", "ttiiiittt", "tttt")
IMAGES = (2, 1, 0)
GREEDY = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "eos_token_id": None,
    "suppress_tokens": [tiny_models.IMAGE_ID],
}
DETAILS = {
    "return_dict_in_generate": True,
    "output_logits": True,
    "output_scores": True,
}


def batch() -> dict:
    ids, mask = tiny_models.ids(*ROWS, pad="left")
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": tiny_models.pixels(sum(IMAGES)),
    }


@torch.no_grad()
def stock_logits(
    model,
    inputs: dict,
    answers: torch.Tensor,
    row: int,
    prompt: int,
) -> torch.Tensor:
    """Return the logits f[NEW, V] of the answer in `answers[row]` to a prompt, from one forward without a cache."""
    padding = torch.cat(
        [inputs["attention_mask"][prompt], torch.ones(NEW, dtype=torch.long)]
    ).bool()
    ids = answers[row][padding][None]
    mask = reference.mask_by_loop(
        model.config.image_attention, ids == tiny_models.IMAGE_ID, torch.ones_like(ids)
    )
    start = sum(IMAGES[:prompt])
    pixels = inputs["pixel_values"][start : start + IMAGES[prompt]] if IMAGES[prompt] else None
    out = tiny_models.stock(model)(
        input_ids=ids,
        attention_mask=mask[:, None],
        pixel_values=pixels,
        use_cache=False,
    )
    return out.logits[0, -NEW - 1 : -1]


def test_forward_names_every_parameter_of_the_parents():
    """generate() reads the signature to decide what it passes; a missing name changes results without an error."""
    ours, stock = (
        set(inspect.signature(cls.forward).parameters)
        for cls in (LlavaBidirForConditionalGeneration, LlavaForConditionalGeneration)
    )
    assert stock <= ours, f"forward does not name {stock - ours}"


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    "cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_beams_score_answers_about_the_images_of_their_prompt(name, cache):
    model = tiny_models.model(name)
    inputs = batch()
    out = model.generate(
        **inputs,
        **GREEDY,
        **DETAILS,
        **cache,
        num_beams=3,
        num_return_sequences=2,
    )
    for row in range(2 * len(ROWS)):
        logits = stock_logits(
            model,
            inputs,
            out.sequences,
            row,
            row // 2,
        )
        score = logits.log_softmax(-1).gather(1, out.sequences[row, -NEW:, None]).mean()
        torch.testing.assert_close(out.sequences_scores[row], score, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MASKS)
def test_an_image_token_in_an_answer_is_text(name):
    model = tiny_models.model(name)
    ids, _ = tiny_models.ids("ttiiiitt")
    pixels = tiny_models.pixels(1)
    forced = GREEDY | {"suppress_tokens": None, "sequence_bias": [[[tiny_models.IMAGE_ID], 1e4]]}
    out = model.generate(
        input_ids=ids,
        pixel_values=pixels,
        **forced,
        **DETAILS,
    )
    assert (out.sequences[:, -NEW:] == tiny_models.IMAGE_ID).all()
    embed = model.get_input_embeddings()
    prompt = embed(ids).masked_scatter(
        (ids == tiny_models.IMAGE_ID)[..., None],
        torch.cat(model.get_image_features(pixels).pooler_output),
    )
    answer = torch.full((1, NEW), tiny_models.IMAGE_ID)
    is_image = torch.cat(
        [ids == tiny_models.IMAGE_ID, torch.zeros_like(answer, dtype=torch.bool)], 1
    )
    states = model.model.language_model(
        inputs_embeds=torch.cat([prompt, embed(answer)], 1),
        attention_mask=reference.mask_by_loop(name, is_image, torch.ones_like(is_image))[:, None],
        use_cache=False,
    ).last_hidden_state
    expected = model.lm_head(states[:, -NEW - 1 : -1])
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MASKS)
def test_embeddings_that_may_contain_images_are_causal_with_a_warning(name, monkeypatch):
    """Features that a caller merged cannot be told from text; a mask of the caller's own says what they are."""
    model = tiny_models.model(name)
    inputs = batch()
    warnings = []
    monkeypatch.setattr(modeling_llava_bidir.logger, "warning_once", warnings.append)
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    model(**embedded, attention_mask=torch.ones(*inputs["input_ids"].shape)[:, None, None].bool())
    assert not warnings
    model(**embedded)
    assert ["pass a 4D attention_mask" in text for text in warnings] == [True] * (name != "causal")
