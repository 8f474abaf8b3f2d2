"""Token ids, labels and pixels against LLaVA's own algorithms, written out here from their description.

LLaVA tokenises the complete text with its slow tokenizer (llama_tokenizers.SlowLlama).

Source: LLaVA train.py preprocess_multimodal, preprocess_v1, expand2square; mm_utils.py tokenizer_image_token; CLIP's
image processing: bicubic, short side to the input size, centre crop.
"""

import copy

import llama_tokenizers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_tokenizers import SlowLlama
from PIL import Image
from tiny_models import turns
from transformers import CLIPVisionConfig, SiglipVisionConfig

from llava_bidir.data.conversation import IGNORE_INDEX, SYSTEM, encode
from llava_bidir.model.encoders import Encoder

IMAGE_ID = 32000
T = 3


@pytest.fixture(scope="module")
def tokenizer(llama_tokenizer):
    """As training has it: LLaVA's, and two tokens that LLaVA's does not know."""
    extended = copy.deepcopy(llama_tokenizer)
    extended.add_tokens(["<image>", "<pad>"], special_tokens=True)
    return extended


def ours(texts, tokenizer, image_tokens: int | None = T, template: str = "vicuna_v1"):
    """Return ids and labels of a conversation by our code."""
    return encode(
        turns(*texts),
        tokenizer=tokenizer,
        template=template,
        image_tokens=image_tokens,
        image_token_id=IMAGE_ID,
    )


def llava_ids(text: str, tokenizer, has_image: bool) -> list[int]:
    """tokenizer_image_token; one image is one id, as there."""
    if not has_image:
        return tokenizer.encode(text)
    chunks = [tokenizer.encode(chunk) for chunk in text.split("<image>")]
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = [*ids, IMAGE_ID, *chunk[1:]]
    return ids


def llava_v1(texts: list[str], tokenizer, has_image: bool) -> tuple[list[int], list[int]]:
    """preprocess_multimodal and preprocess_v1 for an even number of turns."""
    if has_image:
        texts = [
            f"<image>\n{t.replace('<image>', '').strip()}".strip() if "<image>" in t else t
            for t in texts
        ]
    text = SYSTEM + " "
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        text += (
            f"USER: {question} ASSISTANT: {answer}</s>"
            if answer
            else f"USER: {question} ASSISTANT:"
        )
    ids = llava_ids(text, tokenizer, has_image)
    labels = list(ids)
    position = 1
    labels[:1] = [IGNORE_INDEX]
    for i, part in enumerate(text.split("</s>")):
        halves = part.split(" ASSISTANT: ")
        if part == "" or len(halves) != 2:
            break
        whole = len(llava_ids(part, tokenizer, has_image))
        asked = len(llava_ids(halves[0] + " ASSISTANT: ", tokenizer, has_image)) - 2
        if i > 0:  # the tokenizer is not "legacy"
            whole = whole - 1
            asked = asked - 1
        labels[position : position + asked] = [IGNORE_INDEX] * asked
        position += whole
    labels[position:] = [IGNORE_INDEX] * len(labels[position:])
    if position != len(ids):
        labels = [IGNORE_INDEX] * len(ids)  # "tokenization mismatch": LLaVA drops the sample
    return ids, labels


