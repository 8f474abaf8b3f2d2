"""Answers of every family on a tiny random model, against the stock model's own generation and forward."""

import dataclasses
from contextlib import contextmanager

import pytest
import tiny_families
import torch
from interventions import ANSWERS, HELLO, QUESTIONS, pictures, possible, spoken
from stock_answers import StockModel
from tiny_families import IMAGE_ID, STOCK, asked_ids
from tolerances import rounding

import probes

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("small_squares")]

ALL = sorted(STOCK)
MASKABLE = [name for name in ALL if STOCK[name].masks]
DEPTH = 3 + 3 + 1  # encoder and adapter, layers, word head


@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    loaded = {}

    def load(name: str):
        if name not in loaded:
            folder = tiny_families.write(name, tmp_path_factory.mktemp(name))
            loaded[name] = probes.load(str(folder))
            loaded[name].chat.tokenizer.decode = lambda ids, **_: spoken(ids)
        return loaded[name]

    return load


@pytest.mark.parametrize("name", ALL)
def test_greedy_answers_equal_the_stock_models_generation(name, mllm):
    """Of each of two images; the stock model generates for both at once, with its own cache and positions."""
    read = mllm(name)
    images = pictures(name)
    for text, question in QUESTIONS.items():
        ids, _ = asked_ids(name, question)
        assert [*read.ids[0].tolist(), *read.chat.question_ids(text)] == ids.tolist()
        expected = StockModel(name, read.model, images).generate(question, 4)
        answers = read.answer(images, text, max_new_tokens=4)
        assert answers == [spoken(tokens) for tokens in expected]
        assert any(answers), "nothing is compared with nothing"


@pytest.mark.parametrize("name", ALL)
def test_scores_equal_the_stock_forward_with_masks_and_states_written_out(name, mllm):
    """Of two images, two questions and two answers, as they are and under knockouts and hooks."""
    read = mllm(name)
    images = pictures(name)
    pixels = read.preprocess(images)
    stock = StockModel(name, read.model, images)
    answers = read.chat.answer_ids(ANSWERS)
    scores = {}
    for kind, (arguments, change) in possible(name, len(images)).items():
        alone = [read.answer_log_probs(pixels, text, ANSWERS, **arguments) for text in QUESTIONS]
        scores[kind] = torch.stack(alone, 1)
        for row, question in enumerate(QUESTIONS.values()):
            for column, answer in enumerate(answers):
                expected = stock.score(question, answer, change)
                found = scores[kind][:, row, column]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
                if kind == "none":  # the written masks are the model's own
                    own = stock.score(question, answer)
                    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
    for kind, score in scores.items():
        if kind != "none":
            assert (score - scores["none"]).abs().amax((1, 2)).min() > 1e-4, f"{kind} does nothing"


def test_answers_of_a_soft_capped_llm_that_runs_eagerly(tmp_path, monkeypatch):
    """PaliGemma 2: transformers has no sdpa for Gemma 2, so that masks are added to its scores."""
    text = {"model_type": "gemma2", **tiny_families.LLM, "attn_logit_softcapping": 2.0}
    config = STOCK["paligemma"].config | {"text_config": text}
    monkeypatch.setitem(STOCK, "paligemma", dataclasses.replace(STOCK["paligemma"], config=config))
    read = probes.load(str(tiny_families.write("paligemma", tmp_path, "eager")))
    read.chat.tokenizer.decode = lambda ids, **_: spoken(ids)
    images = pictures("paligemma")
    stock = StockModel("paligemma", read.model, images)
    expected = [spoken(tokens) for tokens in stock.generate([HELLO], 4)]
    assert read.answer(images, "hello", max_new_tokens=4) == expected
    (answer,) = read.chat.answer_ids(["hello"])
    pixels = read.preprocess(images)
    scores = []
    for arguments, change in possible("paligemma", len(images)).values():
        scores.append(read.answer_log_probs(pixels, "hello", ["hello"], **arguments)[:, 0])
        expected = stock.score([HELLO], answer, change)
        torch.testing.assert_close(scores[-1], expected, rtol=1e-5, atol=1e-5)
    assert len({tuple(score.tolist()) for score in scores}) == len(scores), "each does something"


@pytest.mark.parametrize("name", ALL)
def test_cached_answers_equal_uncached_ones(name, mllm):
    read = mllm(name)
    images = pictures(name, 1)
    stock = StockModel(name, read.model, images)
    answers = {}
    with never_generated(read, IMAGE_ID):
        for kind, (arguments, change) in possible(name, 1).items():
            answers[kind] = read.answer(images[0], "hello", max_new_tokens=4, **arguments)
            assert answers[kind] == spoken(stock.generate_uncached([HELLO], 4, change)), kind
    assert len({*answers.values()}) > 1


@contextmanager
def never_generated(read, token: int):
    """Set a token's logit to 0: an uncached forward would take a placeholder for a part of the image."""
    row = read.model.get_output_embeddings().weight.data[token]
    kept = row.clone()
    row.zero_()
    try:
        yield
    finally:
        row.copy_(kept)


@pytest.mark.parametrize("name", MASKABLE)
def test_attention_of_an_answer_equals_eager_attention(name, mllm):
    read = mllm(name)
    images = pictures(name, 1)
    by_layer = read.answer_attention(
        read.preprocess(images), "hello", "hellohello", average_heads=False
    )
    weights = torch.cat([*by_layer.values()])
    (answer,) = read.chat.answer_ids(["hellohello"])
    expected = StockModel(name, read.model, images).attention([HELLO], answer)
    torch.testing.assert_close(weights, expected, **rounding(expected, DEPTH))
    assert (weights.sum(-1) <= 1 + 1e-5).all()
    assert (weights.sum(-1) > 0).any()
