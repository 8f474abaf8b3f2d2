"""The prompts that AutoProcessor builds have the ids of training, for a SentencePiece tokenizer of Llama."""

import json
import shutil

import pytest
import tiny_models
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from llava_bidir.data.conversation import encode
from llava_bidir.model.build import build_processor

IMAGE = Image.new("RGB", (8, 8))


@pytest.fixture(
    scope="module",
    params=[None, True, False],
    ids=["as saved", "legacy", "not legacy"],
)
def processor(
    request,
    parts,
    llama_folder,
    tmp_path_factory,
):
    """The processor of an export, read by AutoProcessor."""
    folder = tmp_path_factory.mktemp("processor")
    shutil.copytree(llama_folder, folder / "llm")
    if request.param is not None:
        settings = json.loads((folder / "llm" / "tokenizer_config.json").read_text())
        (folder / "llm" / "tokenizer_config.json").write_text(
            json.dumps(settings | {"legacy": request.param})
        )
    build_processor(parts[0], str(folder / "llm")).save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


def message(role: str, text: str, has_image: bool) -> dict:
    content = [{"type": "image", "image": IMAGE}] * has_image + [{"type": "text", "text": text}]
    return {"role": role, "content": content}


# A question needs a letter: LLaVA drops the space after "USER:" of an empty one.
WORDS = st.text(st.sampled_from("ab A.\n\t  9é中<"), min_size=1, max_size=12).map(
    lambda text: f" {text}b\n"
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(WORDS, WORDS, st.booleans()), min_size=1, max_size=3))
@example(turns=[("What is it?", "", True)])
@example(
    turns=[
        ("What is it?", "A cat.", True),
        ("Why?\n\n  def f():", "Because.", False),
        ("And here?", "", True),
    ]
)
@example(turns=[("What is it?", "", False)])
def test_prompts_equal_the_ids_of_training_in_one_step_and_in_two(turns, processor):
    records = []
    messages = []
    for question, answer, has_image in turns:
        records += [("<image>\n" if has_image else "") + question, answer]
        messages += [message("user", question, has_image), message("assistant", answer, False)]
    # the prompt for the last answer
    records = records[:-1]
    messages = messages[:-1]
    has_images = any(has_image for _, _, has_image in turns)
    expected, _ = encode(
        tiny_models.turns(*records),
        processor.tokenizer,
        image_tokens=tiny_models.TOKENS if has_images else None,
        image_token_id=processor.image_token_id,
    )
    one_step = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    assert one_step["input_ids"][0] == expected
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [IMAGE for _, _, has_image in turns if has_image] or None
    assert processor(text=text, images=images)["input_ids"][0] == expected


def test_a_system_message_is_refused(processor):
    """LLaVA has one system prompt, and was trained with no other."""
    messages = [{"role": "system", "content": "Be brief."}, message("user", "Why?", False)]
    with pytest.raises(Exception, match="expected the roles user and assistant, got system"):
        processor.apply_chat_template(messages, add_generation_prompt=True)
