"""Ids and labels of conversations, against LLaVA's rules worked out by hand and a tokeniser run over the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import turns

from llava_bidir.data.conversation import IGNORE_INDEX, SYSTEM, encode

IMAGE_ID = 32000


def whole_text_ids(text: str, tokenizer, image_tokens: int) -> list[int]:
    """LLaVA's tokenizer_image_token, from its description: chunks between images, the BOS of each but one dropped."""
    ids = [tokenizer.bos_token_id]
    for i, chunk in enumerate(text.split("<image>")):
        ids += [IMAGE_ID] * image_tokens if i else []
        ids += tokenizer(chunk).input_ids[1:]
    return ids


def supervised_text(labels: list[int], tokenizer) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


def test_plain_trains_the_caption_and_its_newline(real_tokenizer):
    ids, labels = encode(turns("Describe <image>", "a cat"), real_tokenizer, "plain", 3, IMAGE_ID)
    assert ids == [1, IMAGE_ID, IMAGE_ID, IMAGE_ID, 263, 6635, 13]
    assert labels == [IGNORE_INDEX] * 4 + [263, 6635, 13]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<>"), min_size=1), min_size=2, max_size=6))
def test_any_text_is_encoded_as_a_whole_and_in_pieces_alike(real_tokenizer, texts):
    texts = texts[: len(texts) // 2 * 2]
    ids, labels = encode(turns(*texts), real_tokenizer, "vicuna_v1", 4, IMAGE_ID)
    text = f"{SYSTEM} " + "".join(f"USER: {q} ASSISTANT: {a}</s>" for q, a in zip(texts[::2], texts[1::2], strict=True))
    assert ids == whole_text_ids(text, real_tokenizer, 4)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    assert labels.count(2) == len(texts) // 2, "each answer's end is trained"


def test_conversation_that_ends_with_a_question_is_a_prompt(real_tokenizer):
    full, labels = encode(turns("<image>\nWhat?", "A cat."), real_tokenizer, "vicuna_v1", 2, IMAGE_ID)
    prompt, nothing = encode(turns("<image>\nWhat?"), real_tokenizer, "vicuna_v1", 2, IMAGE_ID)
    assert prompt == full[: len(prompt)] and set(nothing) == {IGNORE_INDEX}
    assert labels[len(prompt)] != IGNORE_INDEX, "the answer starts right behind the prompt"


def test_leading_gpt_turn_is_dropped(real_tokenizer):
    expected = encode(turns("q", "a"), real_tokenizer)
    assert encode([{"from": "gpt", "value": "hello"}, *turns("q", "a")], real_tokenizer) == expected


def test_unknown_template_unfit_plain_and_bad_turns_are_errors(real_tokenizer):
    with pytest.raises(ValueError, match="turn 1 is from 'human', expected 'gpt'"):
        encode(turns("a") + turns("b"), real_tokenizer)
    with pytest.raises(ValueError, match="unknown template 'llama3'; available: plain, vicuna_v1"):
        encode(turns("q", "a"), real_tokenizer, "llama3")
    with pytest.raises(ValueError, match="'plain' requires one question"):
        encode(turns("q", "a"), real_tokenizer, "plain")


def test_toy_tokenizer_follows_the_same_rules(parts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parts[1])
    ids, labels = encode(turns("<image>\nname the sky", "wall", "name", "sky"), tokenizer, "vicuna_v1", 2, IMAGE_ID)
    text = f"{SYSTEM} USER: <image>\nname the sky ASSISTANT: wall</s>USER: name ASSISTANT: sky</s>"
    assert ids == whole_text_ids(text, tokenizer, 2)
    assert supervised_text(labels, tokenizer).split() == ["wall</s>", "sky</s>"]
