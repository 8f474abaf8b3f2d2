"""What a training costs, of its settings and data alone: steps, tokens, memory, time, and size on disk."""

from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning import Trainer

from llava_bidir.common.runs import optimizer_steps
from llava_bidir.data.collate import Batch
from llava_bidir.data.conversation import IGNORE_INDEX
from llava_bidir.data.datamodule import InstructionData
from llava_bidir.model.lora import UPDATES
from llava_bidir.model.trainable import part_of

from .flops import count_flops
from .module import LlavaTraining
from .step_memory import FP32, Spread, StepMemory, count_trained, step_memory, stored_bytes

GB = 1e9
SAMPLED = 1024  # records whose tokens are counted
LONGEST = 8  # micro-batches, by words, of which the one with most tokens is run
TOKENS_A_WORD = 1.4  # of English, to tell long micro-batches from short ones


@dataclass(frozen=True)
class PartOfModel:
    """A part of the model, its number of parameters, whether any train, and how many."""

    part: str
    parameters: int
    trains: bool
    trained: int

    @property
    def moments(self) -> int:
        """Return the bytes of AdamW's two moments, on all devices together."""
        return 2 * FP32 * self.trained

    def describe(self) -> str:
        """Return what trains of it."""
        if not self.trains:
            return "frozen"
        if self.trained < self.parameters:
            return f"{self.trained / 1e6:,.1f} M train"
        return "trains"


@dataclass(frozen=True)
class SampledRecords:
    """Counts of records that stand for all.

    Args:
        lengths: Tokens of each record, image tokens included.
        images: Images of all of them.
        supervised: Supervised tokens of all of them.
        missing_images: Their images that are not there.
    """

    lengths: list[int]
    images: int
    supervised: int
    missing_images: list[str]


@dataclass(frozen=True)
class TrainingCosts:
    """What a training costs.

    Args:
        steps: Optimizer steps.
        samples: Samples of all steps.
        tokens: Tokens of all steps, without padding, from a sample of the records.
        supervised: Those that are trained on.
        parts: Parts of the model.
        memory: Of a step.
        checkpointing: Whether activations are recomputed in it (`model.gradient_checkpointing`).
        other_memory: Of a step that does not recompute them, or does.
        flops_per_step: Operations of all GPUs, as the MFU counts them.
        devices: Number of GPUs.
        tflops: 10^12 operations per second that a GPU is supposed to do.
        checkpoint, export: Bytes on disk.
        missing_images: Images of sampled records that are not there.
    """

    steps: int
    samples: int
    tokens: int
    supervised: int
    parts: list[PartOfModel]
    memory: StepMemory
    checkpointing: bool
    other_memory: StepMemory
    flops_per_step: float
    devices: int
    tflops: float
    checkpoint: float
    export: float
    missing_images: list[str]

    @property
    def gpu_hours(self) -> float:
        """Return the hours of all GPUs together."""
        return self.steps * self.flops_per_step / (1e12 * self.tflops) / 3600

    @property
    def hours(self) -> float:
        """Return the hours from start to end."""
        return self.gpu_hours / self.devices

    @property
    def disk(self) -> float:
        """Return the bytes on disk at most: a checkpoint is complete before it replaces the last one."""
        return 2 * self.checkpoint + self.export

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        sizes = asdict(self.memory) | {"total": self.memory.total}
        return {
            "steps": self.steps,
            "samples": self.samples,
            "tokens": self.tokens,
            "parts": [asdict(part) for part in self.parts],
            "devices": self.devices,
            "memory_gb": {name: size / GB for name, size in sizes.items()},
            "flops_per_step": self.flops_per_step,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "disk_gb": self.disk / GB,
            "missing_images": self.missing_images,
        }


def estimate(
    module: LlavaTraining, data: InstructionData, trainer: Trainer, spread: Spread, tflops: float
) -> TrainingCosts:
    """Return what a training costs. Annotations are read, weights and images are not; some images are looked up.

    Args:
        module: The training, without a model.
        data: Its data.
        trainer: Says how long it trains.
        spread: Devices, precision and strategy.
        tflops: 10^12 operations per second that a GPU is supposed to do.

    Raises:
        UserError: As a training of this data, or the batch cannot be divided among the devices.
    """
    planned = _plan_trainer(trainer, spread.devices, module, data)
    steps = optimizer_steps(planned)
    sampled = sample_records(data)
    batch = longest_micro_batch(data)
    memory = {}
    chosen = module.hparams.gradient_checkpointing
    for checkpointing in (not chosen, chosen):
        module.hparams["gradient_checkpointing"] = checkpointing
        memory[checkpointing] = step_memory(
            module, batch, spread, accumulates=planned.accumulate_grad_batches > 1
        )
    samples = steps * data.batch_size
    share = samples / len(sampled.lengths)  # how many each sampled record stands for
    flops = sampled_flops(module, batch, sampled)
    return TrainingCosts(
        steps=steps,
        samples=samples,
        tokens=round(share * sum(sampled.lengths)),
        supervised=round(share * sampled.supervised),
        parts=count_parameters(module),
        memory=memory[chosen],
        checkpointing=chosen,
        other_memory=memory[not chosen],
        flops_per_step=flops * data.batch_size / len(sampled.lengths),
        devices=spread.devices,
        tflops=tflops,
        checkpoint=checkpoint_bytes(module, spread),
        export=export_bytes(module, spread),
        missing_images=sampled.missing_images,
    )


