"""CPU time of a training step of `make real`, by part and by number of image tokens.

    python -m experiments.real.real_step ENCODER LLM --sides 112 168 224 [--bfloat16] [--attention eager]

Prints the CPU seconds of 8 samples, two micro-batches with random pixels and ids: the encoder alone, stage 1, stage 2
and its optimizer. CPU time, not wall time, so that a busy machine does not change it much.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.encoders import Encoder
from llava_bidir.model.trainable import set_trainable
from llava_bidir.training.loss import supervised_loss

SAMPLES = 4  # of a micro-batch
MICRO_BATCHES = 2
CAPTION_TOKENS = 15  # a sentence of Flickr8k
DIALOGUE_TOKENS = 92  # mean of the conversations that `run.py --photos` mixes, without the picture
ANSWER_TOKENS = 2  # of each question, with the end


def measure(
    f: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time
) -> float:
    """Return the median seconds of a call by `clock`, CPU seconds by default, after one that is not counted."""
    f()
    seconds = []
    for _ in range(repeats):
        started = clock()
        f()
        seconds.append(clock() - started)
    return statistics.median(seconds)


def build_batch(model, image_tokens: int, side_px: int, text: int, supervised: int) -> dict:
    """Return a batch of random samples: an image, then text whose last tokens are supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 10_000, (SAMPLES, image_tokens + text), generator=generator)
    ids[:, 1 : 1 + image_tokens] = model.config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -supervised:] = ids[:, -supervised:]
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": torch.randn(SAMPLES, 3, side_px, side_px, generator=generator),
        "image_positions": (ids == model.config.image_token_id).flatten().nonzero().flatten(),
        "predicts": (labels != -100).flatten().nonzero().flatten() - 1,
        "supervised": SAMPLES * supervised,
    }


@torch.no_grad()
def encode(model, batch: dict) -> None:
    """Compute the features of a batch's images."""
    model.model.vision_tower(batch["pixel_values"], output_hidden_states=True)


def step(model, batch: dict, bfloat16: bool) -> None:
    """Compute the gradients of a micro-batch, in float32 or mixed precision."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = supervised_loss(model, batch)
    loss.backward()


def main() -> None:
    """Print a row of seconds for each side of the encoder's square."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encoder", help="DINOv2, from experiments.real.import_dinov2")
    parser.add_argument("llm", help="language model, from experiments.real.import_gguf")
    parser.add_argument("--sides", type=int, nargs="+", default=[112, 168, 224])
    parser.add_argument("--mask", default="causal")
    parser.add_argument("--bfloat16", action="store_true", help="as --trainer.precision bf16-mixed")
    parser.add_argument("--attention", default="sdpa", help="sdpa or eager")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("side  tokens  encoder  stage 1  stage 2  optimizer  (CPU seconds of 8 samples)")
    for side in args.sides:
        print(measure_side(args, side), flush=True)


def measure_side(args: argparse.Namespace, side: int) -> str:
    """Return the row of a side of the encoder's square."""
    encoder = Encoder("dinov2", args.encoder, image_px=side)
    processor = build_processor(encoder, llm=args.llm, image_resize="pad", template="chat")
    model = build_model(
        encoder,
        llm=args.llm,
        processor=processor,
        image_attention=args.mask,
        attn_implementation=args.attention,
    )
    tokens = model.config.image_seq_length
    captions = build_batch(
        model, image_tokens=tokens, side_px=side, text=CAPTION_TOKENS, supervised=CAPTION_TOKENS
    )
    dialogues = build_batch(
        model, image_tokens=tokens, side_px=side, text=DIALOGUE_TOKENS, supervised=6 * ANSWER_TOKENS
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
        encoded = measure(partial(encode, model, captions), args.repeats)
    set_trainable(model, ["adapter"])
    stage1 = measure(partial(step, model, captions, args.bfloat16), args.repeats)
    set_trainable(model, ["adapter", "llm"])
    stage2 = measure(partial(step, model, dialogues, args.bfloat16), args.repeats)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-6)
    update = measure(optimizer.step, args.repeats)
    seconds = [MICRO_BATCHES * of_batch for of_batch in (encoded, stage1, stage2)]
    columns = "  ".join(f"{value:7.2f}" for value in seconds)
    return f"{side:4}  {tokens:6}  {columns}  {update:9.2f}"


if __name__ == "__main__":
    main()
