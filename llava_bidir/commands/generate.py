"""`llava-bidir generate`: answer questions about photos."""

import os
import re
from itertools import filterfalse

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    LlavaProcessor,
    PreTrainedModel,
    TextStreamer,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_bidir.command_options import GenerateOptions
from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.hf import (
    FiniteLogits,
    greedy_config,
    load_weights,
    max_positions,
    read_model_config,
    read_pretrained,
)
from llava_bidir.common.images import SUFFIXES, read_photo
from llava_bidir.model import modeling_llava_bidir  # noqa: F401 - registers our models with the Auto classes
from llava_bidir.model.build import CHAT_TEMPLATE, IMAGES_IN_CHAT


def is_photo(word: str) -> bool:
    """Return whether a word is a path, or is written like one: a folder or a mistyped name is no question."""
    if os.path.exists(word) or word.lower().endswith(SUFFIXES):
        return True
    return re.fullmatch(r"\S+(/\S+|\.\w{3,4})", word) is not None  # photo.heic, photos/a


def load_with_processor(
    model: str, dtype: str = "auto", trust: bool = False
) -> tuple[PreTrainedModel, LlavaProcessor]:
    """Return model and processor of a checkpoint, ours or transformers' llava.

    Released llavas are asked as LLaVA-1.5 was evaluated: about padded images (LLaVA mm_utils.py process_images), which
    CLIP's processor would crop, and with the system prompt, which the chat template of llava-hf lacks. A llava of
    another LLM keeps its own chat template. With `trust`, a mask of its own may be run (common/exported_masks.py).

    Raises:
        UserError: There is no such checkpoint, it is no LLaVA, its mask would be ignored or is not trusted, or it looks
            for image tokens of another id than its tokenizer's.
    """
    # first, since these errors say more than those of the weights
    read_image_attention(read_model_config("MODEL", model, trust=trust))
    loaded = load_weights("MODEL", AutoModelForImageTextToText, model, dtype=dtype).eval()
    processor = read_pretrained("MODEL", AutoProcessor, model)
    ids = (loaded.config.image_token_id, processor.image_token_id)
    if ids[0] != ids[1]:
        raise UserError(
            f"MODEL: {model}: image_token_index is {ids[0]} in config.json, but {processor.image_token} has the id "
            f"{ids[1]} in the tokenizer; correct config.json"
        )
    loaded.generation_config = greedy_config(loaded.generation_config, processor.tokenizer)
    processor.chat_template = as_evaluated(processor.chat_template)
    images = processor.image_processor
    if images.do_pad is None:  # CLIP's processor has no such option
        settings = images.to_dict() | {"do_pad": True}
        processor.image_processor = LlavaImageProcessorPil.from_dict(settings)
    return loaded, processor


def as_evaluated(chat_template: str | None) -> str:
    """Return the chat template with which a checkpoint is asked: that of training instead of LLaVA-1.5's or none."""
    template = chat_template or CHAT_TEMPLATE
    is_own = template.startswith(IMAGES_IN_CHAT) or "ASSISTANT:" not in template
    return template if is_own else CHAT_TEMPLATE


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


def build_prompts(
    processor: LlavaProcessor, questions: list[str], images: list[list[Image.Image]]
) -> BatchFeature:
    """Return the inputs of a batch of questions by the processor's chat template, padded on the left.

    Args:
        processor: From :func:`load_with_processor`.
        questions: Questions without `<image>`.
        images: Images per question, placed before the text.
    """
    conversations = []
    for question, shown in zip(questions, images, strict=True):
        content = [{"type": "image", "image": image} for image in shown]
        content.append({"type": "text", "text": question})
        conversations.append([{"role": "user", "content": content}])
    with error_context("MODEL's chat template"):
        return processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )


def answer(
    model: PreTrainedModel,
    processor: LlavaProcessor,
    questions: list[str],
    images: list[list[Image.Image]],
    max_new_tokens: int,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """Return greedy answers to a batch of questions.

    Args:
        model: Our model or transformers' llava.
        processor: Processor of the model.
        questions, images: As for :func:`build_prompts`.
        max_new_tokens: Maximum tokens per answer; fewer if the LLM has no positions left.
        streamer: Prints the answer during generation.

    Raises:
        UserError: A prompt exceeds the LLM's positions, or logits are NaN or infinite.
    """
    inputs = build_prompts(processor, questions, images).to(model.device, model.dtype)
    positions = max_positions(model.config)
    longest = inputs["input_ids"].shape[1]
    lengths = inputs["attention_mask"].sum(1).tolist()
    if longest >= positions:
        limit = f"the LLM has {positions} positions (max_position_embeddings)"
        raise UserError(f"a prompt has {longest} tokens, but {limit}; shorten it")
    # per row, so that an answer does not depend on the other rows of its batch
    limits = [min(max_new_tokens, positions - length) for length in lengths]
    output = model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(limits),
        pad_token_id=processor.tokenizer.pad_token_id,
        streamer=streamer,
        logits_processor=[FiniteLogits()],
    )
    answers = [ids[longest : longest + limit] for ids, limit in zip(output, limits, strict=True)]
    texts = processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [text.strip() for text in texts]


def run(options: GenerateOptions) -> None:
    """Run `llava-bidir generate`; a single answer is streamed.

    Raises:
        UserError: There are no photos or no questions.
    """
    photos = [*filter(is_photo, options.words)]
    prompts = [*filterfalse(is_photo, options.words)]
    if not photos or not prompts:
        raise UserError(f"expected IMAGE ... PROMPT ..., got images {photos} and prompts {prompts}")
    images = [read_photo(photo) for photo in photos]  # errors come before the model is loaded
    model, processor = load_with_processor(options.model, options.dtype, options.trust)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    streamer = None
    if len(photos) == len(prompts) == 1:
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for photo, image in zip(photos, images, strict=True):
        shown = [[image]] * len(prompts)
        answers = answer(
            model,
            processor=processor,
            questions=prompts,
            images=shown,
            max_new_tokens=options.max_new_tokens,
            streamer=streamer,
        )
        if len(photos) > 1:
            print(photo)
        if streamer is None:
            for prompt, text in zip(prompts, answers, strict=True):
                print(f"{prompt}\n    {text}", flush=True)
