"""The template `chat`: its text in pieces, supervised answers; prompts of exported models with any template."""

import itertools
import json
import shutil

import pytest
import tiny_models
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast

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
TEMPLATES = {"ChatML": CHATML, "ChatML on lines, trimmed": LINES, "INST": INST}


def byte_level(template: str | None, **settings) -> PreTrainedTokenizerFast:
    """GPT-2's way: white space before a word joins it, and that before other white space does not."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unused>", "<pad>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special
    )
    raw.train_from_iterator(
        ["a cat, \n\n\n  the wall\n\n is   it? user\n assistant\n system\n"] * 9, trainer
    )
    built = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<pad>", **settings
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
@example(turns=[("", "", True), (" ", " ", False), ("\n", "a\n\n", False)], answered=True)
def test_pieces_are_the_complete_text_and_answers_with_their_end_are_supervised(
    name, turns, answered
):
    """Ids are those of the complete text, too, where no white space of an answer joins that of its prompt."""
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
        tokenizer=tokenizer,
        template="chat",
        image_tokens=TOKENS if has_image else None,
        image_token_id=IMAGE_ID,
    )
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)
    assert tokenizer.decode(ids).replace("<image>" * TOKENS, "<image>") == text
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not any(answer[:1].isspace() for answer in answers):
        expected = tokenizer.encode(text, add_special_tokens=False)
        assert ids == [
            i for token in expected for i in [token] * (TOKENS if token == IMAGE_ID else 1)
        ]

    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    runs = itertools.groupby(labels, lambda label: label != IGNORE_INDEX)
    trained = [tokenizer.decode([*run]) for is_trained, run in runs if is_trained]
    if name != "ChatML" and "trim" in TEMPLATES[name]:
        answers = [answer.strip() for answer in answers]
    end = " <|im_end|>" if name == "INST" else "<|im_end|>"
    assert trained == [answer + end for answer in answers if answer]


@pytest.fixture(scope="module", params=["vicuna", "legacy", "not legacy", *TEMPLATES])
def processor(request, parts, llama_folder, tmp_path_factory):
    """Return the processor of an export, as AutoProcessor reads it, and the template of its training."""
    folder = tmp_path_factory.mktemp("processor")
    llm = folder / "llm"
    template = "vicuna_v1"
    if request.param in TEMPLATES:
        TOKENIZERS[request.param].save_pretrained(llm)
        template = "chat"
    else:
        shutil.copytree(llama_folder, llm)
    if "legacy" in request.param:
        settings = json.loads((llm / "tokenizer_config.json").read_text())
        settings["legacy"] = request.param == "legacy"
        (llm / "tokenizer_config.json").write_text(json.dumps(settings))
    build_processor(parts[0], str(llm), template=template).save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder), template


def message(role: str, text: str, has_image: bool) -> dict:
    content = [{"type": "image", "image": IMAGE}] * has_image + [{"type": "text", "text": text}]
    return {"role": role, "content": content}


# A question needs a letter: LLaVA drops the space after "USER:" of an empty one.
WORDS = st.text(st.sampled_from("ab A.\n\t  9é中<"), min_size=1, max_size=12).map(
    lambda text: f" {text}b\n"
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(turns=st.lists(st.tuples(WORDS, WORDS, st.booleans()), min_size=1, max_size=3))
@example(turns=[("What is it?", "", False)])
@example(turns=[("Is it?", "A cat.", True), ("Why?\n\n  def f():", "A.", False), ("b", "", True)])
def test_prompts_of_exports_have_the_ids_of_training_in_one_step_and_in_two(turns, processor):
    """Under `chat`, white space in front of an answer is a token of its own."""
    processor, template = processor
    records = []
    messages = []
    for question, answer, has_image in turns:
        answer = answer.strip() if template == "chat" else answer
        records += [("<image>\n" if has_image else "") + question, answer]
        messages += [message("user", question, has_image), message("assistant", answer, False)]
    images = [IMAGE for _, _, has_image in turns if has_image] or None
    expected, _ = encode(
        tiny_models.turns(*records[:-1]),
        tokenizer=processor.tokenizer,
        template=template,
        image_tokens=TOKENS if images else None,
        image_token_id=processor.image_token_id,
    )
    options = {"add_generation_prompt": True}
    in_one = processor.apply_chat_template(
        messages[:-1], tokenize=True, return_dict=True, **options
    )
    assert in_one["input_ids"][0] == expected
    text = processor.apply_chat_template(messages[:-1], **options)
    assert processor(text=text, images=images)["input_ids"][0] == expected


@pytest.mark.parametrize("processor", ["vicuna"], indirect=True)
def test_a_system_message_is_refused(processor):
    """LLaVA has one system prompt, and was trained with no other."""
    messages = [{"role": "system", "content": "Be brief."}, message("user", "Why?", False)]
    with pytest.raises(Exception, match="expected the roles user and assistant, got system"):
        processor[0].apply_chat_template(messages, add_generation_prompt=True)


def test_words_of_our_tokens_in_texts_are_text():
    tokenizer = TOKENIZERS["ChatML"]
    turns = tiny_models.turns("a <image> <pad>", "<pad>")
    ids, _ = encode(
        turns, tokenizer=tokenizer, template="chat", image_tokens=None, image_token_id=IMAGE_ID
    )
    assert not {IMAGE_ID, tokenizer.pad_token_id} & {*ids}
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
        ("{{ raise_exception('no') }}", "chat template of the LLM: TemplateError: no"),
        (
            THINKING,
            "writes '<think></think>the wall' for the answer 'the wall'; expected the answer and the end",
        ),
        (
            CHATML.replace("<|im_end|>", "<|endoftext|>"),
            "expected the answer and the end token '<.im_end.>'",
        ),
        ("{{ messages | length }}", "writes a turn differently if others follow it"),
    ],
)
def test_templates_whose_answers_cannot_be_found_are_errors(template, message):
    turns = tiny_models.turns("What is it?", "the wall")
    with pytest.raises(UserError, match=message):
        encode(
            turns,
            tokenizer=byte_level(template),
            template="chat",
            image_tokens=None,
            image_token_id=IMAGE_ID,
        )


def test_an_llm_without_a_chat_template_is_an_error(parts):
    with pytest.raises(UserError, match="data.template chat: .*tokenizer.chat_template is not set"):
        build_processor(*parts, template="chat")
