"""Tiny random models of the real classes, the toy tokenizer, and small data sets."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llava_bidir import LlavaBidirConfig, LlavaBidirForConditionalGeneration
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.encoders import Encoder
from llava_bidir.model.export import export_hf
from probes.worlds.tiny_models import train_tokenizer

IMAGE_ID = 99
VOCABULARY = 100
GRID = (2, 2)
TOKENS = 4
CLASSES = ["sky", "wall", "road"]


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )


def llama_config(vocabulary: int = VOCABULARY, **kwargs) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        **kwargs,
    )


def config(cls=LlavaBidirConfig, **kwargs):
    settings = {
        "vision_config": vision_config(),
        "text_config": llama_config(),
        "image_token_index": IMAGE_ID,
    }
    return cls(**settings | {"image_seq_length": TOKENS, "vision_feature_layer": -1} | kwargs)


def model(
    image_attention: str = "causal", attn_implementation: str = "sdpa", seed: int = 0, **kwargs
):
    """Return a random model whose attention is far from uniform, so that masks change its states."""
    torch.manual_seed(seed)
    built = LlavaBidirForConditionalGeneration._from_config(
        config(image_attention=image_attention, **kwargs), attn_implementation=attn_implementation
    ).eval()
    sharpen(built)
    return built


def stock(ours) -> LlavaForConditionalGeneration:
    """Return transformers' own LLaVA with the weights and the attention backend of `ours`."""
    settings = {
        "text_config": ours.config.text_config,
        "attn_implementation": ours.config._attn_implementation,
    }
    built = LlavaForConditionalGeneration._from_config(config(LlavaConfig, **settings)).eval()
    built.load_state_dict(ours.state_dict())
    return built


@torch.no_grad()
def sharpen(built, factor: float = 12.0) -> None:
    for name, parameter in built.named_parameters():
        if "norm" not in name and parameter.ndim > 1:
            parameter.mul_(factor if "language_model" in name else 4.0)


def ids(*rows: str, pad: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and padding mask of rows such as "tiiiit": t is a text token, i an image token."""
    width = max(map(len, rows))
    generator = torch.Generator().manual_seed(1)
    lines = torch.zeros(len(rows), width, dtype=torch.long)
    masks = torch.zeros_like(lines)
    for line, mask, row in zip(lines, masks, rows, strict=True):
        places = slice(len(row))
        if pad == "left":
            places = slice(width - len(row), None)
        mask[places] = 1
        line[places] = torch.tensor(
            [
                IMAGE_ID if c == "i" else torch.randint(3, 90, (), generator=generator).item()
                for c in row
            ]
        )
    return lines, masks


def pixels(images: int) -> torch.Tensor:
    return torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def write_parts(folder: Path) -> tuple[Encoder, str]:
    """Write a tiny CLIP and a tiny Llama with its tokenizer as Hugging Face directories."""
    torch.manual_seed(0)
    CLIPVisionModel(vision_config()).save_pretrained(folder / "encoder")
    texts = [
        "USER: name the sky and a wall of this road",
        " USER: ASSISTANT: sky wall road and the rest of it\n",
    ] * 3
    tokenizer = train_tokenizer(texts, folder / "llm")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(llama_config(len(tokenizer), **ends)).save_pretrained(folder / "llm")
    return Encoder("clip", str(folder / "encoder"), layer=-1), str(folder / "llm")


def write_checkpoint(folder: Path, image_attention: str = "causal", out: str = "hf") -> Path:
    """Write a tiny random MLLM as `llava-bidir fit` exports it."""
    encoder, llm = write_parts(folder)
    processor = build_processor(encoder, llm)
    torch.manual_seed(3)
    built = build_model(encoder, llm, processor, image_attention=image_attention)
    sharpen(built, 8.0)
    export_hf(built, processor=processor, out=folder / out, training={"val/answer_accuracy": 0.5})
    return folder / out


def write_segmentation(
    root: Path, training: int = 6, validation: int = 5, size=(24, 20), seed: int = 0
) -> Path:
    """Write a folder dataset of random rectangles, one colour per class, with some ignored pixels."""
    rng = np.random.default_rng(seed)
    for split, count in (("training", training), ("validation", validation)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            mask = np.zeros(size, np.uint8)
            mask[rng.integers(4, 12) :] = 1
            mask[:, rng.integers(8, 16) :] = 2
            image = (mask[..., None] * 80 + rng.integers(0, 60, (*size, 3))).astype(np.uint8)
            mask[0, : 2 + i] = 255
            Image.fromarray(image).save(root / "images" / split / f"{i:03d}.png")
            Image.fromarray(mask).save(root / "annotations" / split / f"{i:03d}.png")
    (root / "classes.json").write_text(json.dumps({"classes": CLASSES, "ignore_index": 255}))
    return root


def turns(*texts: str, first: str = "human") -> list[dict]:
    """Return a conversation whose speakers take turns."""
    roles = ["human", "gpt"]
    if first == "gpt":
        roles.reverse()
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


def write_conversations(root: Path, count: int = 12, text_only: int = 2) -> Path:
    """Write a LLaVA JSON of short dialogues with its images; the last `text_only` dialogues have no image."""
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        picture = i < count - text_only
        question = ("<image>\n" if picture else "") + "name the " + " ".join(["sky"] * (1 + i % 3))
        record = {"id": f"r{i}", "conversations": turns(question, " ".join(["wall"] * (1 + i % 4)))}
        if picture:
            record["image"] = f"pictures/{i}.png"
            Image.fromarray(rng.integers(0, 255, (10, 14, 3), np.uint8)).save(
                root / record["image"]
            )
        records.append(record)
    (root / "data.json").write_text(json.dumps(records))
    return root


def training_arguments(parts, conversations) -> list[str]:
    """Return the flags of a `llava-bidir fit` of the demo's stage 2 with tiny parts."""
    encoder, llm = parts
    records = conversations / "data.json"
    model = f"--model.encoder.path {encoder.path} --model.llm {llm}"
    data = f"--data.images {conversations} --data.annotations {records} --data.val_annotations {records}"
    sizes = "--data.batch_size 4 --data.micro_batch_size 4 --model.adapter null"
    return f"-c configs/demo/stage2.yaml {model} {data} {sizes}".split()


def fit(parts, conversations, out: Path, *more: str) -> Path:
    """Run `llava-bidir fit` on tiny parts and return the folder of the run."""
    from llava_bidir.cli import main

    main(["fit", *training_arguments(parts, conversations), "--out", str(out), *more])
    return out
