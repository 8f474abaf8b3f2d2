"""A training step beside nanoVLM's, at the same widths: `python -m experiments.real.nanovlm CLONE`.

CLONE is one of github.com/huggingface/nanoVLM. Both models have random weights: a frozen encoder like SigLIP's, of 12
layers of width 384, 8 x 8 image tokens, and an LLM of the shape of SmolLM2-135M. Adapter and LLM train. The batch is
the same: an image a sample, and texts of different lengths, padded. The adapters differ: nanoVLM's is a linear layer,
ours LLaVA's two.

Prints for each, in a process of its own: samples and tokens without padding a second, the peak of memory above that of
the imports, and MFU, whose operations are those of `llava_bidir/training/flops.py` for both. Its peak is what a product
of two large matrices reaches here, or --peak-tflops. On a CPU, seconds are CPU seconds, which other jobs hardly change;
with several --threads, those of all together.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import nn
from transformers import LlamaConfig, SiglipVisionConfig

from experiments.real import real_step
from llava_bidir import LlavaBidirConfig, LlavaBidirForConditionalGeneration
from llava_bidir.model.trainable import set_trainable
from llava_bidir.training.flops import count_flops
from llava_bidir.training.loss import supervised_loss

VOCABULARY = 49_152
IMAGE_ID = VOCABULARY - 1
WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 576, 1536, 30, 9, 3
VISION_WIDTH, VISION_INNER, VISION_LAYERS, VISION_HEADS = 384, 1536, 12, 6
PATCH_PX, SIDE_PX = 16, 128
IMAGE_TOKENS = (SIDE_PX // PATCH_PX) ** 2
TEXT_TOKENS = (20, 40, 60, 80, 100, 120, 140, 160)  # of the samples of a batch
SUPERVISED = 12  # at the end of each
SIDES = ("ours", "nanoVLM")


def make_batch(device: str) -> dict:
    """Return ids, labels and pixels of a batch, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    lengths = [IMAGE_TOKENS + text for text in TEXT_TOKENS]
    shape = (len(lengths), max(lengths))
    ids = torch.randint(100, 10_000, shape, generator=generator)
    ids[:, :IMAGE_TOKENS] = IMAGE_ID
    labels = torch.full_like(ids, -100)
    attended = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        labels[row, length - SUPERVISED : length] = ids[row, length - SUPERVISED : length]
        attended[row, :length] = 1
        ids[row, length:] = 0
    pixels = torch.randn(len(lengths), 3, SIDE_PX, SIDE_PX, generator=generator)
    tensors = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": attended,
        "pixel_values": pixels,
    }
    return {name: x.to(device) for name, x in tensors.items()} | {"lengths": lengths}


