"""A real language model, SmolLM2-135M-Instruct, through import, training and export.

What tiny models cannot show: a byte-level tokenizer of 49,152 tokens, 30 layers, tied embeddings, and language that
training must not change, or not by much. What does not depend on language is tested on the first two layers.
"""

from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from experiments.real.language import perplexity
from llava_bidir.cli import main
from llava_bidir.data.conversation import IGNORE_INDEX, SYSTEM, encode
from llava_bidir.model.build import build_processor

pytestmark = pytest.mark.real

LAYERS = 30
WORDS = 49152
IMAGE_TOKENS = tiny_models.TOKENS
EMBEDDING = "model.language_model.embed_tokens.weight"


def greedy(model, tokenizer, text: str) -> str:
    ids = tokenizer(text, return_tensors="pt").input_ids
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=8,
    )
    return tokenizer.decode(said[0], skip_special_tokens=True)


def load(path: Path):
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()


def prompt(path: Path, images: int = 1) -> dict[str, torch.Tensor]:
    """Return ids and pixels of a question about a grey image, by the exported processor."""
    processor = AutoProcessor.from_pretrained(path)
    image = Image.new("RGB", (8, 8), (90, 90, 90))
    content = [{"type": "image", "image": image}] * images + [
        {"type": "text", "text": "What is in it?"}
    ]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return processor(
        text=text,
        images=[image] * images,
        return_tensors="pt",
    )


# ---------------------------------------------------------------------------------------------------- language
def test_greedy_text_is_that_of_transformers_before_and_after_the_export(
    gguf_file,
    llm,
    language_model,
    stages,
):
    """The file by transformers' own reader, its import, and an MLLM whose adapter was trained on it."""
    source = {
        "pretrained_model_name_or_path": str(gguf_file.parent),
        "gguf_file": gguf_file.name,
    }
    text = "The capital of France is"
    reader = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    expected = greedy(reader, AutoTokenizer.from_pretrained(**source), text)
    assert expected.startswith(f"{text} Paris")
    assert greedy(language_model, AutoTokenizer.from_pretrained(llm), text) == expected
    exported, _ = stages
    tokenizer = AutoProcessor.from_pretrained(exported).tokenizer
    assert greedy(load(exported), tokenizer, text) == expected


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
    turns=st.lists(st.tuples(TEXT, TEXT.filter(bool)), min_size=1, max_size=3),
    shown=st.booleans(),
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
    ids, labels = encode(
        tiny_models.turns(*pairs),
        tokenizer,
        name,
        IMAGE_TOKENS if shown else None,
        image_id,
    )
    if name == "chat":
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(pairs)]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    else:
        rounds = [
            f"{f'USER: {question} ASSISTANT:' if question else 'USER:ASSISTANT:'} {answer}<|im_end|>"
            for question, answer in zip(questions, answers, strict=True)
        ]
        whole = f"{SYSTEM} " + "".join(rounds)  # without BOS, which this tokenizer does not add
    expected = tokenizer(whole, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids).replace("<image>" * IMAGE_TOKENS, "<image>") == whole
    # under "chat", white space of an answer does not join that of its prompt
    if name == "vicuna_v1" or not any(answer[0].isspace() for answer in answers):
        assert ids == sum(
            ([token] * (IMAGE_TOKENS if token == image_id else 1) for token in expected),
            [],
        )

    spans = []
    previous = IGNORE_INDEX
    for token, label in zip(ids, labels, strict=True):
        assert label in (IGNORE_INDEX, token)
        if label != IGNORE_INDEX:
            spans += [[]] * (previous == IGNORE_INDEX)
            spans[-1] = [*spans[-1], token]
        previous = label
    texts = [tokenizer.decode(span) for span in spans]
    wanted = [f"{' ' * (name == 'vicuna_v1')}{answer}<|im_end|>" for answer in answers]
    assert len(texts) == len(wanted)
    for text, answer in zip(texts, wanted, strict=True):
        # Space that joins the prompt's
        assert answer.endswith(text)
        assert not answer.removesuffix(text).strip()


# ---------------------------------------------------------------------------------------------------- masks
def test_the_mask_reaches_each_of_the_30_layers(stages):
    """Each layer, given its input, equals the same layer under a mask that is written out, and no other mask."""
    model = load(stages[0])
    inputs = prompt(stages[0])
    options = {"output_hidden_states": True, "use_cache": False}
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    places = torch.arange(len(is_image))
    causal = places[:, None] >= places
    masks = {
        "causal": causal,
        "bidirectional": causal | (is_image[:, None] & is_image),
    }
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
                output = layer(
                    states[i],
                    attention_mask=mask[None, None],
                    position_embeddings=rotary,
                )
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


def test_low_rank_updates_are_merged_and_leave_the_embeddings(
    small_stage2_options, small_stages, tmp_path
):
    more = "--model.lora.r 4 --model.lora.alpha 8 --model.lora.dropout 0"
    more += " --model.learning_rate 1e-2 --trainer.max_steps 2"
    more += " --model.frozen_dtype bfloat16 --trainer.precision bf16-mixed"
    main(small_stage2_options(tmp_path / "run", *more.split()))
    before = load_file(small_stages[0] / "model.safetensors")
    after = load_file(tmp_path / "run/hf/model.safetensors")
    assert before.keys() == after.keys()
    for weights in (
        before,
        after,
    ):  # rows of added tokens are means of the others, of their dtype
        weights[EMBEDDING] = weights[EMBEDDING][:WORDS]
    changed = {
        name
        for name, weight in before.items()
        if not weight.bfloat16().equal(after[name].bfloat16())
    }
    llm = {name for name in changed if ".language_model." in name}
    assert llm
    assert EMBEDDING not in changed
    assert all(name.endswith("proj.weight") for name in llm)
