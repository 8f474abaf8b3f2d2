"""GPU hours of the training jobs, for the plan of six_configurations.sh: measured by a rehearsal, or at a stated MFU.

    python slurm/gpu_hours.py --rehearsal runs/rehearsal/rehearsal.json --masks causal -- clip
    python slurm/gpu_hours.py --mfu 0.4 --llm lmsys/vicuna-7b-v1.5 --masks causal bidirectional -- clip siglip

Prints `at ASSUMPTION`, then `ENCODER-MASK/STAGE HOURS` for each job that is known.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from llava_bidir.common.atomic_io import read_json
from llava_bidir.common.errors import UserError, one_line_errors

STAGES = ("stage1", "stage2")
TRAINABLE = {"stage1": ["adapter"], "stage2": ["adapter", "llm"]}


def main() -> None:
    """Print the hours."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("encoders", nargs="+", help="names of configs")
    parser.add_argument("--masks", nargs="+", required=True)
    parser.add_argument("--rehearsal", type=Path, help="rehearsal.json of `probes rehearse`")
    parser.add_argument(
        "--mfu", type=float, help="share of the peak, as TensorBoard has it in train/mfu"
    )
    parser.add_argument(
        "--peak-tflops", type=float, default=989, help="of a GPU; 989: H100, bfloat16"
    )
    parser.add_argument(
        "--text-tokens", type=int, nargs=2, default=(20, 300), help="of a sample, per stage"
    )
    parser.add_argument("--llm", help="directory or hub id of the LLM")
    parser.add_argument("--encoder-configs", type=Path, default=Path("configs/encoder"))
    args = parser.parse_args()
    with one_line_errors("gpu_hours"):
        if args.rehearsal is not None:
            jobs = measured_hours(args)
        else:
            jobs = computed_hours(args)
        for line in jobs:
            print(line)


def measured_hours(args: argparse.Namespace) -> Iterator[str]:
    """Yield the hours of the real run by a rehearsal, whose encoder stands for all."""
    record = read_json(args.rehearsal)
    if not record["cost"]:
        raise UserError(f"{args.rehearsal} has no measured speed yet")
    hours = {part["part"]: part["device_hours"] for part in record["cost"]}
    devices = record["devices"]
    yield (
        f"at the speed of {args.rehearsal}: {record['size']} with {record['encoder']} on {len(devices)} x "
        f"{devices[0]}, with samples of its length"
    )
    for encoder in args.encoders:
        for mask in args.masks:
            for stage in STAGES:
                if f"{mask}_{stage}" in hours:
                    yield f"{encoder}-{mask}/{stage} {hours[f'{mask}_{stage}']:.1f}"


def computed_hours(args: argparse.Namespace) -> Iterator[str]:
    """Yield the hours of the real run at a share of the GPU's peak."""
    if not 0 < args.mfu <= 1:
        raise UserError(f"MFU={args.mfu} must be a share of the peak, above 0 and at most 1")
    import yaml  # these take seconds, which a rehearsal's hours do not need

    from llava_bidir.model.encoders import Encoder
    from probes.rehearsal.cost import RECORDS

    per_second = args.mfu * args.peak_tflops * 1e12
    first, second = args.text_tokens
    yield (
        f"at an MFU of {args.mfu:g} of {args.peak_tflops:g} TFLOP/s, and {first} text tokens a caption, {second} a "
        "dialogue"
    )
    for name in args.encoders:
        config = yaml.safe_load((args.encoder_configs / f"{name}.yaml").read_text())
        encoder = Encoder(**config["model"]["encoder"])
        hours = {
            stage: count
            * count_sample(encoder, args.llm, TRAINABLE[stage], tokens)
            / per_second
            / 3600
            for (stage, count), tokens in zip(RECORDS.items(), args.text_tokens, strict=True)
        }
        for mask in args.masks:
            for stage in STAGES:
                yield f"{name}-{mask}/{stage} {hours[stage]:.1f}"


def count_sample(encoder, llm: str, trainable: list[str], text_tokens: int) -> float:
    """Return the operations of a sample with an image, forward and backward, of which all text is supervised.

    Args:
        encoder: `llava_bidir.model.encoders.Encoder`.
        llm: Directory or hub id of the LLM, of which only the config is read.
        trainable: Parts that train.
        text_tokens: Tokens besides those of the image.
    """
    import torch

    from llava_bidir.model.build import build_config, set_trainable
    from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration
    from llava_bidir.training.flops import count_flops

    config = build_config(
        encoder,
        llm,
        image_token_id=0,
        image_attention="causal",  # FLOPs count all pairs of tokens
        image_resize="pad",
    )
    with torch.device("meta"):  # no weights
        model = LlavaBidirForConditionalGeneration._from_config(config, attn_implementation="sdpa")
        side = encoder.image_processor(config.vision_config, "pad").crop_size
        image = torch.zeros(1, 3, side["height"], side["width"])
    set_trainable(model, trainable)
    flops = count_flops(model, image)
    return flops.of_batch(1, [config.image_seq_length + text_tokens], text_tokens)


if __name__ == "__main__":
    main()
