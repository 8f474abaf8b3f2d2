"""Tokenizer, chat template and image normalisation of a checkpoint.

Stock processors are not used: many need torchvision for videos, and each splits and crops images in its own way. Of the
image processor, the normalisation and how it resizes are read: filter, sides, crop. `hub` is {"revision": ...} for an
id of the hub.
"""

import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ProcessorMixin

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.hf import with_fixed_date
from llava_bidir.common.tokenizer import load_tokenizer, start_ids
from probes.ops.geometry import ResizeRule

from .families import EncoderFamily, Family

PREFIX_ADVICE = "give this text by `probes fit --model.prefix`, `probes states --prefix` or probes.load(prefix=...)"
PIXEL_SETTINGS = (
    "resample",
    "size",
    "crop_size",
    "max_image_size",
    "default_to_square",
    "do_center_crop",
    "do_image_splitting",
    "do_pad",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
)
MAX_ENLARGED = 8  # a processor's side before a crop or a thumbnail, in units of the side after
IMAGE_TOKENS = re.compile(r"<[^<>]+>|\[IMG\w*\]")


def read_tokenizer(path: str, **hub: Any) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a checkpoint; raise a UserError if there is none or it is damaged."""
    return load_tokenizer("tokenizer", path, **hub)


def read_image_processors(
    path: str, family: Family | EncoderFamily, **hub: Any
) -> tuple[list[CLIPImageProcessorPil], ResizeRule]:
    """Return an image processor per normalisation, without resizing, and how the checkpoint resizes.

    Settings that the file lacks are those of the class that it names.

    Raises:
        UserError: The normalisation is not defined, or a setting of resizing cannot be.
    """
    with error_context(f"preprocessor_config.json of {path}"):
        stored = _read_processor_settings(path, family, **hub)
        # as in transformers, null is as good as missing
        stored = {key: value for key, value in stored.items() if value is not None}
        settings = _class_defaults(stored) | stored
        if settings.get("do_normalize") is False:  # files need not have numbers that nothing reads
            for mean, std in family.normalisations:
                settings |= {mean: [0.0] * 3, std: [1.0] * 3}
        for key in (key for keys in family.normalisations for key in keys):
            value = settings.get(key) or ()
            if len(value) != 3 or not all(0 < x < 256 or (x == 0 and "mean" in key) for x in value):
                raise UserError(f"{key} is {settings.get(key)}; expected three positive numbers")
        rule = _resize_rule(settings, family)
    processors = [
        CLIPImageProcessorPil(
            do_resize=False,
            do_center_crop=False,
            do_rescale=settings.get("do_rescale", True),
            do_normalize=settings.get("do_normalize", True),
            rescale_factor=settings.get("rescale_factor", 1 / 255),
            image_mean=settings[mean],
            image_std=settings[std],
        )
        for mean, std in family.normalisations
    ]
    return processors, rule


def _read_processor_settings(
    path: str, family: Family | EncoderFamily, **hub: Any
) -> dict[str, Any]:
    """Return the settings of a checkpoint's image processor.

    Raises:
        UserError: A folder has none; names the settings that are needed.
    """
    try:
        return ImageProcessingMixin.get_image_processor_dict(path, **hub)[0]
    except OSError as error:
        damaged = isinstance(error.__context__, json.JSONDecodeError)
        if damaged or not Path(path).is_dir():
            raise
    keys = [key for keys in family.normalisations for key in keys]
    example = {key: [0.5, 0.5, 0.5] for key in keys} | {"resample": 3}
    raise UserError(
        f"the file is missing, which says how photos become pixels; copy it from the published model, or write it with "
        f"the model's own numbers, as {json.dumps(example)} (resample: 2 is bilinear, 3 bicubic)"
    ) from None


def _class_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of the image processor that a file names; none if the installed transformers has no such one.

    Of a processor with several backends, the one with Pillow is asked: others need torchvision.
    """
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    name = str(kind).replace("FeatureExtractor", "ImageProcessor")
    name = name.removesuffix("Fast").removesuffix("Pil") + "Pil"
    processor = getattr(transformers, name, None)
    defaults = {key: getattr(processor, key, None) for key in PIXEL_SETTINGS}
    return {key: value for key, value in defaults.items() if value is not None}


