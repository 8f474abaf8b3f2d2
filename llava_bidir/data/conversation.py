"""Encode LLaVA conversations as token ids and labels, turn by turn.

One pass over the text produces both ids and labels, so they cannot disagree. LLaVA tokenises twice, compares, and
masks samples with a "tokenization mismatch". Deviates: these are trained here, as are answers that hold "<unk>".
With the tokenizer that `load_tokenizer` makes of LLaVA's `tokenizer.model`, the ids equal LLaVA's own (train.py
preprocess_plain and preprocess_v1, mm_utils.py tokenizer_image_token).
"""

import re
from collections.abc import Callable, Sequence

from llava_bidir.common.errors import UserError
from llava_bidir.common.tokenizer import start_ids

from .chat import ROLES, render_chat, supervised_tokens

IGNORE_INDEX = -100
PLAIN = "plain"  # the template of captions, stage 1
IMAGE = "<image>"
# LLaVA's tokenizer treats these strings as text, but our processor adds them as tokens. Splitting after the "<" hides
# them from the tokenizer, and no token of Llama's vocabulary spans that split.
LITERALS = re.compile(r"(?<=<)(?=(?:image|pad)>)")
PAD_LITERAL = re.compile(r"(?<=<)(?=pad>)")  # where `<image>` is an image
CHAT = "chat"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

Turn = dict[str, str]
Piece = tuple[str, bool]  # text, and whether it is a training target


def encode(
    turns: Sequence[Turn],
    tokenizer,
    template: str = "vicuna_v1",
    image_tokens: int | None = 576,
    image_token_id: int = 32000,
) -> tuple[list[int], list[int]]:
    r"""Return token ids and labels of a conversation, with each `<image>` expanded to `image_tokens` ids.

    A conversation that ends with a human turn yields the prompt for its answer. With words as tokens, I as image token
    and supervised tokens marked by ^::

        vicuna_v1   <s> A chat ... questions. USER: I I I <nl> What is it? ASSISTANT: a cat </s>
                                                                                      ^ ^   ^
        plain       <s> I I I a cat <nl>
                              ^ ^   ^
        chat        <|im_start|> user <nl> I I I <nl> What is it? <|im_end|> <nl>
                    <|im_start|> assistant <nl> a cat <|im_end|> <nl>
                                                ^ ^   ^

    Args:
        turns: LLaVA's JSON, ``[{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", ...}, ...]``.
        tokenizer: A Hugging Face tokenizer; its eos token ends each answer.
        template: "plain" (stage 1), "vicuna_v1" (stage 2), or "chat", the tokenizer's own chat template, here ChatML
            (chat.py).
        image_tokens: T, image tokens per image. None for a record without an image, in which `<image>` is ordinary text
            (LLaVA train.py has_image).
        image_token_id: Id of an image token.

    Returns:
        input_ids and labels of the same length; labels are -100 where the model is not trained.

    Raises:
        UserError: Unknown template or role, roles out of order, a turn without text, turns that do not fit `plain`, or
            a chat template in which answers cannot be found.
    """
    turns = usable_turns(turns)
    if image_tokens is not None:
        turns = [{**turn, "value": _image_first(turn["value"])} for turn in turns]
    if template == CHAT:
        return _encode_chat(turns, tokenizer, image_tokens, image_token_id)
    if template not in TEMPLATES:
        raise UserError(
            f"unknown template {template!r}; available: {', '.join([*TEMPLATES, CHAT])}"
        )
    if template == PLAIN and image_tokens is None:
        raise UserError("template 'plain' requires an image")
    input_ids = start_ids(tokenizer)
    labels = [IGNORE_INDEX] * len(input_ids)
    continues = False  # LLaVA tokenises text before, between and after images separately
    for text, supervised in TEMPLATES[template](turns, tokenizer.eos_token):
        for i, part in enumerate([text] if image_tokens is None else text.split(IMAGE)):
            if i > 0:
                input_ids += [image_token_id] * image_tokens
                labels += [IGNORE_INDEX] * image_tokens
                continues = False
            if part:
                tokens = _tokenize(part, tokenizer, continues)
                input_ids += tokens
                labels += tokens if supervised else [IGNORE_INDEX] * len(tokens)
                continues = True
    return input_ids, labels


