"""Training steps beside transformers' own: tokens/s and MFU of a randomly initialised model, all sides in one run.

    python tests/bench/training.py              a small model, on any machine
    python tests/bench/training.py --size 7b    CLIP ViT-L/14 at 336 px and Vicuna-7B's shapes, on a GPU

Ours (causal and bidirectional) goes through LlavaTraining and Lightning, the other through stock
`LlavaForConditionalGeneration` and transformers' `Trainer`: same shapes, same batches, same precision, gradient
checkpointing on both sides.
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path

import torch
from lightning import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)
from transformers import Trainer as StockTrainer

from llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.commands.estimate import build_empty
from llava_bidir.data.collate import predicting_positions
from llava_bidir.model.build import set_trainable
from llava_bidir.model.encoders import Encoder
from llava_bidir.model.hf_export import as_llava
from llava_bidir.toy_world.tiny_models import train_tokenizer
from llava_bidir.training.module import LlavaTraining
from llava_bidir.training.throughput import peak_flops, step_flops

SIZES = {
    "small": {
        "vision": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
        "image_size": 112,
        "llm": {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "vocab_size": 2048,
        },
        "samples": 4,
        "text": 64,
    },
    "7b": {
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        "image_size": 336,
        "llm": {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
        },
        "samples": 4,
        "text": 448,  # with the image half of LLaVA's 2048 tokens
    },
}
STAGES = {"stage 1": ["adapter"], "stage 2": ["adapter", "llm"]}
WARM_UP = 2  # steps that are not timed


class Clock:
    """Seconds of each step after the warm-up; the device is waited for once at either end."""

    def __init__(self, device: torch.device):
        self.device, self.steps, self.start, self.seconds = device, 0, 0.0, 0.0

    def tick(self) -> None:
        self.steps += 1
        if self.steps >= WARM_UP:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            self.start, self.seconds = (now, 0.0) if self.steps == WARM_UP else (self.start, now - self.start)

    def per_step(self) -> float:
        return self.seconds / (self.steps - WARM_UP)


def write_parts(folder: Path, size: dict) -> tuple[Encoder, str]:
    """Configurations and a tokenizer, no weights: all that LlavaTraining reads before it loads a model."""
    CLIPVisionConfig(**size["vision"], image_size=size["image_size"], patch_size=14).save_pretrained(folder / "encoder")
    train_tokenizer(["USER: ASSISTANT: a text"] * 4, folder / "llm")
    LlamaConfig(**size["llm"]).save_pretrained(folder / "llm")
    return Encoder("clip", str(folder / "encoder")), str(folder / "llm")


def random_model(module: LlavaTraining, device: torch.device) -> LlavaBidirForConditionalGeneration:
    config = build_empty(module).config
    torch.manual_seed(0)
    with device:
        return LlavaBidirForConditionalGeneration._from_config(config, dtype=torch.float32)


def batches(model: LlavaBidirForConditionalGeneration, size: dict, steps: int) -> list[dict]:
    """Full sequences without padding: BOS, image, text; all of the text is supervised."""
    generator = torch.Generator().manual_seed(0)
    tokens, samples = model.config.image_seq_length, size["samples"]
    length = 1 + tokens + size["text"]
    made = []
    for _ in range(steps):
        ids = torch.randint(3, 100, (samples, length), generator=generator)
        ids[:, 1 : 1 + tokens] = model.config.image_token_id
        labels = ids.masked_fill(torch.arange(length) < 1 + tokens, -100)
        made.append(
            {
                "input_ids": ids,
                "labels": labels,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.randn(samples, 3, size["image_size"], size["image_size"], generator=generator),
            }
        )
    return made


class Batches(LightningDataModule):
    """Ready batches, with what our training step wants to know besides."""

    def __init__(self, made: list[dict], image_id: int):
        super().__init__()
        self.made, self.image_id, self.seed = made, image_id, 0
        self.steps_per_epoch, self.batch_size = len(made), len(made[0]["input_ids"])
        self.micro_batch_size = self.batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self._with_facts(batch) for batch in self.made], batch_size=None)

    def _with_facts(self, batch: dict) -> dict:
        (samples, length), predicts = batch["input_ids"].shape, predicting_positions(batch["labels"])
        facts = {"ids": [""] * samples, "lengths": [length] * samples, "samples": None, "position_ids": None}
        images = (batch["input_ids"] == self.image_id).flatten().nonzero().flatten()
        return {**batch, **facts, "predicts": predicts, "supervised": len(predicts), "image_positions": images}


def ours(module: LlavaTraining, model, made: list[dict], precision: str, device: torch.device) -> float:
    """Seconds of a step through Lightning."""
    clock = Clock(device)

    class Ticks(Callback):
        def on_train_batch_end(self, *args, **kwargs):
            clock.tick()

    module.model = model
    if module.hparams.gradient_checkpointing:
        model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=1,
        accelerator=device.type if device.type != "cuda" else "gpu",
        devices=1,
        precision=precision,
        callbacks=[Ticks()],
        enable_checkpointing=False,
        **quiet,
    )
    trainer.fit(module, datamodule=Batches(made, model.config.image_token_id))
    return clock.per_step()


def stock_arguments(folder: Path, precision: str, device: torch.device, **lengths) -> TrainingArguments:
    """Arguments of transformers' Trainer with which its steps do what ours do."""
    return TrainingArguments(
        output_dir=str(folder),
        learning_rate=2e-5,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        max_grad_norm=0.0,
        bf16=precision.startswith("bf16"),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="adamw_torch_fused",
        use_cpu=device.type == "cpu",
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        remove_unused_columns=False,
        **lengths,
    )


