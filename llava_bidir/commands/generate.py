"""`llava-bidir generate`: answers about an image."""

import argparse
from pathlib import Path

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

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf_loading import load_weights, read_pretrained
from llava_bidir.data.collate import pad
from llava_bidir.data.conversation import IMAGE, encode
from llava_bidir.data.image_folder import read_image
from llava_bidir.model import modeling_llava_bidir  # noqa: F401 - makes the Auto classes know our models


def generate(model: str, image: Path, prompts: list[str], max_new_tokens: int = 256) -> list[str]:
    """Greedy answers to `prompts` about one image; a single one is also streamed to the terminal.

    Raises:
        BadImage: The image cannot be read.
    """
    picture = read_image(image)
    loaded, processor = load(model)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    return answer(
        loaded, processor, prompts, [[picture]] * len(prompts), max_new_tokens, streamer if len(prompts) == 1 else None
    )


def load(model: str, dtype: str = "auto") -> tuple[PreTrainedModel, LlavaProcessor]:
    """A checkpoint to ask questions, ours or transformers' llava.

    Released llava checkpoints come with CLIP's processor, which crops; LLaVA-1.5 was evaluated on padded images, and so
    are they here. Source: LLaVA mm_utils.py process_images.
    """
    config = read_pretrained("MODEL", AutoConfig, model)
    loaded = load_weights("MODEL", AutoModelForImageTextToText, model, config, dtype=dtype).eval()
    processor = read_pretrained("MODEL", AutoProcessor, model)
    images = processor.image_processor
    if images.do_pad is None:  # it knows of no padding
        settings = {
            name: getattr(images, name) for name in ("size", "crop_size", "image_mean", "image_std", "resample")
        }
        processor.image_processor = LlavaImageProcessorPil(do_pad=True, **settings)
    return loaded, processor


def answer(
    model: PreTrainedModel,
    processor: LlavaProcessor,
    questions: list[str],
    images: list[list[Image.Image]],
    max_new_tokens: int,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """Greedy answers to a batch of questions, in the prompt of training (vicuna_v1) and padded on the left.

    Args:
        model: Ours or transformers' llava.
        processor: The model's.
        questions: Without `<image>`.
        images: Of each question; several stand one behind the other, before the text.
        max_new_tokens: Longest answer; shorter where the LLM has no positions left.
        streamer: Shows the answer as it is written.

    Raises:
        UserError: A prompt is longer than the LLM has positions for.
    """
    tokenizer, positions = processor.tokenizer, model.config.get_text_config().max_position_embeddings
    rows = []
    for text, shown in zip(questions, images, strict=True):
        turns = [{"from": "human", "value": f"{IMAGE}\n{text}" if shown else text}]
        tokens = model.config.image_seq_length * len(shown) or None
        rows.append(encode(turns, tokenizer, "vicuna_v1", tokens, processor.image_token_id)[0])
    longest = max(map(len, rows))
    if longest >= positions:
        raise UserError(f"a prompt of {longest} tokens; the LLM has {positions} positions (max_position_embeddings)")
    room = [min(max_new_tokens, positions - len(row)) for row in rows]  # of each, or it would depend on its batch
    inputs = {
        "input_ids": pad(rows, tokenizer.pad_token_id, "left"),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, "left"),
    }
    if pictures := [picture for shown in images for picture in shown]:
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        inputs["pixel_values"] = pixels.to(model.dtype)
    output = model.generate(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(room),
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
    )
    answers = [ids[longest : longest + new] for ids, new in zip(output, room, strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def run(args: argparse.Namespace) -> None:
    """`llava-bidir generate`."""
    answers = generate(args.model, args.image, args.prompt, args.max_new_tokens)
    if len(args.prompt) > 1:
        for prompt, answer in zip(args.prompt, answers, strict=True):
            print(f"{prompt}\n    {answer}")
