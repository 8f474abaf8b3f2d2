"""Random models and batches for mix.py, and the arguments of transformers' Trainer for the same steps."""

from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    TrainingArguments,
)

from llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.model.build import build_config, padded_vocab_size
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
    image_id, mask = module.processor.image_token_id, module.hparams.image_attention
    config = build_config(module.encoder, module.hparams.llm, image_id, mask, "pad")
    config.text_config.vocab_size = padded_vocab_size(config.text_config.vocab_size, len(module.processor.tokenizer))
    torch.manual_seed(0)
    with device:
        return LlavaBidirForConditionalGeneration._from_config(config, dtype=torch.float32)


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