def stock(model: LlavaForConditionalGeneration, made: list[dict], precision: str, device: torch.device, folder: Path):
    """Seconds of a step through transformers' Trainer."""
    clock = Clock(device)

    class Ticks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.tick()

    # an item is a ready batch
    arguments = stock_arguments(folder, precision, device, per_device_train_batch_size=1, max_steps=len(made))
    StockTrainer(model, arguments, lambda items: items[0], made, callbacks=[Ticks()]).train()
    return clock.per_step()


def measure(size: dict, train: list[str], steps: int, precision: str, device: torch.device) -> dict:
    """Seconds of a step of every side, and the step's FLOPs."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parts, seconds = write_parts(folder, size), {}
        for name in ("causal", "bidirectional"):
            module = LlavaTraining(*parts, trainable=train, image_attention=name, gradient_checkpointing=True)
            model = random_model(module, device)
            set_trainable(model, train)
            made = batches(model, size, steps)
            seconds[name] = ours(module, model, made, precision, device)
            facts = Batches(made, model.config.image_token_id)._with_facts(made[0])
            flops = step_flops(model)(facts["lengths"], facts["supervised"], len(facts["ids"]))
        module = LlavaTraining(*parts, trainable=train, gradient_checkpointing=True)
        model = as_llava(random_model(module, device))
        set_trainable(model, train)
        seconds["stock"] = stock(model, made, precision, device, folder / "stock")
    return {"seconds": seconds, "tokens": sum(facts["lengths"]), "flops": flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=12, help=f"of each, the first {WARM_UP} of them not timed (12)")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, peak = ("bf16-mixed" if device.type == "cuda" else "32-true"), peak_flops(device)
    found = {"device": torch.cuda.get_device_name(device) if peak else str(device), "precision": precision}
    print(f"{args.size} model on {found['device']}, {precision}, {args.steps - WARM_UP} steps of each")
    for stage, train in STAGES.items():
        result = found[stage] = measure(SIZES[args.size], train, args.steps, precision, device)
        for name, seconds in result["seconds"].items():
            mfu = f"   MFU {result['flops'] / seconds / peak:.1%}" if peak else ""
            over = seconds / result["seconds"]["stock"]
            print(f"  {stage}  {name:14} {result['tokens'] / seconds:9.0f} tokens/s   {over:.2f} x stock's time{mfu}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
