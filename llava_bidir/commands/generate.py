"""`llava-bidir generate`: answer questions about photos."""

import os
import sys
from collections.abc import Sequence
from itertools import takewhile

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    TextStreamer,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_bidir.command_options import GenerateOptions
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import (
    FiniteLogits,
    end_tokens,
    greedy_config,
    load_weights,
    read_pretrained,
)
from llava_bidir.common.images import SUFFIXES, read_photo
from llava_bidir.common.tokenizer import start_ids
from llava_bidir.data.collate import pad_prompts
from llava_bidir.data.conversation import IMAGE, encode
from llava_bidir.model import modeling_llava_bidir  # noqa: F401 - registers our models with the Auto classes
from llava_bidir.model.build import own_prompt, prompt_template


def is_photo(word: str) -> bool:
    """Return whether a word is a file, or is named like a picture: a mistyped name is no question."""
    return os.path.isfile(word) or word.lower().endswith(SUFFIXES)


def photos_and_prompts(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the photos and the questions of a command line, `IMAGE ... PROMPT ...`; the first word is a photo.

    Raises:
        UserError: There is no question, or a photo follows a question.
    """
    photos = [words[0], *takewhile(is_photo, words[1:])]
    prompts = [*words[len(photos) :]]
    if not prompts:
        raise UserError(
            f"there is no question after {photos[-1]}; expected MODEL IMAGE ... PROMPT ..."
        )
    for late in filter(is_photo, prompts):
        raise UserError(f"photo {late!r} follows a question; expected all photos before")
    return photos, prompts


def load(model: str, dtype: str = "auto") -> tuple[PreTrainedModel, LlavaProcessor]:
    """Return model and processor of a checkpoint, ours or transformers' llava.

    Released llava checkpoints use CLIP's processor, which crops. LLaVA-1.5 was evaluated on padded images, so their
    images are padded here. Source: LLaVA mm_utils.py process_images.

    Raises:
        UserError: There is no such checkpoint, it is no LLaVA, its mask would be ignored, or its model and its
            tokenizer take other ids for images.
    """
    # first, since these errors say more than those of the weights
    read_image_attention(read_pretrained("MODEL", AutoConfig, model))
    loaded = load_weights("MODEL", AutoModelForImageTextToText, model, dtype=dtype).eval()
    processor = read_pretrained("MODEL", AutoProcessor, model)
    index = loaded.config.image_token_id
    if index != processor.image_token_id:
        raise UserError(
            f"MODEL: image_token_index of {model}/config.json is {index}, but the id of {IMAGE} in its tokenizer is "
            f"{processor.image_token_id}; correct config.json"
        )
    loaded.generation_config = greedy_config(loaded.generation_config, processor.tokenizer)
    images = processor.image_processor
    if images.do_pad is None:  # CLIP's processor has no such option
        names = ("size", "crop_size", "image_mean", "image_std", "resample")
        settings = {name: getattr(images, name) for name in names}
        processor.image_processor = LlavaImageProcessorPil(do_pad=True, **settings)
    return loaded, processor


def read_image_attention(config) -> str:
    """Return the attention mask of a checkpoint.

    Raises:
        UserError: It is no LLaVA, or a stock `llava` that names a mask, which transformers would ignore.
    """
    mask = getattr(config, "image_attention", "causal")
    if config.model_type != "llava_bidir" and (config.model_type, mask) != ("llava", "causal"):
        expected = "expected a llava_bidir, or a causal llava"
        raise UserError(f"MODEL is a {config.model_type} under the mask {mask!r}; {expected}")
    return mask


def answer(
    model: PreTrainedModel,
    processor: LlavaProcessor,
    questions: list[str],
    images: list[list[Image.Image]],
    max_new_tokens: int,
) -> list[str]:
    """Return greedy answers to a batch of questions; see :func:`answer_and_tell_cut`."""
    return [
        text for text, _ in answer_and_tell_cut(model, processor, questions, images, max_new_tokens)
    ]


def answer_and_tell_cut(
    model: PreTrainedModel,
    processor: LlavaProcessor,
    questions: list[str],
    images: list[list[Image.Image]],
    max_new_tokens: int,
    streamer: TextStreamer | None = None,
) -> list[tuple[str, int | None]]:
    """Return greedy answers to a batch of questions, each in the prompt of :func:`prompt_ids`, padded on the left.

    With each answer comes the number of tokens after which it was cut, None if it ended by itself.

    Args:
        model: Our model or transformers' llava.
        processor: Processor of the model.
        questions: Questions without `<image>`.
        images: Images per question, placed before the text.
        max_new_tokens: Maximum tokens per answer; fewer if the LLM has no positions left.
        streamer: Prints the answer during generation.

    Raises:
        UserError: A prompt exceeds the LLM's positions, or logits are NaN or infinite.
    """
    tokenizer = processor.tokenizer
    positions = model.config.get_text_config().max_position_embeddings
    image_tokens = model.config.image_seq_length
    template = prompt_template(processor)
    rows = [
        prompt_ids(processor, template, text, len(own_images), image_tokens)
        for text, own_images in zip(questions, images, strict=True)
    ]
    longest = max(map(len, rows))
    if longest >= positions:
        limit = f"the LLM has {positions} positions (max_position_embeddings)"
        raise UserError(f"a prompt has {longest} tokens, but {limit}; shorten it")
    # per row, so that an answer does not depend on the other rows of its batch
    limits = [min(max_new_tokens, positions - len(row)) for row in rows]
    inputs = pad_prompts(rows, tokenizer.pad_token_id)
    if all_images := [image for own_images in images for image in own_images]:
        pixels = processor.image_processor(all_images, return_tensors="pt")["pixel_values"]
        inputs["pixel_values"] = pixels.to(model.dtype)
    output = model.generate(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(limits),
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        logits_processor=[FiniteLogits()],
    )
    answers = [ids[longest : longest + limit] for ids, limit in zip(output, limits, strict=True)]
    ends = {*end_tokens(model.generation_config, tokenizer)}
    cut = [
        None if ends.intersection(ids.tolist()) else limit
        for ids, limit in zip(answers, limits, strict=True)
    ]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [(text.strip(), cut_at) for text, cut_at in zip(texts, cut, strict=True)]


def prompt_ids(
    processor: LlavaProcessor,
    template: str | None,
    question: str,
    images: int,
    image_tokens: int,
) -> list[int]:
    """Return the token ids of the prompt for the answer to a question.

    Args:
        processor: Of the model.
        template: From :func:`llava_bidir.model.build.prompt_template`: that of the training, or None for the
            checkpoint's own chat template.
        question: Without `<image>`.
        images: Number of images before the text.
        image_tokens: T, image tokens per image.
    """
    tokenizer = processor.tokenizer
    if template is not None:
        turns = [{"from": "human", "value": f"{IMAGE}\n{question}" if images else question}]
        tokens = image_tokens * images or None
        return encode(turns, tokenizer, template, tokens, processor.image_token_id)[0]
    text = own_prompt(processor, question, images)
    ids = start_ids(tokenizer, text)
    for token in tokenizer.encode(text, add_special_tokens=False):
        ids += [token] * (image_tokens if token == processor.image_token_id else 1)
    return ids


def run(options: GenerateOptions) -> None:
    """Run `llava-bidir generate`; a single answer is streamed, and answers that were cut are named on stderr."""
    photos, prompts = photos_and_prompts(options.words)
    images = [read_photo(photo) for photo in photos]  # errors come before the model is loaded
    model, processor = load(options.model, options.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    streamer = None
    if len(photos) == len(prompts) == 1:
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for photo, image in zip(photos, images, strict=True):
        shown = [[image]] * len(prompts)
        answers = answer_and_tell_cut(
            model, processor, prompts, shown, options.max_new_tokens, streamer
        )
        if len(photos) > 1:
            print(photo)
        for prompt, (text, cut_at) in zip(prompts, answers, strict=True):
            if streamer is None:
                print(f"{prompt}\n    {text}", flush=True)
            if cut_at is not None:
                told = f"the answer to {prompt!r} was cut after {cut_at} tokens"
                print(told, file=sys.stderr)
