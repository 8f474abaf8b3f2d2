"""The template `chat`: ids of the complete text, supervised answers, and the prompts of exported models."""

import pytest
import tiny_models
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from llava_bidir.commands.generate import prompt_template
from llava_bidir.common.errors import UserError
from llava_bidir.data.conversation import IGNORE_INDEX, encode
from llava_bidir.model.build import build_processor

IMAGE_ID = 5
TOKENS = tiny_models.TOKENS
IMAGE = Image.new("RGB", (8, 8))
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LINES = CHATML.replace("m['content'] +", "(m['content'] | trim) +").replace(
    "}{% endfor", "}\n{% endfor"
)
INST = (
    "\n  {%- for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + ' <|im_end|>' }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "ChatML on lines, trimmed": LINES,
    "INST": INST,
}


def byte_level(template: str | None, **settings) -> PreTrainedTokenizerFast:
    """GPT-2's way: white space before a word joins it, and that before other white space does not."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unused>", "<pad>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
    )
    raw.train_from_iterator(
        ["a cat, \n\n\n  the wall\n\n is   it? user\n assistant\n system\n"] * 9, trainer
    )
    built = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        **settings,
    )
    built.add_special_tokens({"additional_special_tokens": special})
    built.chat_template = template
    return built


TOKENIZERS = {name: byte_level(template) for name, template in TEMPLATES.items()}
TEXT = st.text(st.sampled_from("ab c.\n\t '9é中<"), max_size=12)


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    turns=st.lists(st.tuples(TEXT, TEXT, st.booleans()), min_size=1, max_size=3),
    answered=st.booleans(),
)
@example(turns=[("What is it?", "\n\n\na cat", True), ("a", " cat\n", False)], answered=True)
@example(turns=[("", "\n", False)], answered=True)
@example(turns=[("", "", True), (" ", " ", False), ("\n", "a\n\n", False)], answered=True)
def test_ids_are_those_of_the_complete_text_and_answers_with_their_end_are_supervised(
    name, turns, answered
):
    tokenizer = TOKENIZERS[name]
    has_image = any(shown for *_, shown in turns)
    records = []
    messages = []
    for question, answer, shown in turns:
        shown_question = f"<image>\n{question.strip()}".strip()
        records += [f"{question}<image>" if shown else question, answer]
        messages += [{"role": "user", "content": shown_question if shown else question}]
        messages += [{"role": "assistant", "content": answer}]
    if not answered:
        records = records[:-1]
        messages = messages[:-1]
    is_prompt = not answered or messages[-1]["content"] == ""
    messages = messages[:-1] if answered and is_prompt else messages
    ids, labels = encode(
        tiny_models.turns(*records),
        tokenizer,
        "chat",
        TOKENS if has_image else None,
        IMAGE_ID,
    )

    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=is_prompt)["input_ids"]
    images = [[token] * (TOKENS if token == IMAGE_ID else 1) for token in expected]
    assert ids == sum(images, [])

    runs = []
    previous = IGNORE_INDEX
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        assert label in (IGNORE_INDEX, token)
        if label != IGNORE_INDEX:
            runs += [[]] * (previous == IGNORE_INDEX)
            runs[-1] = [*runs[-1], position]
        previous = label
    trimmed = name != "ChatML" and "trim" in TEMPLATES[name]
    answers = [
        m["content"].strip() if trimmed else m["content"]
        for m in messages
        if m["role"] == "assistant"
    ]
    answers = [answer for answer in answers if answer]
    end = " <|im_end|>" if name == "INST" else "<|im_end|>"
    texts = [tokenizer.decode([ids[i] for i in run]) for run in runs]
    assert len(texts) == len(answers)
    for text, answer in zip(texts, answers, strict=True):
        # White space that shares a token with the prompt's
        joined = (answer + end).removesuffix(text)
        assert (answer + end).endswith(text)
        assert not joined.strip()
        if not answer[0].isspace():
            assert text == answer + end


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_and_exported_processors_have_the_ids_of_training(name, parts, tmp_path):
    encoder, _ = parts
    TOKENIZERS[name].save_pretrained(tmp_path / "llm")
    build_processor(encoder, str(tmp_path / "llm"), template="chat").save_pretrained(
        tmp_path / "hf"
    )
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert prompt_template(processor) == "chat"

    def part(text, shown=False):
        return [{"type": "image", "image": IMAGE}] * shown + [{"type": "text", "text": text}]

    turns = [
        ("user", "What is it?", True),
        ("assistant", "a cat", False),
        ("user", "\n Why? ", False),
    ]
    messages = [{"role": role, "content": part(text, shown)} for role, text, shown in turns]
    records = tiny_models.turns("<image>\nWhat is it?", "a cat", "\n Why? ", "the wall")
    image_id = processor.image_token_id
    trained, labels = encode(
        records,
        TOKENIZERS[name],
        "chat",
        TOKENS,
        image_id,
    )
    prompt = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    prompt = prompt["input_ids"][0]
    assert (
        prompt
        == encode(
            records[:-1],
            processor.tokenizer,
            "chat",
            TOKENS,
            image_id,
        )[0]
    )
    assert prompt.count(image_id) == TOKENS
    assert prompt == trained[: len(prompt)]
    assert processor(
        text=processor.apply_chat_template(messages, add_generation_prompt=True), images=[IMAGE]
    )["input_ids"][0] == (prompt)
    assert labels[len(prompt)] == trained[len(prompt)]
    assert labels[len(prompt) - 1] == IGNORE_INDEX


def test_words_of_our_tokens_in_texts_are_text():
    tokenizer = TOKENIZERS["ChatML"]
    ids, _ = encode(
        tiny_models.turns("a <image> <pad>", "<pad>"),
        tokenizer,
        "chat",
        None,
        IMAGE_ID,
    )
    assert IMAGE_ID not in ids
    assert tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids).endswith(
        "user\na <image> <pad><|im_end|>\n<|im_start|>assistant\n<pad><|im_end|>\n"
    )


THINKING = CHATML.replace(
    "'\n' + m['content']",
    "'\n' + ('<think></think>' if loop.last and m['role'] == 'assistant' else '') + m['content']",
)


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "the LLM's tokenizer has no chat template; use data.template vicuna_v1"),
        ("{{ raise_exception('no') }}", "chat template of the LLM: TemplateError: no"),
        (
            THINKING,
            "writes '<think></think>the wall<.im_end.>.n' for the answer 'the wall'; expected the answer and the end",
        ),
        (
            CHATML.replace("<|im_end|>", "<|endoftext|>"),
            "expected the answer and the end token '<.im_end.>'",
        ),
        (
            INST.replace("[/INST]", "[/INST]: ").replace(" <|im", "<|im"),
            "ends inside a token before 'the wall",
        ),
        ("{{ messages | length }}", "writes a turn differently if others follow it"),
    ],
)
def test_templates_whose_answers_cannot_be_found_are_errors(template, message):
    with pytest.raises(UserError, match=message):
        encode(
            tiny_models.turns("What is it?", "the wall"),
            byte_level(template),
            "chat",
            None,
            IMAGE_ID,
        )


def test_a_tokenizer_that_begins_texts_unlike_its_template_is_an_error(parts):
    changed = byte_level(CHATML)
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    with pytest.raises(UserError, match="begins texts with a token that its chat template lacks"):
        encode(
            tiny_models.turns("What is it?", "a cat"),
            changed,
            "chat",
            None,
            IMAGE_ID,
        )
    with pytest.raises(UserError, match="has no chat template; use vicuna_v1"):
        build_processor(*parts, template="chat")
