"""Answers under a knockout against uncached forwards with the mask written out, and against stock transformers."""

import copy

import pytest
import reference
import tiny_models
import torch
from tolerances import rounding

import probes
from probes import Knockout

pytestmark = pytest.mark.numerics

MASKS = ("causal", "bidirectional", "prefix")
QUESTIONS = ["name the sky", "wall", "road of the rest", "a", "it and sky"]
ANSWERS = ["sky wall", "road", "name this road of the rest", "sky"]
BLOCKED = torch.tensor([[False, True, False, True]])
KNOCKOUTS = {
    "none": None,
    "all layers": Knockout(BLOCKED),
    "one layer": Knockout(BLOCKED, [2]),
}


@pytest.fixture(scope="module", params=MASKS)
def mllm(request, checkpoints):
    """A model whose attention is sharp and outweighs the residual stream, so that a knockout changes its answers."""
    loaded = probes.load(str(checkpoints[request.param]))
    with torch.no_grad():
        for layer in loaded.decoder.layers:
            layer.self_attn.q_proj.weight *= 2
            layer.self_attn.v_proj.weight *= 8
            layer.self_attn.o_proj.weight *= 8
    return loaded


@pytest.fixture
def picture(pictures):
    return pictures[0]


def written_out_masks(mllm, length: int, knockout: Knockout | None) -> list[torch.Tensor]:
    """Masks of prefix, image and text, bool[1, N, N] per layer, without pairs of image tokens that are cut."""
    first = mllm.prefix_ids.shape[1]
    image = range(first, first + tiny_models.TOKENS)

    def gone(layer, q, k) -> bool:
        if knockout is None or (knockout.layers is not None and layer not in knockout.layers):
            return False
        return q in image and k in image and bool(knockout.blocked[0, k - first])

    return reference.masks_by_layer(mllm, length, gone)


def next_logits(
    mllm,
    pixels,
    text: list[int],
    knockout: Knockout | None,
) -> torch.Tensor:
    """Logits after the text, by an attention written out over prefix, image and text, without a cache."""
    masks = written_out_masks(mllm, mllm.ids.shape[1] + len(text), knockout)
    states = reference.uncached_states(mllm, pixels, text, masks)
    return mllm.model.lm_head(mllm.decoder.norm(states[-1][0, -1]))


def answer_by_loop(
    mllm,
    pixels,
    question: str,
    knockout: Knockout | None,
    max_new_tokens: int,
) -> str:
    ids = mllm.chat.question_ids(question)
    tokens = []
    while len(tokens) < max_new_tokens:
        token = int(next_logits(mllm, pixels, ids + tokens, knockout).argmax())
        if token == mllm.model.generation_config.eos_token_id:
            break
        tokens.append(token)
    return mllm.chat.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_generation_equals_uncached_forwards_with_the_mask_written_out(mllm, picture):
    pixels = mllm.preprocess([picture])
    answers = {}
    for name, knockout in KNOCKOUTS.items():
        answers[name] = [
            mllm.answer(picture, question, knockout, max_new_tokens=4) for question in QUESTIONS
        ]
        assert answers[name] == [
            answer_by_loop(mllm, pixels, question, knockout, 4) for question in QUESTIONS
        ]
    assert answers["all layers"] != answers["none"]


@pytest.mark.parametrize("knockout", KNOCKOUTS.values(), ids=KNOCKOUTS)
def test_attention_of_an_answer_equals_eager_attention_without_a_cache(mllm, picture, knockout):
    """A token's weights are those of the position that predicts it, in the stock decoder's own output."""
    pixels = mllm.preprocess([picture])
    prefix = mllm.prefix_ids.shape[1]
    by_layer = mllm.answer_attention(
        pixels, QUESTIONS[0], ANSWERS[2], knockout=knockout, average_heads=False
    )
    weights = torch.cat([*by_layer.values()])
    question, (answer,) = mllm.chat.question_ids(QUESTIONS[0]), mllm.chat.answer_ids([ANSWERS[2]])
    decoder = copy.deepcopy(mllm.decoder)
    decoder.config._attn_implementation = "eager"
    embed = decoder.embed_tokens
    image = mllm.states(pixels, ["adapter"])["adapter"]
    inputs = torch.cat([embed(mllm.prefix_ids), image, embed(torch.tensor([question + answer]))], 1)
    masks = [mask[None] for mask in written_out_masks(mllm, inputs.shape[1], knockout)]
    for layer, mask in zip(decoder.layers, masks, strict=True):
        added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, added=added: (args, kwargs | {"attention_mask": added}),
            with_kwargs=True,
        )
    with torch.no_grad():
        full = decoder(
            inputs_embeds=inputs,
            output_attentions=True,
            use_cache=False,
        ).attentions
    first = prefix + tiny_models.TOKENS + len(question) - 1
    expected = torch.cat(full)[
        :, :, first : first + len(answer), prefix : prefix + tiny_models.TOKENS
    ]
    torch.testing.assert_close(weights, expected, **rounding(expected, len(mllm.decoder.layers)))
    averaged = mllm.answer_attention(pixels, QUESTIONS[0], ANSWERS[2], ["layer_03"], knockout)
    torch.testing.assert_close(averaged["layer_03"], weights[2:].mean(1))
    assert len(answer) > 3
    assert (expected[:, :, 1:] - expected[:, :, :-1]).abs().amax((1, 3)).min() > 1e-3, (
        "tokens differ"
    )


def test_tokens_are_reported_while_the_answer_grows_and_a_stop_leaves_no_hooks(mllm, picture):
    asked = picture, QUESTIONS[1], KNOCKOUTS["all layers"]
    plain = mllm.answer(*asked[:2], max_new_tokens=5)
    shown = []
    answer = mllm.answer(*asked, 5, on_token=shown.append)
    assert shown == [mllm.answer(*asked, n) for n in range(1, len(shown) + 1)]
    assert shown[-1] == answer
    assert len(shown) > 1

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mllm.answer(*asked, 5, on_token=stop)
    assert mllm.answer(*asked[:2], max_new_tokens=5) == plain
