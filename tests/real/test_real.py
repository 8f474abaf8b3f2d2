"""A real language model, SmolLM2-135M-Instruct, through import, training and export.

What tiny models cannot show: a byte-level tokenizer of 49,152 tokens, 30 layers, tied embeddings, and language that
training must not change, or not by much. What does not depend on language is tested on the first two layers.
"""

import itertools
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from experiments.real.language import perplexity
from llava_bidir.data.conversation import IGNORE_INDEX, SYSTEM, encode
from llava_bidir.model.build import build_processor

pytestmark = pytest.mark.real

LAYERS = 30
WORDS = 49152
IMAGE_TOKENS = tiny_models.TOKENS


def greedy(model, tokenizer, text: str) -> str:
    ids = tokenizer(text, return_tensors="pt").input_ids
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8
    )
    return tokenizer.decode(said[0], skip_special_tokens=True)


def load(path: Path):
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()


# ---------------------------------------------------------------------------------------------------- language
def test_greedy_text_is_that_of_transformers_before_and_after_the_export(
    gguf_file, tokenizer, language_model, stages
):
    """The file by transformers' own reader, its import, and an MLLM whose adapter was trained on it."""
    text = "The capital of France is"
    folder, file = str(gguf_file.parent), gguf_file.name
    reader = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    expected = greedy(reader, AutoTokenizer.from_pretrained(folder, gguf_file=file), text)
    assert expected.startswith(f"{text} Paris")
    assert greedy(language_model, tokenizer, text) == expected
    exported, _ = stages
    assert (
        greedy(load(exported), AutoProcessor.from_pretrained(exported).tokenizer, text) == expected
    )


def test_stage_1_changes_no_bit_of_language_and_stage_2_little(language_model, tokenizer, stages):
    aligned, tuned = (load(path) for path in stages)
    before = perplexity(language_model, tokenizer, WORDS)
    assert perplexity(aligned, tokenizer, WORDS) == before
    after = perplexity(tuned, tokenizer, WORDS)
    assert after != before
    assert abs(after / before - 1) < 0.05, "three steps at LLaVA's rate of 2e-5"
    first, second = (net.model.multi_modal_projector.linear_1.weight for net in (aligned, tuned))
    assert not torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------- tokens
TEXT = st.text(st.sampled_from("ab c.:\n\t '9é中<"), max_size=12)


@pytest.fixture(scope="module", params=["chat", "vicuna_v1"])
def template(request, llm, encoder):
    """(name of a template, tokenizer of its processor)."""
    return request.param, build_processor(encoder, str(llm), template=request.param).tokenizer


@settings(max_examples=200)
@given(
    turns=st.lists(st.tuples(TEXT, TEXT.filter(bool)), min_size=1, max_size=3), shown=st.booleans()
)
@example(turns=[("What is it?", "\n\n\na cat"), (" a", " cat\n")], shown=True)
@example(turns=[("1 \n", "  10")], shown=True)
def test_ids_are_those_of_the_whole_text_and_supervised_ones_are_the_answers(
    template, turns, shown
):
    name, tokenizer = template
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    questions = [
        f"<image>\n{q.strip()}".strip() if shown and not i else q for i, (q, _) in enumerate(turns)
    ]
    answers = [answer for _, answer in turns]
    pairs = [text for pair in zip(questions, answers, strict=True) for text in pair]
    tokens = IMAGE_TOKENS if shown else None
    ids, labels = encode(
        tiny_models.turns(*pairs),
        tokenizer=tokenizer,
        template=name,
        image_tokens=tokens,
        image_token_id=image_id,
    )
    if name == "chat":
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": next(roles), "content": text} for text in pairs]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    else:
        whole = f"{SYSTEM} "  # without BOS, which this tokenizer does not add
        for question, answer in zip(questions, answers, strict=True):
            asked = f"USER: {question} ASSISTANT:" if question else "USER:ASSISTANT:"
            whole += f"{asked} {answer}<|im_end|>"
    expected = tokenizer(whole, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids).replace("<image>" * IMAGE_TOKENS, "<image>") == whole
    # under "chat", white space of an answer does not join that of its prompt
    if name == "vicuna_v1" or not any(answer[0].isspace() for answer in answers):
        repeats = ([token] * (IMAGE_TOKENS if token == image_id else 1) for token in expected)
        assert ids == [*itertools.chain(*repeats)]
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    runs = itertools.groupby(labels, lambda label: label != IGNORE_INDEX)
    texts = [tokenizer.decode(list(run)) for is_answer, run in runs if is_answer]
    for text, answer in zip(texts, answers, strict=True):
        whole = f"{' ' * (name == 'vicuna_v1')}{answer}<|im_end|>"
        # without the white space that joins the prompt's
        assert whole.endswith(text)
        assert not whole.removesuffix(text).strip()


# ---------------------------------------------------------------------------------------------------- masks
def test_the_mask_reaches_each_of_the_30_layers(stages):
    """Each layer, given its input, equals the same layer under a mask that is written out, and no other mask."""
    model = load(stages[0])
    processor = AutoProcessor.from_pretrained(stages[0])
    content = [{"type": "image"}, {"type": "text", "text": "What is in it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    image = Image.new("RGB", (8, 8), (90, 90, 90))
    inputs = processor(text=text, images=[image], return_tensors="pt")
    options = {"output_hidden_states": True, "use_cache": False}
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    places = torch.arange(len(is_image))
    causal = places[:, None] >= places
    masks = {"causal": causal, "bidirectional": causal | (is_image[:, None] & is_image)}
    llm = model.model.language_model
    assert int(is_image.sum()) == IMAGE_TOKENS
    assert len(llm.layers) == LAYERS
    with torch.no_grad():
        states = model(**inputs, **options).hidden_states
        rotary = llm.rotary_emb(states[0], places[None])
        for i, layer in enumerate(llm.layers):
            expected = states[i + 1][0, is_image]
            off = {}
            for name, mask in masks.items():
                mask = mask[None, None]
                output = layer(states[i], attention_mask=mask, position_embeddings=rotary)
                output = llm.norm(output) if i == LAYERS - 1 else output
                off[name] = (output[0, is_image] - expected).norm()
            assert off["bidirectional"] < 1e-5 * expected.norm(), f"layer {i + 1}: {off}"
            assert off["causal"] > 100 * off["bidirectional"], f"layer {i + 1}: {off}"


# ---------------------------------------------------------------------------------------------------- training
def test_embeddings_are_tied_after_resize_training_and_export(language_model, small_stages):
    words = language_model.get_input_embeddings().weight
    for path in small_stages:
        with safe_open(path / "model.safetensors", "pt") as file:
            assert not [name for name in file.keys() if "lm_head" in name]
        model = load(path)
        rows = model.get_input_embeddings().weight
        assert model.config.text_config.tie_word_embeddings
        assert model.get_output_embeddings().weight is rows
        assert len(rows) == 49216
        assert torch.equal(rows[:WORDS], words) == (path == small_stages[0])
        if path == small_stages[0]:
            assert (rows[WORDS:] == words.mean(0)).all()