def _plan_trainer(
    trainer: Trainer, devices: int, module: LlavaTraining, data: InstructionData
) -> SimpleNamespace:
    """Return what the data asks a trainer of so many devices for, and set the data up for it."""
    planned = SimpleNamespace(
        global_rank=0,
        world_size=devices,
        log_every_n_steps=1,
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        datamodule=data,
    )
    data.trainer = planned
    data.follow_model(
        image_attention=module.hparams.image_attention, loss_average=module.hparams.loss_average
    )
    data.setup("fit")
    return planned


def sample_records(data: InstructionData) -> SampledRecords:
    """Return the tokens of records evenly spaced by length, so that they stand for all records."""
    order = np.argsort(data.train.lengths(), kind="stable")
    count = min(SAMPLED, len(order))
    middles = (np.arange(count) + 0.5) * len(order) / count
    lengths = []
    images = 0
    supervised = 0
    missing_images = []
    for index in order[middles.astype(int)]:
        sample = data.train.without_pixels(int(index))
        ids, labels = data.collate.truncated(sample)
        file = data.train.images / data.train.records[int(index)]["image"]
        if sample["image"] and not file.exists():
            missing_images.append(str(file))
        lengths.append(len(ids))
        images += ids.count(data.collate.processor.image_token_id) // data.collate.image_tokens
        supervised += len(labels) - labels.count(IGNORE_INDEX)
    return SampledRecords(
        lengths=lengths, images=images, supervised=supervised, missing_images=missing_images
    )


def longest_micro_batch(data: InstructionData) -> Batch:
    """Return the micro-batch of the first epoch, on any device, that has most tokens with its padding."""
    micro_batches = np.array([*replace(data.sampler, rank=0, world_size=1)])
    words = data.train.lengths()
    tokens = TOKENS_A_WORD * np.abs(words) + data.collate.image_tokens * (words > 0)
    longest = micro_batches[np.argsort(-tokens[micro_batches].max(1))[:LONGEST]]
    batches = []
    for indices in longest.tolist():
        batches.append(data.collate([data.train.without_pixels(i) for i in indices]))
    return max(batches, key=lambda batch: (batch["input_ids"].numel(), batch["supervised"]))


def count_parameters(module: LlavaTraining) -> list[PartOfModel]:
    """Return the parts of a model; updates of LoRA are one."""
    counts: dict[str, list[int]] = {}
    for name, parameter in module.model.named_parameters():
        part = part_of(name)
        if UPDATES in name:
            part = "lora"
        total = counts.setdefault(part, [0, 0])
        total[0] += parameter.numel()
        total[1] += parameter.numel() * parameter.requires_grad
    return [
        PartOfModel(part, parameters=count, trains=trained > 0, trained=trained)
        for part, (count, trained) in counts.items()
    ]


def sampled_flops(module: LlavaTraining, batch: Batch, sampled: SampledRecords) -> float:
    """Return the operations of a pass over the sampled records."""
    shape = (1, *batch["pixel_values"].shape[1:])
    fake = next(module.model.parameters()).fake_mode
    with fake, torch.autocast("cpu", torch.bfloat16):
        flops = count_flops(module.model, torch.empty(shape))
    return flops.of_batch(sampled.images, sampled.lengths, sampled.supervised)


def checkpoint_bytes(module: LlavaTraining, spread: Spread) -> float:
    """Return the bytes of a checkpoint, of all devices: trained weights and the states of their optimizer."""
    weights = spread.stored_in.itemsize
    states = 2 * weights
    if spread.is_zero:  # which has masters
        states = 3 * FP32
    return (weights + states) * count_trained(module.model)


def export_bytes(module: LlavaTraining, spread: Spread) -> float:
    """Return the bytes of the weights in RUN/hf, into which LoRA is merged."""
    weights = module.model.named_parameters()
    return sum(stored_bytes(p, module, spread) for name, p in weights if UPDATES not in name)