def _encode_chat(
    turns: list[Turn],
    tokenizer,
    image_tokens: int | None,
    image_token_id: int,
) -> tuple[list[int], list[int]]:
    """Return token ids and labels under the tokenizer's chat template; the ids are those of the complete text."""
    text, spans = render_chat(turns, tokenizer)
    literals = LITERALS if image_tokens is None else PAD_LITERAL

    def tokenize(text):
        return _tokenize(text, tokenizer, False, literals)

    ids = tokenize(text)
    labels = [IGNORE_INDEX] * len(ids)
    for span in spans:
        answer = supervised_tokens(text, span, ids, tokenize, tokenizer)
        labels[answer] = ids[answer]
    expanded_ids = []
    expanded_labels = []
    for token, label in zip(ids, labels, strict=True):
        if token == image_token_id:
            expanded_ids += [token] * (image_tokens or 1)
            expanded_labels += [IGNORE_INDEX] * (image_tokens or 1)
        else:
            expanded_ids.append(token)
            expanded_labels.append(label)
    return expanded_ids, expanded_labels


def _tokenize(
    text: str,
    tokenizer,
    continues: bool,
    literals: re.Pattern = LITERALS,
) -> list[int]:
    """Return the ids of `text`; text that `continues` other text gets no word-start marker."""
    ids = []
    for part in literals.split(text):
        if continues or ids:
            # A sentencepiece tokenizer adds its marker at the start of a string, but not after a special token.
            ids += tokenizer.encode(tokenizer.eos_token + part, add_special_tokens=False)[1:]
        else:
            ids += tokenizer.encode(part, add_special_tokens=False)
    return ids


def usable_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns from the first human turn on, if all are valid.

    Raises:
        UserError: A turn has no text or another role, roles do not alternate, or there is no human turn.
    """
    turns = list(turns)
    for turn in turns:
        is_known = isinstance(turn, dict) and turn.get("from") in ROLES
        if not is_known or not isinstance(turn.get("value"), str):
            expected = "'from': 'human' or 'gpt', and text in 'value'"
            raise UserError(f"a turn needs {expected}, got {str(turn)[:80]!r}")
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]  # LLaVA train.py:425
    for i, turn in enumerate(turns):
        expected = ("human", "gpt")[i % 2]
        if turn["from"] != expected:
            raise UserError(
                f"turn {i} is from {turn['from']!r}, expected {expected!r}; roles must alternate"
            )
    if not turns:
        raise UserError("a conversation needs at least one human turn")
    return turns


def _image_first(text: str) -> str:
    """Move the image before the turn's text and merge several into one (LLaVA train.py preprocess_multimodal)."""
    if IMAGE not in text:
        return text
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()


def _plain(turns: list[Turn], eos: str) -> list[Piece]:
    """Return the image and its caption without the question. Source: LLaVA train.py preprocess_plain."""
    if len(turns) != 2 or IMAGE not in turns[0]["value"]:
        raise UserError(
            f"template 'plain' requires one question with {IMAGE} and one caption, got {len(turns)} turns"
        )
    return [(IMAGE, False), (turns[1]["value"] + "\n", True)]


def _vicuna_v1(turns: list[Turn], eos: str) -> list[Piece]:
    """Return the system prompt, then `USER: question ASSISTANT: answer</s>` without a space after the eos.

    Source: LLaVA conversation.py conv_vicuna_v1 (SeparatorStyle.TWO) and train.py preprocess_v1, which supervises the
    answer and its eos. As there, an empty message yields its role without a space.
    """
    pieces = []
    for question, answer in zip(turns[::2], [*turns[1::2], {"value": ""}], strict=False):
        text = question["value"]
        user = f"USER: {text} ASSISTANT:" if text else "USER:ASSISTANT:"
        pieces.append((user if pieces else f"{SYSTEM} {user}", False))
        if answer["value"]:
            pieces.append((f" {answer['value']}{eos}", True))
    return pieces


TEMPLATES: dict[str, Callable[[list[Turn], str], list[Piece]]] = {
    PLAIN: _plain,
    "vicuna_v1": _vicuna_v1,
}
