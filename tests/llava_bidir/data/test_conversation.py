"""Ids and labels of conversations, against LLaVA's rules by hand and LLaVA's tokenizer run over the complete text."""

import llama_tokenizers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_tokenizers import SlowLlama
from tiny_models import turns

from llava_bidir.data.conversation import IGNORE_INDEX, SYSTEM, encode

IMAGE_ID = 32000


def whole_text_ids(text: str, tokenizer, image_tokens: int) -> list[int]:
    """LLaVA's tokenizer_image_token, from its description: chunks between images, the BOS of each but one dropped."""
    ids = [1]
    for i, chunk in enumerate(text.split("<image>")):
        ids += [IMAGE_ID] * image_tokens if i else []
        ids += tokenizer.encode(chunk)[1:]
    return ids


@pytest.mark.parametrize("caption", ["a cat", "  two  cats", "\n    x = 1\n"])
def test_plain_trains_the_caption_and_its_newline(caption, llama_tokenizer, slow_llama):
    ids, labels = encode(
        turns("Describe <image>", caption),
        llama_tokenizer,
        "plain",
        3,
        IMAGE_ID,
    )
    assert ids == whole_text_ids(f"<image>{caption}\n", slow_llama, 3)
    assert labels == [IGNORE_INDEX] * 4 + ids[4:]
    assert ids[-1] == 13
    pieces = "".join(llama_tokenizer.convert_ids_to_tokens(ids[4:]))
    assert pieces == "▁" + f"{caption}\n".replace(" ", "▁").replace("\n", "<0x0A>")


@given(
    texts=st.lists(llama_tokenizers.texts(*SlowLlama.SPECIAL, min_size=1), min_size=2, max_size=6)
)
def test_any_text_is_encoded_in_pieces_as_llava_encodes_it_at_once(
    llama_tokenizer, slow_llama, texts
):
    texts = texts[: len(texts) // 2 * 2]
    ids, labels = encode(
        turns(*texts),
        llama_tokenizer,
        "vicuna_v1",
        4,
        IMAGE_ID,
    )
    text = f"{SYSTEM} " + "".join(
        f"USER: {q} ASSISTANT: {a}</s>" for q, a in zip(texts[::2], texts[1::2], strict=True)
    )
    assert ids == whole_text_ids(text, slow_llama, 4)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    ends = len(texts) // 2 + sum(answer.count("</s>") for answer in texts[1::2])
    assert labels.count(2) == ends, "each answer's end is trained"


MISTAKES = {  # message: turns and template
    "turn 1 is from 'human', expected 'gpt'": (turns("a") + turns("b"), "vicuna_v1"),
    "unknown template 'llama3'; available: plain, vicuna_v1": (turns("q", "a"), "llama3"),
    "'plain' requires one question": (turns("q", "a"), "plain"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_turns_and_templates_that_do_not_fit_are_errors(message, llama_tokenizer):
    conversation, template = MISTAKES[message]
    with pytest.raises(ValueError, match=message):
        encode(conversation, llama_tokenizer, template)
