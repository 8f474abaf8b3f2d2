"""Encode LLaVA conversations as token ids and labels, piece by piece.

A template turns a conversation into pieces of text, each supervised or not. One pass over the pieces produces both ids
and labels, so they cannot disagree, and a prompt has the same ids with and without its answer. LLaVA tokenises twice,
compares, and masks samples with a "tokenization mismatch". Deviates: these are trained here, as are answers that hold
"<unk>". With the tokenizer that `load_tokenizer` makes of LLaVA's `tokenizer.model`, the ids equal LLaVA's own
(train.py preprocess_plain and preprocess_v1, mm_utils.py tokenizer_image_token).
"""

import re
from collections.abc import Callable, Sequence

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.tokenizer import start_ids

IGNORE_INDEX = -100
PLAIN = "plain"  # the template of captions, stage 1
CHAT = "chat"
IMAGE_PLACEHOLDER = "<image>"
# LLaVA's tokenizer treats these strings as text, but our processor adds them as tokens. Splitting after the "<" hides
# them from the tokenizer, and no token of Llama's vocabulary spans that split.
LITERALS = re.compile(r"(?<=<)(?=(?:image|pad)>)")
ROLES = {"human": "user", "gpt": "assistant"}
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
        template: "plain" (stage 1), "vicuna_v1" (stage 2), or "chat", the tokenizer's own chat template, here ChatML.
        image_tokens: T, image tokens per image. None for a record without an image, in which `<image>` is ordinary text
            (LLaVA train.py has_image).
        image_token_id: Id of an image token.

    Returns:
        input_ids and labels of the same length; labels are -100 where the model is not trained.

    Raises:
        UserError: Unknown role, roles out of order, a turn without text, turns that do not fit `plain`, or a chat
            template in which answers cannot be found.
    """
    turns = usable_turns(turns)
    if image_tokens is not None:
        turns = [{**turn, "value": _image_first(turn["value"])} for turn in turns]
    elif template == PLAIN:
        raise UserError("template 'plain' requires an image")
    pieces = TEMPLATES[template](turns, tokenizer)
    input_ids = start_ids(tokenizer, pieces[0][0])
    labels = [IGNORE_INDEX] * len(input_ids)
    continues = False
    for text, supervised in pieces:
        parts = [text]
        if image_tokens is not None:
            parts = text.split(IMAGE_PLACEHOLDER)
        for i, part in enumerate(parts):
            if i > 0:
                input_ids += [image_token_id] * image_tokens
                labels += [IGNORE_INDEX] * image_tokens
                # LLaVA tokenises text before, between and after images separately
                continues = template == CHAT
            if part:
                tokens = _tokenize(part, tokenizer, continues)
                input_ids += tokens
                if supervised:
                    labels += tokens
                else:
                    labels += [IGNORE_INDEX] * len(tokens)
                continues = True
    return input_ids, labels


def _tokenize(text: str, tokenizer, continues: bool) -> list[int]:
    """Return the ids of `text`; text that `continues` other text gets no word-start marker."""
    ids = []
    for part in LITERALS.split(text):
        if continues or ids:
            # A sentencepiece tokenizer adds its marker at the start of a string, but not after a special token.
            ids += tokenizer.encode(tokenizer.eos_token + part, add_special_tokens=False)[1:]
        else:
            ids += tokenizer.encode(part, add_special_tokens=False)
    return ids


def usable_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns from the first human turn on, {"from", "value"}, if all are valid.

    Raises:
        UserError: A turn has no text or another role, roles do not alternate, or there is no human turn.
    """
    usable = []
    for turn in turns:
        if (
            not isinstance(turn, dict)
            or turn.get("from") not in ROLES
            or not isinstance(turn.get("value"), str)
        ):
            expected = "'from': 'human' or 'gpt', and text in 'value'"
            raise UserError(f"a turn needs {expected}, got {str(turn)[:80]!r}")
        usable.append({"from": turn["from"], "value": turn["value"]})
    if usable and usable[0]["from"] == "gpt":
        usable = usable[1:]  # LLaVA train.py:425
    roles = [turn["from"] for turn in usable]
    if not roles or roles != (["human", "gpt"] * len(roles))[: len(roles)]:
        raise UserError(f"expected turns from human and gpt by turns, human first; got {roles}")
    return usable


