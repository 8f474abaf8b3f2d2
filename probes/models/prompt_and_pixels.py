"""What lies beside a checkpoint's weights: config, tokenizer, chat template, the image processor's settings.

Processors themselves are not loaded: many of them want torchvision for the videos that are not needed here, and each
has ways of its own with tiles and crops. Of the image processor only means and standard deviations count.
"""

import re

from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ProcessorMixin

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf_loading import error_context, read_pretrained

from .families import Family

MOST = 128  # image tokens down or across; the LLM's mask has the fourth power of it in bytes


def read_config(path: str) -> PreTrainedConfig:
    """
    Raises:
        UserError: It is no checkpoint directory, or transformers does not know its kind.
    """
    return read_pretrained("MLLM", AutoConfig, path)


def check_numbers(path: str, family: Family, config: PreTrainedConfig) -> None:
    """Raises a UserError where the numbers of a config make no image of a sensible size, or no LLM."""
    with error_context(f"config.json of {path}"):
        side, text_config = family.grid(config)[0], config.get_text_config()
        if not 1 <= side <= MOST:
            raise UserError(f"it makes {side} x {side} image tokens; expected 1 to {MOST} a side")
        sizes = {
            "layers of the LLM": text_config.num_hidden_layers,
            "width of the LLM": text_config.hidden_size,
            "width of the encoder": family.encoder_width(config),
        }
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"{name}: {size}; expected 1 or more")


def image_processors(path: str, family: Family) -> list[CLIPImageProcessorPil]:
    """One for each normalisation; they leave an image's size as it is.

    Raises:
        UserError: The checkpoint does not say how images are normalised.
    """
    with error_context(f"preprocessor_config.json of {path}"):
        settings, _ = ImageProcessingMixin.get_image_processor_dict(path)
    wanted = [key for keys in family.normalisations for key in keys]
    missing = [key for key in wanted if not settings.get(key)]
    if missing:
        raise UserError(f"{path} says nothing about {', '.join(missing)}; expected in its preprocessor_config.json")
    with error_context(f"preprocessor_config.json of {path}"):
        for key in wanted:
            if len(settings[key]) != 3 or not all(0 < x < 256 or (x == 0 and "mean" in key) for x in settings[key]):
                raise UserError(f"{key} is {settings[key]}; expected three positive numbers")
    return [
        CLIPImageProcessorPil(
            do_resize=False,
            do_center_crop=False,
            do_normalize=settings.get("do_normalize", True),
            rescale_factor=settings.get("rescale_factor", 1 / 255),
            image_mean=settings[mean],
            image_std=settings[std],
        )
        for mean, std in family.normalisations
    ]


def read_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """
    Raises:
        UserError: There is none, or its files are damaged.
    """
    return read_pretrained("tokenizer", AutoTokenizer, path)


def prefix_ids(path: str, family: Family, prefix: str | None = None) -> list[int]:
    """Ids of what stands before the first image token, begin-of-sequence token included.

    Args:
        path: The checkpoint's.
        family: Its entry.
        prefix: Text; None takes the checkpoint's chat template up to the image.

    Raises:
        UserError: No chat template, one without an image, or a tokenizer without the family's tokens.
    """
    if family.placeholder is None and prefix is None:
        return []
    tokenizer = read_tokenizer(path)
    if prefix is None:
        prefix = _chat_before_image(path, family, tokenizer) + family.opening
        for token in re.findall(r"<[^<>]+>|\[IMG\w*\]", family.opening):
            _token_id(path, tokenizer, token)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # alone and behind no other token, as LLaVA tokenises what stands before an image
    return start + tokenizer.encode(prefix.removeprefix(tokenizer.bos_token or ""), add_special_tokens=False)


def row_end_id(path: str, family: Family) -> int | None:
    """The token behind each row of image tokens, if the family has one."""
    return family.row_end and _token_id(path, read_tokenizer(path), family.row_end)


def _chat_before_image(path: str, family: Family, tokenizer) -> str:
    with error_context(f"chat template of {path}"):
        settings, _ = ProcessorMixin.get_processor_dict(path)
        template = settings.get("chat_template") or tokenizer.chat_template
    if template is None:
        raise UserError(f"{path} has no chat template that says what stands before the image; pass prefix='...'")
    turn = [{"role": "user", "content": [{"type": "image"}]}]
    with error_context(f"chat template of {path}"):  # runs in jinja's sandbox
        chat = tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False)
    before, placeholder, _ = chat.partition(family.placeholder)
    if not placeholder:
        raise UserError(f"the chat template of {path} puts no {family.placeholder} for an image; pass prefix='...'")
    return before


def _token_id(path: str, tokenizer, token: str) -> int:
    if token not in tokenizer.get_vocab():
        raise UserError(f"the tokenizer of {path} has no token {token}, which stands around images in this family")
    return tokenizer.get_vocab()[token]