def _resize_rule(settings: dict[str, Any], family: Family | EncoderFamily) -> ResizeRule:
    """Return how images become squares by a family and the settings of an image processor."""
    resample = settings.get("resample", Image.Resampling.BICUBIC)
    if resample not in list(Image.Resampling):
        filters = ", ".join(f"{x.value} ({x.name.lower()})" for x in Image.Resampling)
        raise UserError(f"resample is {resample!r}; expected one of {filters}")
    resample = Image.Resampling(resample)
    size = settings.get("size")
    if thumbnail := settings.get("max_image_size"):
        return ResizeRule(
            family.image_resize or "squash",
            resample,
            before_thumbnail=_ratio("size", size, "max_image_size", thumbnail),
            splits=bool(settings.get("do_image_splitting")),
        )
    way = "pad" if settings.get("do_pad") else "squash"
    if family.image_resize or not settings.get("do_center_crop"):
        return ResizeRule(family.image_resize or way, resample)
    if way == "squash" and _is_of_shorter_side(size, settings.get("default_to_square", False)):
        way = "center_crop"
    crop = settings.get("crop_size")
    if size is None or crop is None:
        return ResizeRule(way, resample)
    return ResizeRule(way, resample, _ratio("size", size, "crop_size", crop))


def _is_of_shorter_side(size: Any, to_square: bool) -> bool:
    """Return whether the size of an image processor is that of the shorter side, not of both."""
    if isinstance(size, Mapping):
        return "shortest_edge" in size
    return not isinstance(size, list) and not to_square


def _ratio(
    resized_name: str,
    resized: Any,
    kept_name: str,
    kept: Any,
) -> Fraction:
    """Return the side to which images are resized in units of the side that is kept, from two settings."""
    before = _side(resized_name, resized)
    after = _side(kept_name, kept)
    if not after <= before <= MAX_ENLARGED * after:
        raise UserError(
            f"{resized_name} is {before} px and {kept_name} {after} px; expected a {resized_name} of {after} to "
            f"{MAX_ENLARGED * after} px"
        )
    return Fraction(before, after)


def _side(name: str, size: Any) -> int:
    """Return the side in a setting of an image processor: a number, or the largest of several."""
    sides = (
        size.values() if isinstance(size, Mapping) else size if isinstance(size, list) else [size]
    )
    sides = [side for side in sides if side is not None]
    if not sides or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(f"{name} is {size!r}; expected numbers of pixels, at least 1")
    return max(sides)


def read_prefix_ids(
    path: str,
    family: Family,
    prefix: str | None = None,
    **hub: Any,
) -> list[int]:
    """Return the token ids before the first image token, of `prefix` or of the chat template up to the image.

    Raises:
        UserError: There is no chat template, it has no image, or the tokenizer lacks a token of the family.
    """
    if family.own_template and prefix is None:
        return []  # the image comes first
    if prefix is None:
        chat = read_chat(path, family, **hub)
        prefix = _chat_before_image(chat) + family.image_start_text
        tokenizer = chat.tokenizer
        for token in IMAGE_TOKENS.findall(family.image_start_text):
            _token_id(path, tokenizer, token)
    else:
        tokenizer = read_tokenizer(path, **hub)
    # Tokenised by itself, without a preceding token, as LLaVA tokenises the text before an image.
    return start_ids(tokenizer, prefix) + tokenizer.encode(prefix, add_special_tokens=False)


def read_separator_id(path: str, family: Family, **hub: Any) -> int | None:
    """Return the id of the token after each row of image tokens, or None if the family has none."""
    return family.row_separator and _token_id(
        path, read_tokenizer(path, **hub), family.row_separator
    )


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
        space = "" if self.after_image("?")[-1:].isspace() else " "
        return [self._continue(space + answer) for answer in answers]

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


def read_chat(path: str, family: Family, **hub: Any) -> Chat:
    """Read tokenizer and chat template of a checkpoint.

    Raises:
        UserError: There is no chat template, or it or the tokenizer is damaged.
    """
    tokenizer = read_tokenizer(path, **hub)
    if family.own_template:
        return Chat(path, tokenizer, family.own_template, family.placeholder, "")
    with error_context(f"chat template of {path}"):
        settings, _ = ProcessorMixin.get_processor_dict(path, **hub)
        template = settings.get("chat_template") or tokenizer.chat_template
        if isinstance(template, dict):  # named templates
            template = template.get("default")
    if template is None:
        raise UserError(
            f"{path} has no chat template, which defines the text before the image; {PREFIX_ADVICE}"
        )
    return Chat(path, tokenizer, template, family.placeholder, family.image_end_text)


def read_dialogue(path: str, family: Family, **hub: Any) -> Chat:
    """Read what :func:`read_chat` reads, for questions about the image.

    Raises:
        UserError: As :func:`read_chat`, or the tokenizer lacks a token of the family.
    """
    chat = read_chat(path, family, **hub)
    for token in IMAGE_TOKENS.findall(family.image_end_text):
        _token_id(path, chat.tokenizer, token)
    return chat


def _chat_before_image(chat: Chat) -> str:
    before, placeholder, _ = chat.render().partition(chat.placeholder)
    if not placeholder:
        raise UserError(
            f"the chat template of {chat.path} has no {chat.placeholder} for an image; {PREFIX_ADVICE}"
        )
    return before


def _token_id(path: str, tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    if token not in tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer of {path} has no token {token}, which this family needs around images"
        )
    return tokenizer.get_vocab()[token]