def _image_first(text: str) -> str:
    """Move the image before the turn's text and merge several into one (LLaVA train.py preprocess_multimodal)."""
    if IMAGE_PLACEHOLDER not in text:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()


def _plain(turns: list[Turn], tokenizer) -> list[Piece]:
    """Return the image and its caption without the question. Source: LLaVA train.py preprocess_plain."""
    if len(turns) != 2 or IMAGE_PLACEHOLDER not in turns[0]["value"]:
        raise UserError(
            f"template 'plain' requires one question with {IMAGE_PLACEHOLDER} and one caption, got {len(turns)} turns"
        )
    return [(IMAGE_PLACEHOLDER, False), (turns[1]["value"] + "\n", True)]


def _vicuna_v1(turns: list[Turn], tokenizer) -> list[Piece]:
    """Return the system prompt, then `USER: question ASSISTANT: answer</s>` without a space after the eos.

    Source: LLaVA conversation.py conv_vicuna_v1 (SeparatorStyle.TWO) and train.py preprocess_v1, which supervises the
    answer and its eos. As there, an empty message yields its role without a space.
    """
    pieces = []
    answers = [*turns[1::2], {"value": ""}]  # the last is that of a prompt
    for question, answer in zip(turns[::2], answers, strict=False):
        prompt = "USER:ASSISTANT:"
        if question["value"]:
            prompt = f"USER: {question['value']} ASSISTANT:"
        if not pieces:
            prompt = f"{SYSTEM} {prompt}"
        pieces.append((prompt, False))
        if answer["value"]:
            pieces.append((f" {answer['value']}{tokenizer.eos_token}", True))
    return pieces


def _chat(turns: list[Turn], tokenizer) -> list[Piece]:
    r"""Return the text of the tokenizer's own chat template.

    The text of a conversation begins with the prompt of each of its answers. Rendering both shows what the template
    writes for an answer. Templates that write something else there, e.g. reasoning before the last answer only, cannot
    be trained.

    Raises:
        UserError: The template fails, or the answers cannot be found in its text.
    """
    messages = []
    for turn in turns:
        messages.append({"role": ROLES[turn["from"]], "content": turn["value"]})
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages = messages[:-1]

    def render(count: int, beginning: str) -> str:
        """Return the text of the first messages, and in front of an answer its prompt."""
        with error_context("chat template of the LLM"):  # runs in jinja's sandbox
            text = tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=count % 2 == 1
            )
        if not text.startswith(beginning):
            raise UserError(
                "the chat template writes a turn differently if others follow it; use data.template vicuna_v1"
            )
        return text

    pieces = []
    rendered = ""
    for count in range(2, len(messages) + 1, 2):
        prompt = render(count - 1, rendered)
        pieces.append((prompt.removeprefix(rendered), False))
        answer = messages[count - 1]["content"]
        text = render(count, prompt).removeprefix(prompt)
        written, end, _ = text.rpartition(tokenizer.eos_token)
        if answer and not (end and written.strip() == answer.strip()):
            raise UserError(
                f"the chat template writes {written[:200]!r} for the answer {answer[:80]!r}; expected the answer and "
                f"the end token {tokenizer.eos_token!r}; use data.template vicuna_v1"
            )
        trained = ""
        if answer and written:  # some templates strip it
            trained = written + end
        pieces.append((trained, True))
        rendered = prompt + trained
    rest = render(len(messages), rendered).removeprefix(rendered)
    return [*pieces, (rest, False)]


TEMPLATES: dict[str, Callable[..., list[Piece]]] = {
    PLAIN: _plain,
    "vicuna_v1": _vicuna_v1,
    CHAT: _chat,
}
