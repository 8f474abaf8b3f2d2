"""What happens around training: throughput, answers to look at, and the export of the finished model."""

import time
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from llava_bidir.commands.export import export_hf
from llava_bidir.model.lora import merge_lora
from llava_bidir.model.modeling_llava_bidir import build_mask

from .deepspeed_strategy import gathered
from .throughput import peak_flops, step_flops

# What the clock or the machine decides: for TensorBoard only, for the same training exports the same files.
MEASURED = ("samples_per_s", "tokens_per_s", "tflops_per_s_and_device", "step_s", "data_share", "mfu", "memory_gb")


class Throughput(Callback):
    """Logs how fast training is, averaged between two logged steps: samples/s, tokens/s (without padding) and MFU over
    all devices, seconds of a step and the share of them spent waiting for data, shares of padding and of text-only
    samples, and the most memory that this device held.

    Lightning's ThroughputMonitor waits for the GPU after each batch; this one reads the clock when a step is logged.
    Rates over all devices take the others to be like this one.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.flops = step_flops(pl_module.model)
        self.peak = peak_flops(pl_module.device)
        self.batch_ended = time.perf_counter()
        self._start_window(trainer)

    def _start_window(self, trainer: Trainer) -> None:
        self.counts = dict.fromkeys(("samples", "text_only", "tokens", "padded", "flops", "waited"), 0.0)
        self.first_step, self.since = trainer.global_step, time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        self.counts["waited"] += time.perf_counter() - self.batch_ended

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        self._count(batch)
        steps = trainer.global_step - self.first_step
        if steps > 0 and trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self._rates(steps, trainer.world_size))
            if pl_module.device.type == "cuda":
                pl_module.log("train/memory_gb", torch.cuda.max_memory_allocated(pl_module.device) / 1e9)
            self._start_window(trainer)
        self.batch_ended = time.perf_counter()

    def _count(self, batch: dict) -> None:
        lengths, images = batch["lengths"], 0 if batch["pixel_values"] is None else len(batch["pixel_values"])
        for name, value in (
            ("samples", len(lengths)),
            ("text_only", len(lengths) - images),
            ("tokens", sum(lengths)),
            ("padded", batch["input_ids"].numel()),
            ("flops", self.flops.step(lengths, batch["supervised"], images)),
        ):
            self.counts[name] += value

    def _rates(self, steps: int, devices: int) -> dict[str, float]:
        elapsed, counts = time.perf_counter() - self.since, self.counts
        rates = {
            "samples_per_s": devices * counts["samples"] / elapsed,
            "tokens_per_s": devices * counts["tokens"] / elapsed,
            "tflops_per_s_and_device": counts["flops"] / elapsed / 1e12,
            "step_s": elapsed / steps,
            "data_share": counts["waited"] / elapsed,
            "padding_share": 1 - counts["tokens"] / counts["padded"],
            "text_only_share": counts["text_only"] / counts["samples"],
        }
        if self.peak is not None:
            rates["mfu"] = counts["flops"] / elapsed / self.peak
        return {f"train/{name}": float(value) for name, value in rates.items()}


class ShowAnswers(Callback):
    """Writes validation images with the model's answers, and the attention mask as a picture, to TensorBoard.

    Args:
        images: How many samples of the first validation batch are shown.
    """

    def __init__(self, images: int = 4):
        self.images = images

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        board = trainer.logger.experiment if isinstance(trainer.logger, TensorBoardLogger) else None
        if board is None or batch_idx > 0:
            return
        step = trainer.global_step
        model, processor = pl_module.model, pl_module.processor
        if batch["pixel_values"] is not None:
            board.add_images("validation/images", _visible(batch["pixel_values"][: self.images], processor), step)
        board.add_text("validation/answers", self._table(batch, outputs, processor.tokenizer), step)
        # the mask of the first prompt: white where a row (query) may attend to a column (key)
        prompt = batch["prompts"]["input_ids"][:1]
        mask = build_mask(
            model.config.image_attention,
            model.config.get_text_config(),
            prompt == model.config.image_token_id,
            batch["prompts"]["attention_mask"][:1],
        )
        board.add_image("validation/attention_mask", _allowed(mask)[0].float(), step)

    def _table(self, batch: dict, answers: list[str], tokenizer) -> str:
        rows = ["| record | question | expected | answered |", "|---|---|---|---|"]
        for i in range(min(self.images, len(answers))):
            question = tokenizer.decode(batch["prompts"]["input_ids"][i], skip_special_tokens=True)
            question = question.rpartition("USER:")[2].removesuffix("ASSISTANT:").strip()
            rows.append(f"| {batch['ids'][i]} | {question} | {batch['answers'][i]} | {answers[i]} |")
        return "\n".join(rows)


def _visible(pixels: Tensor, processor) -> Tensor:
    """f[B, 3, H, W] of normalised pixels back to 0..1."""
    mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in _statistics(processor))
    return (pixels * std + mean).clamp(0, 1)


def _statistics(processor) -> tuple[list[float], list[float]]:
    return processor.image_processor.image_mean, processor.image_processor.image_std


def _allowed(mask: Tensor) -> Tensor:
    """bool of a mask that is bool already (sdpa) or additive (eager: 0 where allowed)."""
    return mask if mask.dtype == torch.bool else mask == 0


class ExportModel(Callback):
    """Writes the finished model as a Hugging Face directory, `hf/` in the run's folder."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with gathered(pl_module.model):  # all ranks, for under ZeRO-3 each has a part
            if trainer.is_global_zero:
                self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        facts = pl_module.facts() | pl_module.progress()
        export_hf(merge_lora(pl_module.model), pl_module.processor, Path(trainer.default_root_dir) / "hf", facts)
