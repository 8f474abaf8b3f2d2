"""Tokenizer and chat template of a checkpoint: the text before the image, and after it.

Stock processors are not used: many need torchvision for videos.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.hf import with_fixed_date
from llava_bidir.common.tokenizer import load_tokenizer, start_ids

from .read_config import Checkpoint

PREFIX_ADVICE = "give this text by `probes fit --model.prefix`, `probes states --prefix` or probes.load(prefix=...)"
IMAGE_TOKENS = re.compile(r"<[^<>]+>|\[IMG\w*\]")


def read_prefix_ids(checkpoint: Checkpoint, prefix: str | None = None) -> list[int]:
    """Return the token ids before the first image token, of `prefix` or of the chat template up to the image.

    Raises:
        UserError: There is no chat template, it has no image, or the tokenizer lacks a token of the family.
    """
    family = checkpoint.family
    if family.own_template and prefix is None:
        return []  # the image comes first
    if prefix is None:
        chat = read_chat(checkpoint)
        prefix = _chat_before_image(chat) + family.image_start_text
        tokenizer = chat.tokenizer
        for token in IMAGE_TOKENS.findall(family.image_start_text):
            _token_id(checkpoint.path, tokenizer, token)
    else:
        tokenizer = _read_tokenizer(checkpoint)
    # Tokenised by itself, without a preceding token, as LLaVA tokenises the text before an image.
    return start_ids(tokenizer, prefix) + tokenizer.encode(prefix, add_special_tokens=False)


def read_separator_id(checkpoint: Checkpoint) -> int | None:
    """Return the id of the token after each row of image tokens, or None if the family has none."""
    separator = checkpoint.family.row_separator
    return separator and _token_id(checkpoint.path, _read_tokenizer(checkpoint), separator)


class Chat(NamedTuple):
    """Tokenizer and chat template of a checkpoint, for the text after the image."""

    path: str
    tokenizer: PreTrainedTokenizerBase
    template: str
    placeholder: str
    image_end_text: str  # that the processor inserts after the image tokens

    def render(self, *texts: str) -> str:
        """Return the prompt for the answer to an image and texts.

        Raises:
            UserError: The template has no image.
        """
        content = [{"type": "image"}, *({"type": "text", "text": text} for text in texts)]
        with error_context(f"chat template of {self.path}"):  # runs in jinja's sandbox
            return self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=with_fixed_date(self.template),
                tokenize=False,
                add_generation_prompt=bool(texts),
            )

    def after_image(self, question: str) -> str:
        """Return the text between the last image token and the answer."""
        before, placeholder, after = self.render(question).partition(self.placeholder)
        if not placeholder or not after:
            raise UserError(
                f"the chat template of {self.path} has no text after {self.placeholder}; expected a question"
            )
        return self.image_end_text + after

    def question_ids(self, question: str) -> list[int]:
        """Return the token ids between the image and the answer, as the stock processor tokenises them."""
        return self._continue(self.after_image(question))

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Return the token ids of answers, after a space unless the prompt ends with white space."""
        space = " "
        if self.after_image("?")[-1:].isspace():
            space = ""
        return [self._continue(space + answer) for answer in answers]

    def decode(self, answer: list[int]) -> str:
        """Return the text of an answer's token ids."""
        return self.tokenizer.decode(answer, skip_special_tokens=True).strip()

    def _continue(self, text: str) -> list[int]:
        """Return the ids of text after a special token, where tokenizers add no word-start marker."""
        return self.tokenizer.encode(self._token_before + text, add_special_tokens=False)[1:]

    @property
    def _token_before(self) -> str:
        """A special token. Some templates have a placeholder that is none, which processors replace as text."""
        number = self.tokenizer.convert_tokens_to_ids(self.placeholder)
        if number not in (None, self.tokenizer.unk_token_id):
            return self.placeholder
        return self.tokenizer.eos_token


def read_chat(checkpoint: Checkpoint) -> Chat:
    """Read tokenizer and chat template of a checkpoint.

    Raises:
        UserError: There is no chat template, or it or the tokenizer is damaged.
    """
    path = checkpoint.path
    family = checkpoint.family
    tokenizer = _read_tokenizer(checkpoint)
    if family.own_template:
        return Chat(
            path=path,
            tokenizer=tokenizer,
            template=family.own_template,
            placeholder=family.placeholder,
            image_end_text="",
        )
    with error_context(f"chat template of {path}"):
        settings, _ = ProcessorMixin.get_processor_dict(path, revision=checkpoint.revision)
        template = settings.get("chat_template") or tokenizer.chat_template
        if isinstance(template, dict):  # named templates
            template = template.get("default")
    if template is None:
        raise UserError(
            f"{path} has no chat template, which defines the text before the image; {PREFIX_ADVICE}"
        )
    return Chat(
        path=path,
        tokenizer=tokenizer,
        template=template,
        placeholder=family.placeholder,
        image_end_text=family.image_end_text,
    )


def read_dialogue(checkpoint: Checkpoint) -> Chat:
    """Read what :func:`read_chat` reads, for questions about the image.

    Raises:
        UserError: As :func:`read_chat`, or the tokenizer lacks a token of the family.
    """
    chat = read_chat(checkpoint)
    for token in IMAGE_TOKENS.findall(checkpoint.family.image_end_text):
        _token_id(chat.path, chat.tokenizer, token)
    return chat


def _chat_before_image(chat: Chat) -> str:
    before, placeholder, _ = chat.render().partition(chat.placeholder)
    if not placeholder:
        raise UserError(
            f"the chat template of {chat.path} has no {chat.placeholder} for an image; {PREFIX_ADVICE}"
        )
    return before


def _read_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    return load_tokenizer("tokenizer", checkpoint.path, revision=checkpoint.revision)


def _token_id(path: str, tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    if token not in tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer of {path} has no token {token}, which this family needs around images"
        )
    return tokenizer.get_vocab()[token]
