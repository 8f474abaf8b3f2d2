"""`llava-bidir generate`: answers about an image."""

import argparse
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

from . import modeling  # noqa: F401 - makes the Auto classes know our models
from .data.collate import pad
from .data.conversation import IMAGE, encode


def generate(model: str, image: Path, prompts: list[str], max_new_tokens: int = 256) -> list[str]:
    """Greedy answers to `prompts` about one image; a single one is also streamed to the terminal.

    Raises:
        ValueError: The image cannot be read.
    """
    try:
        picture = Image.open(image).convert("RGB")
    except (FileNotFoundError, UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image {image} cannot be read: {error}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype="auto").to(device).eval()
    processor = AutoProcessor.from_pretrained(model)
    tokenizer = processor.tokenizer
    rows = [
        encode(
            [{"from": "human", "value": f"{IMAGE}\n{prompt}"}],
            tokenizer,
            "vicuna_v1",
            loaded.config.image_seq_length,
            processor.image_token_id,
        )[0]
        for prompt in prompts
    ]
    pixels = processor.image_processor([picture] * len(rows), return_tensors="pt")["pixel_values"]
    ids = pad(rows, tokenizer.pad_token_id, "left")
    output = loaded.generate(
        input_ids=ids.to(device),
        attention_mask=pad([[1] * len(row) for row in rows], 0, "left").to(device),
        pixel_values=pixels.to(device, loaded.dtype),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if len(rows) == 1 else None,
    )
    return [text.strip() for text in tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)]


def run(args: argparse.Namespace) -> None:
    """`llava-bidir generate`."""
    answers = generate(args.model, args.image, args.prompt, args.max_new_tokens)
    if len(args.prompt) > 1:
        for prompt, answer in zip(args.prompt, answers, strict=True):
            print(f"{prompt}\n    {answer}")