def make_ours(batch: dict) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Return our model, and the loss of a step."""
    vision = SiglipVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=VISION_INNER,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=VISION_HEADS,
        image_size=SIDE_PX,
        patch_size=PATCH_PX,
    )
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        pad_token_id=None,
    )
    config = LlavaBidirConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_attention="causal",
        tie_word_embeddings=True,
    )
    model = LlavaBidirForConditionalGeneration(config).to(batch["input_ids"].device)
    set_trainable(model, ["adapter", "llm"])
    is_image = batch["input_ids"] == IMAGE_ID
    supervised = (batch["labels"] != -100).flatten().nonzero().flatten()
    ready = batch | {
        "image_positions": is_image.flatten().nonzero().flatten(),
        "predicts": supervised - 1,
        "supervised": len(supervised),
    }
    return model, lambda: supervised_loss(model, ready)


def make_nanovlm(clone: Path, batch: dict) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Return nanoVLM's model with a frozen encoder, and the loss of a step."""
    processors = ModuleType("data.processors")  # imports much that a step does not need
    processors.get_tokenizer = lambda *args: SimpleNamespace(image_token_id=IMAGE_ID)
    sys.modules |= {"data": ModuleType("data"), "data.processors": processors}
    sys.path.insert(0, str(clone))
    config = import_module("models.config").VLMConfig(
        vit_hidden_dim=VISION_WIDTH,
        vit_inter_dim=VISION_INNER,
        vit_patch_size=PATCH_PX,
        vit_img_size=SIDE_PX,
        vit_n_heads=VISION_HEADS,
        vit_n_blocks=VISION_LAYERS,
        lm_hidden_dim=WIDTH,
        lm_inter_dim=INNER,
        lm_n_heads=HEADS,
        lm_n_kv_heads=KV_HEADS,
        lm_n_blocks=LAYERS,
        lm_vocab_size=VOCABULARY,
        mp_pixel_shuffle_factor=1,
        mp_image_token_length=IMAGE_TOKENS,
    )
    model = (
        import_module("models.vision_language_model")
        .VisionLanguageModel(config, load_backbone=False)
        .to(batch["input_ids"].device)
    )
    model.vision_encoder.requires_grad_(False)

    def loss() -> torch.Tensor:
        return model(
            batch["input_ids"],
            batch["pixel_values"],
            attention_mask=batch["attention_mask"],
            targets=torch.roll(batch["labels"], -1, dims=1),  # as its collator shifts them
        )[1]

    return model, loss


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Return speed, memory and trainable weights of one side."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    batch = make_batch(args.device)
    before = peak_memory(args.device)
    if args.side == "ours":
        model, loss = make_ours(batch)
    else:
        model, loss = make_nanovlm(args.clone, batch)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5)

    losses = []

    def step() -> None:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())  # waits for a GPU

    seconds = real_step.measure(step, args.rounds, clock_of(args.device))
    measured = {
        "seconds": seconds,
        "memory": peak_memory(args.device) - before,
        "trainable": sum(weight.numel() for weight in weights),
        "loss": losses[-1],
    }
    if args.side == "ours":
        flops = count_flops(model, batch["pixel_values"][:1])
        samples = len(batch["lengths"])
        measured["flops"] = flops.of_batch(samples, batch["lengths"], samples * SUPERVISED)
    return measured


def clock_of(device: str) -> Callable[[], float]:
    """Return the clock of a device: time, or CPU time."""
    if device == "cuda":
        return time.perf_counter
    return time.process_time


def peak_memory(device: str) -> float:
    """Return the most memory that this process has held, in bytes: on the GPU, or of the host."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reached_by_a_product(device: str, threads: int) -> float:
    """Return the operations per second of a product of two large float32 matrices."""
    torch.set_num_threads(threads)
    size = 2048
    if device == "cuda":
        size = 8192
    left, right = torch.randn(2, size, size, device=device)
    clock = clock_of(device)
    best = float("inf")
    for _ in range(5):
        started = clock()
        (left @ right).sum().item()
        best = min(best, clock() - started)
    return 2 * size**3 / best


def main() -> None:
    """Print a row for each side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", type=Path, help="clone of nanoVLM")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="of the device (default: measured)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # of the processes
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if args.side:
        print(json.dumps(measure(args)))
        return
    measured = {}
    for side in SIDES:
        command = [sys.executable, "-m", "experiments.real.nanovlm", *sys.argv[1:], "--side", side]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        measured[side] = json.loads(done.stdout.splitlines()[-1])
    if args.peak_tflops:
        peak = 1e12 * args.peak_tflops
    else:
        peak = reached_by_a_product(args.device, args.threads)
    samples = len(TEXT_TOKENS)
    tokens = samples * IMAGE_TOKENS + sum(TEXT_TOKENS)
    print(f"a step of {samples} samples, {tokens} tokens; peak {peak / 1e12:.3g} TFLOP/s")
    print(f"{'':8}  trainable  s/step  samples/s  tokens/s  memory, GB    MFU   loss")
    flops = measured["ours"]["flops"]
    for side, numbers in measured.items():
        seconds = numbers["seconds"]
        print(
            f"{side:8}  {numbers['trainable'] / 1e6:7.1f} M  {seconds:6.2f}  {samples / seconds:9.2f}"
            f"  {tokens / seconds:8.0f}  {numbers['memory'] / 1e9:10.2f}"
            f"  {flops / seconds / peak:5.1%}  {numbers['loss']:5.2f}"
        )


if __name__ == "__main__":
    main()
