"""Random models and batches for mix.py and save.py, and the arguments of transformers' Trainer for the same steps."""

from pathlib import Path

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    TrainingArguments,
)

from llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.commands.estimate import build_empty
from llava_bidir.data.collate import predicting_positions
from llava_bidir.model.encoders import Encoder
from llava_bidir.toy_world.tiny_models import train_tokenizer
from llava_bidir.training.module import LlavaTraining

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
