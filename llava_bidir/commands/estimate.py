"""`llava-bidir estimate`: parameters, FLOPs and memory of a training config, without weights or a GPU.

Parameters and FLOPs are counted on the model, built on the meta device. Memory is estimated.
"""

import json
from typing import Any

import torch

from llava_bidir.common.errors import UserError
from llava_bidir.common.usage_errors import ArgumentParser, count
from llava_bidir.model.activation_checkpointing import count_checkpointed
from llava_bidir.model.build import build_config, padded_vocab_size, set_trainable
from llava_bidir.model.lora import add_lora
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.training.cli import TrainingCLI, build_data_cli
from llava_bidir.training.module import LlavaTraining
from llava_bidir.training.throughput import step_flops

# Activation bytes per token, layer and unit of width. Source: Korthikanti et al. 2022 (arXiv 2205.05198, Eq. 1):
# 34 s b h, without the attention matrix, which fused kernels never store.
ACTIVATION_BYTES = 34


def build_empty(module: LlavaTraining) -> LlavaBidirForConditionalGeneration:
    """Return the model that `module` trains, on the meta device."""
    args, tokenizer = module.hparams, module.processor.tokenizer
    image_token_id = module.processor.image_token_id
    config = build_config(module.encoder, args.llm, image_token_id, args.image_attention, args.image_resize)
    config.text_config.vocab_size = padded_vocab_size(config.text_config.vocab_size, len(tokenizer))
    with torch.device("meta"):
        model = LlavaBidirForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    if module.lora:
        add_lora(model, module.lora)
    set_trainable(model, args.trainable)
    return model


def estimate_run(cli: TrainingCLI, devices: int, length: int) -> dict[str, Any]:
    """Estimate the size and cost of a run.

    Args:
        cli: Model and data of the config.
        devices: Number of GPUs.
        length: Tokens per sample, image tokens included.

    Returns:
        {"parameters": {part: count}, "trains": count, "step_flops": FLOPs per optimizer step over all devices,
        "memory_gb": {"zero2": ..., "zero3": ...} per device, and the settings}

    Raises:
        UserError: `length` leaves no room for text.
    """
    model, batch = build_empty(cli.model), cli.datamodule.batch_size
    parts = {
        "encoder": model.model.vision_tower,
        "adapter": model.model.multi_modal_projector,
        "llm": model.model.language_model,
        "lm_head": model.lm_head,
    }
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    predictions = length - model.config.image_seq_length
    if predictions < 1:
        raise UserError(f"--length {length} leaves no text after {model.config.image_seq_length} image tokens")
    checkpointing, chunk = cli.model.hparams.gradient_checkpointing, cli.model.hparams.loss_chunk
    activations = _activation_bytes(model, cli.datamodule.micro_batch_size, length, checkpointing, chunk)
    total = sum(parameters.values())
    states = (2 + 12) * trains / devices  # bf16 gradients, and fp32 weights with AdamW's two moments
    return {
        "encoder": cli.model.encoder.name,
        "image_attention": model.config.image_attention,
        "parameters": parameters,
        "total": total,
        "trains": trains,
        "length": length,
        "batch_size": batch,
        "devices": devices,
        "step_flops": step_flops(model)([length] * batch, predictions * batch, batch),
        "memory_gb": {
            "zero2": (2 * total + states + activations) / 1e9,
            "zero3": (2 * total / devices + states + activations) / 1e9,
        },
    }


def _activation_bytes(
    model: LlavaBidirForConditionalGeneration,
    samples: int,
    length: int,
    checkpointing: bool | int,
    loss_chunk: int | None = None,
) -> float:
    """Return the activation bytes of a micro-batch.

    With gradient checkpointing, these are the inputs of the checkpointed layers and all activations of the others, or
    of one. Logits are stored in bf16 and fp32 with their gradient.
    """
    text = model.config.text_config
    tokens, layers = samples * length, text.num_hidden_layers
    layer = ACTIVATION_BYTES * tokens * text.hidden_size
    predictions = samples * (length - model.config.image_seq_length)
    logits = 10 * min(predictions, loss_chunk or predictions) * text.vocab_size
    recomputed = count_checkpointed(checkpointing, layers)
    return logits + 2 * recomputed * tokens * text.hidden_size + max(layers - recomputed, 1) * layer


def format_estimate(estimate: dict[str, Any]) -> str:
    """Return the result of :func:`estimate_run` as text."""
    parts = "   ".join(f"{name} {count:,}" for name, count in estimate["parameters"].items())
    memory = "   ".join(f"{name} {gb:.0f} GB" for name, gb in estimate["memory_gb"].items())
    return (
        f"{estimate['encoder']}, {estimate['image_attention']}\n"
        f"  parameters   {parts}\n"
        f"               {estimate['total']:,} in total, {estimate['trains']:,} trainable\n"
        f"  step         {estimate['batch_size']} samples of {estimate['length']} tokens: "
        f"{estimate['step_flops'] / 1e15:.2f} PFLOP, forward and backward\n"
        f"  memory       {memory}, on each of {estimate['devices']} devices (estimate)"
    )


def main(argv: list[str]) -> None:
    """Run `llava-bidir estimate`."""
    parser = ArgumentParser(
        prog="llava-bidir estimate",
        description="Estimate parameters, FLOPs and memory of a training config, without weights. All other options "
        "are those of `llava-bidir fit` (-c CONFIG ..., --model.image_attention ...).",
    )
    parser.add_argument("--devices", type=count, default=8, metavar="N", help="number of GPUs")
    parser.add_argument("--length", type=count, metavar="N", help="tokens per sample (default: data.max_length)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    args, config = parser.parse_known_args(argv[1:])
    cli = build_data_cli(config, parser.prog)
    estimate = estimate_run(cli, args.devices, args.length or cli.datamodule.collate.max_length)
    print(json.dumps(estimate) if args.json else format_estimate(estimate))