def expanded(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Each image id T times."""
    counts = [T if token == IMAGE_ID else 1 for token in ids]
    return tuple(np.repeat(row, counts).tolist() for row in (ids, labels))


AGREEING = {
    "one turn": ("<image>\nWhat is it?", "A cat."),
    "several turns": ("<image>\nWhat?", "A cat.", "Sure?", "Yes, a cat.", "Ok", "Fine"),
    "image last": ("What is it?\n<image>", "A cat."),
    "image in the middle": ("What is <image> here?", "A cat.", "And now?", "Still."),
    "two images in a turn": ("<image><image> Compare.", "Both are cats."),
    "image in two turns": ("<image>\nOne?", "Yes.", "<image>\nTwo?", "No."),
    "image in a later turn": ("Hello", "Hi.", "<image>\nWhat?", "A cat."),
    "assistant without spaces": ("<image>\nsay ASSISTANT:now", "I sayASSISTANT: now"),
    "spaces and newlines": ("  <image>\n two  spaces ", " a\n\nb  c ", "x", "  y\n"),
    "image alone": ("<image>", "A cat."),
    "empty first answer": ("<image>\na", "", "b", "yes"),
    "pad in a text": ("<image>\nwhat is <pad>?", "a <pad> token"),
}


@pytest.mark.parametrize("case", AGREEING)
def test_ids_and_labels_equal_llavas(case, tokenizer, slow_llama):
    texts = list(AGREEING[case])
    expected = expanded(*llava_v1(texts, slow_llama, has_image=True))
    assert any(label != IGNORE_INDEX for label in expected[1]), "LLaVA trains on it"
    assert ours(texts, tokenizer) == expected


TEXT_ONLY = {
    "plain": ("Hello", "Hi there", "Bye", "Bye."),
    "tag": (
        "Write <image>x</image> in XML",
        "<rss><image>\n<url/></image>",
        "<image>",
        "'<image>'",
    ),
}


@pytest.mark.parametrize("case", TEXT_ONLY)
def test_without_an_image_a_tag_is_text_as_in_llava(case, tokenizer, slow_llama):
    texts = list(TEXT_ONLY[case])
    ids, labels = ours(texts, tokenizer, None)
    assert (ids, labels) == llava_v1(texts, slow_llama, has_image=False)
    assert IMAGE_ID not in ids
    assert any(label != IGNORE_INDEX for label in labels)


LOST = {
    "empty last answer": ("<image>\nWhat?", ""),
    "empty answer after another": ("<image>\nWhat?", "A cat.", "Sure?", ""),
    "assistant within a question": ("<image>\nsay ASSISTANT: now", "now"),
    "assistant within an answer": ("<image>\nWhat?", "It says ASSISTANT: yes", "Sure?", "Yes."),
}


@pytest.mark.parametrize("case", LOST)
def test_samples_that_llava_loses_keep_ids_and_train_on_their_answers(case, tokenizer, slow_llama):
    """Deviates: LLaVA finds "ASSISTANT:" by searching, miscounts, and then masks the whole sample."""
    texts = list(LOST[case])
    theirs = expanded(*llava_v1(texts, slow_llama, has_image=True))
    ids, labels = ours(texts, tokenizer)
    assert ids == theirs[0]
    assert set(theirs[1]) == {IGNORE_INDEX}
    trained = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    assert trained.split() == "".join(f" {answer}</s>" for answer in texts[1::2] if answer).split()


def test_plain_trains_the_caption_and_its_newline(tokenizer, slow_llama):
    caption = "\n  two  cats\n"
    ids, labels = ours(("Describe <image>", caption), tokenizer, template="plain")
    whole = llava_ids(f"<image>{caption}\n", slow_llama, has_image=True)
    expected, _ = expanded(whole, whole)
    assert ids == expected
    assert labels == [IGNORE_INDEX] * (1 + T) + ids[1 + T :]


@given(
    texts=st.lists(llama_tokenizers.texts(*SlowLlama.SPECIAL, min_size=1), min_size=2, max_size=6)
)
def test_any_text_is_encoded_in_pieces_as_llava_encodes_it_at_once(tokenizer, slow_llama, texts):
    texts = texts[: len(texts) // 2 * 2]
    ids, labels = ours(texts, tokenizer)
    pairs = zip(texts[::2], texts[1::2], strict=True)
    text = f"{SYSTEM} " + "".join(f"USER: {q} ASSISTANT: {a}</s>" for q, a in pairs)
    assert ids == llava_ids(text, slow_llama, has_image=True)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    ends = len(texts) // 2 + sum(answer.count("</s>") for answer in texts[1::2])
    assert labels.count(2) == ends, "each answer's end is trained"


def test_a_caption_needs_a_question_with_an_image(tokenizer):
    for texts in (("q", "a"), ("<image>", "a", "b", "c")):
        with pytest.raises(ValueError, match="'plain' requires one question with <image>"):
            ours(texts, tokenizer, template="plain")


# ---------------------------------------------------------------------------------------------------------- pixels
CONFIGS = {
    "clip": CLIPVisionConfig(image_size=336, patch_size=14),
    "siglip": SiglipVisionConfig(image_size=384, patch_size=14),
}
SIZES = [(640, 480), (333, 500), (336, 336), (337, 336), (31, 7), (1, 9)]


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    width, height = size
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(noise, "RGBA").convert(mode)


def llava_pixels(image: Image.Image, statistics, side: int, aspect: str) -> np.ndarray:
    mean, std = statistics
    width, height = image.size
    if aspect == "pad" and width != height:
        square = Image.new("RGB", (max(width, height),) * 2, tuple(int(x * 255) for x in mean))
        square.paste(image, ((max(width, height) - width) // 2, (max(width, height) - height) // 2))
        image = square
        width, height = image.size
    short = min(width, height)
    scaled = tuple(side if n == short else int(side * n / short) for n in (width, height))
    values = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC))
    top = (values.shape[0] - side) // 2
    left = (values.shape[1] - side) // 2
    values = values[top : top + side, left : left + side]
    return ((values / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("aspect", ["pad", "center_crop"])
@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_equal_llavas(name, aspect, size):
    """To the last of the 256 levels: a step of one is 0.0147 at least after normalisation."""
    encoder = Encoder(name, "unused")
    config = CONFIGS[name]
    ours = encoder.image_processor(config, aspect)(picture(size), return_tensors="np")[
        "pixel_values"
    ][0]
    expected = llava_pixels(
        picture(size), statistics=encoder.kind.pixels, side=config.image_size, aspect=aspect
    )
    assert ours.shape == (3, config.image_size, config.image_size)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)
