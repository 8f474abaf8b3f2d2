"""GPU-hours of LLaVA-1.5's two stages by `llava-bidir fit --dry-run`: the table of llava_bidir/README.md.

    python tests/bench/gpu_hours.py

Models are configs alone, with the shapes of Vicuna-7B and of the three encoders. Records are those of records.py, as
long as LLaVA's; captions have ten words. Their number is LLaVA's, by the number of steps.
"""

import contextlib
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from records import WORDS, write_world
from transformers import CLIPVisionConfig, Dinov2Config, LlamaConfig, SiglipVisionConfig

import llava_bidir.cli

RECORDS = 1_024
MFU = 0.4
GPUS = {"A100": 312, "H100": 989}  # TFLOP/s in bfloat16, by NVIDIA's data sheets
STEPS = {"stage1": 2_181, "stage2": 5_198}  # of LLaVA's records: 558,128 / 256 and 665,298 / 128
TRAININGS = (  # the stage, and the rest of the command
    "stage1 -c zero2",
    "stage2 -c zero3",
    "stage2 -c zero3 --model.trainable [encoder,adapter,llm]",
)
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
ENCODERS = {
    "clip": CLIPVisionConfig(**LARGE, image_size=336, patch_size=14),
    "dinov2": Dinov2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=518,
        patch_size=14,
    ),
    "siglip": SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    ),
}


def write_shapes(root: Path) -> None:
    """Write configs of a 7B and of encoders, records and captions."""
    write_world(root, RECORDS)
    LlamaConfig(vocab_size=32_000).save_pretrained(root / "llm")
    for name, config in ENCODERS.items():
        config.save_pretrained(root / name)
    answers = {"from": "gpt", "value": " ".join(WORDS[:10])}
    turns = [{"from": "human", "value": "<image>\n"}, answers]
    captions = [{"image": "0.png", "conversations": turns}] * RECORDS
    (root / "captions.json").write_text(json.dumps(captions))


def gpu_hours(root: Path, encoder: str, training: str) -> dict[str, float]:
    """Return the GPU-hours of a training by GPU."""
    stage, *rest = training.split()
    annotations = {"stage1": "captions.json", "stage2": "data.json"}[stage]
    words = f"fit --dry-run --json --mfu {MFU} -c {stage} -c {encoder}".split() + rest
    words += f"--model.encoder.path {root / encoder} --model.llm {root / 'llm'}".split()
    words += f"--data.annotations {root / annotations} --data.images {root}".split()
    words += "--model.adapter null --trainer.max_epochs -1".split()
    words += ["--trainer.max_steps", str(STEPS[stage])]
    words += ["--throughput.peak_tflops", str(GPUS["A100"])]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        llava_bidir.cli.main(words)
    costs = json.loads(printed.getvalue().splitlines()[-1])
    return {gpu: costs["gpu_hours"] * GPUS["A100"] / tflops for gpu, tflops in GPUS.items()}


def table() -> str:
    """Return the rows of the table: hours on eight GPUs of each kind, by training."""
    rows = []
    with TemporaryDirectory() as folder:
        write_shapes(Path(folder))
        for encoder in ENCODERS:
            of_trainings = [gpu_hours(Path(folder), encoder, training) for training in TRAININGS]
            hours = [f"{by_gpu[gpu] / 8:.1f}" for gpu in GPUS for by_gpu in of_trainings]
            rows.append(f"| {encoder} | {' | '.join(hours)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
