"""Steps of a rehearsal: the project's own commands with the real configs on the inputs of inputs.py."""

from dataclasses import dataclass
from pathlib import Path

import torch

from llava_bidir.common.steps import Step

from .inputs import ARMS, PROBED, QUESTION, STEPS, STUDY

MASKS = ("causal", "bidirectional")
STAGES = ("stage1", "stage2")
VQA_PYTHON = Path(".venv-vqa/bin/python")
# Largest real micro-batch that fits a CPU's patience; GPUs have the configs' own.
CPU_BATCH = 1
LORA = "lora_24gb"


@dataclass(frozen=True)
class RehearsalStep(Step):
    """A command of the study, "llava_bidir" or "probes" first; its result is its log. The others run if it fails.

    Args:
        events: Run folder with TensorBoard events to take the speed from, if it is a training.
        samples: Samples of an optimizer step.
    """

    events: Path | None = None
    samples: int = 1


def rehearsal_step(
    out: Path,
    name: str,
    command: list[str],
    events: Path | None = None,
    samples: int = 1,
) -> RehearsalStep:
    """Return the step of a command, with its log below OUT."""
    return RehearsalStep(
        name,
        tuple(command),
        result=out / "logs" / f"{name}.log",
        kind=name,
        optional=True,
        events=events,
        samples=samples,
    )


def micro_batch_size(stage: str) -> int:
    """Return the samples of a device per forward: those of the config that is rehearsed."""
    if not torch.cuda.is_available():
        return CPU_BATCH
    if torch.cuda.device_count() == 1 and stage == "stage2":
        return 1  # of the LoRA budget
    return {"stage1": 32, "stage2": 16}[stage]


def batch_size(stage: str) -> int:
    """Return the samples of an optimizer step; gradients are not accumulated."""
    return micro_batch_size(stage) * max(torch.cuda.device_count(), 1)


def hardware_options(stage: str, size: str) -> list[str]:
    """Return how a stage is run on this machine: ZeRO on several GPUs, frozen weights in bfloat16 and LoRA on one.

    A CPU has no fast bfloat16, so all but 7b, which would not fit, are trained in fp32 there.
    """
    devices = torch.cuda.device_count()
    if devices > 1:
        return ["-c", "zero2" if stage == "stage1" else "zero3"]
    options = ["-c", LORA] if stage == "stage2" else ["--model.loss_average", "tokens"]
    options += ["--trainer.devices", "1", "--trainer.accelerator", "gpu" if devices else "cpu"]
    if devices or size == "7b":
        return [*options, "--model.frozen_dtype", "bfloat16"]
    return [*options, "--model.frozen_dtype", "float32", "--trainer.precision", "32-true"]


def plan_study(out: Path, size: str, encoder: str) -> list[RehearsalStep]:
    """Return all steps of a rehearsal in order; none of them needs a later one."""
    inputs = out / "inputs"
    ask = _llava(
        "generate",
        inputs / "llava-hf",
        inputs / "pictures/000000.jpg",
        QUESTION,
        "--max-new-tokens",
        2,
    )
    if not torch.cuda.is_available():
        ask += ["--dtype", "bfloat16"]  # ten times as fast as the checkpoint's float16
    steps = [
        rehearsal_step(out, "published_sites", _probes("sites", inputs / "llava-hf")),
        rehearsal_step(out, "published_generate", ask),
    ]
    for mask in MASKS:
        steps += _training(out, inputs, size, encoder, mask)
    models = [f"{mask}={out / mask / 'stage2/hf'}" for mask in MASKS]
    data = ("ade20k", "--data.root", inputs / "ade/ADEChallengeData2016", "--out", out)
    study = _probes(
        "study",
        *models,
        *data,
        "--arms",
        *ARMS.split(),
        *STUDY.split(),
    )
    steps.append(
        rehearsal_step(
            out,
            "study",
            study,
            events=out / "causal/probes",
            samples=PROBED,
        )
    )
    if VQA_PYTHON.is_file():  # `make vqa-venv` makes it
        ask = _llava(
            "vqa",
            out / "causal/stage2/hf",
            "--tasks",
            "toy",
            "--data",
            inputs,
            "--python",
            VQA_PYTHON,
        )
        steps.append(rehearsal_step(out, "benchmarks", [*ask, "--out", str(out / "causal/vqa")]))
    return steps


def _llava(*words: object) -> list[str]:
    return ["llava_bidir", *map(str, words)]


def _probes(*words: object) -> list[str]:
    return ["probes", *map(str, words)]


def _training(
    out: Path,
    inputs: Path,
    size: str,
    encoder: str,
    mask: str,
) -> list[RehearsalStep]:
    """Return both stages under a mask."""
    steps = []
    for stage in STAGES:
        run = out / mask / stage
        data = "captions" if stage == "stage1" else "dialogues"
        real = ["-c", stage, "-c", encoder]
        real += ["--model.encoder.path", inputs / encoder, "--model.llm", inputs / "vicuna"]
        real += ["--data.annotations", inputs / f"{data}.json", "--data.images", inputs]
        options = ["--model.image_attention", mask, "--data.batch_size", batch_size(stage)]
        # A worker is a fork that keeps the trained weights as they were, 1.4 GB under the LoRA budget on a CPU.
        options += ["--data.micro_batch_size", micro_batch_size(stage)]
        options += ["--data.num_workers", int(torch.cuda.is_available())]
        options += ["--trainer.max_steps", STEPS, "--trainer.log_every_n_steps", 1]
        if stage == "stage2":
            options += ["--model.adapter", out / mask / "stage1/hf"]
        command = _llava("fit", *real, *hardware_options(stage, size), *options)
        command += ["--out", str(run), "--ckpt_path", "last"]
        steps.append(
            rehearsal_step(
                out,
                f"{mask}_{stage}",
                command,
                events=run,
                samples=batch_size(stage),
            )
        )
    return steps
