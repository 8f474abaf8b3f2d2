"""Time of a training step of both stages, and of loading its batch, beside stock transformers in a plain loop.

`bench.py --only training` runs it. Models have random weights: the encoder of states.py, and an LLM of 12 of its layers
with Vicuna's 32,064 words. Both sides have the same batch, weights in float32, and recompute the LLM's layers.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tiny_models
import torch
import transformers
from PIL import Image
from states import ENCODER, LLM

from llava_bidir.data.collate import Collate
from llava_bidir.data.dataset import Instructions
from llava_bidir.model.encoders import Encoder
from llava_bidir.training.loss import supervised_loss
from llava_bidir.training.module import LlavaTraining
from llava_bidir.training.optim import build_optimizer

SAMPLES = 2
PHOTO_PX = (640, 480)
STAGES = {  # what trains, template, turns
    "stage 1": (["adapter"], "plain", ["<image>", "a dog on a road " * 3]),
    "stage 2": (
        ["adapter", "llm"],
        "vicuna_v1",
        ["<image>\nwhat is it", "a dog", "what is left of it " * 5, "the wall " * 15],
    ),
}


def write_parts(root: Path) -> tuple[Encoder, str]:
    encoder, llm = tiny_models.write_parts(root)
    clip = transformers.CLIPVisionConfig(**ENCODER)
    transformers.CLIPVisionModel(clip).save_pretrained(encoder.path)
    config = json.loads(Path(llm, "config.json").read_text())
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    sizes = LLM | {"vocab_size": 32_064, "num_hidden_layers": 12}
    llama = transformers.LlamaConfig(**sizes, **ends)
    transformers.LlamaForCausalLM(llama).save_pretrained(llm)
    return Encoder("clip", encoder.path), llm


def write_records(root: Path, turns: list[str]) -> Instructions:
    rng = np.random.default_rng(0)
    records = []
    for i in range(SAMPLES):
        small = Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8))
        small.resize(PHOTO_PX).save(root / f"{i}.jpg")
        conversation = tiny_models.turns(*turns)
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": conversation})
    (root / "data.json").write_text(json.dumps(records))
    return Instructions(root / "data.json", root)


def our_step(module: LlavaTraining, batch: dict) -> Callable[[], object]:
    """A step as `llava-bidir fit` runs it, without Lightning around it."""
    rates = dict.fromkeys(module.hparams.trainable, 1e-5)
    optimizer = build_optimizer(
        module.model, learning_rates=rates, betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )

    def step() -> None:
        supervised_loss(module.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def stock_step(module: LlavaTraining, batch: dict) -> Callable[[], object]:
    """What a careful user of transformers writes: its LLaVA, what is frozen without gradients, fused AdamW."""
    config = module.model.config
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            image_token_index=config.image_token_id,
            image_seq_length=config.image_seq_length,
        )
    )
    model.load_state_dict(module.model.state_dict())
    frozen = {name for name, p in module.model.named_parameters() if not p.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    model.train()
    model.model.vision_tower.eval()
    model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-5, weight_decay=0.0, fused=True)
    keys = ("input_ids", "attention_mask", "pixel_values", "labels")
    inputs = {key: batch[key] for key in keys}

    def step() -> None:
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_batch(data: Instructions, collate: Collate) -> dict:
    return collate([data[i] for i in range(SAMPLES)])


def stock_batch(data: Instructions, processor: transformers.LlavaProcessor) -> dict:
    """Ids and pixels by transformers' processor, without labels."""
    samples = [data[i] for i in range(SAMPLES)]
    texts = [" ".join(turn["value"] for turn in sample["conversations"]) for sample in samples]
    images = [sample["image"] for sample in samples]
    return processor(images, texts, padding=True, return_tensors="pt")


def bench_training(paired: Callable[..., dict], rounds: int) -> list[dict]:
    """Return the ratios of time of stock code over ours."""
    rows = []
    for stage, (trainable, template, turns) in STAGES.items():
        with TemporaryDirectory() as folder:
            torch.manual_seed(0)
            parts = write_parts(Path(folder))
            data = write_records(Path(folder), turns)
            module = LlavaTraining(
                *parts, trainable, template=template, gradient_checkpointing=True
            )
            module.build()
            module.on_fit_start()
            collate = Collate(module.processor, module.image_tokens, template)
            batch = our_batch(data, collate)
            steps = paired(our_step(module, batch), stock_step(module, batch), rounds)
            loads = paired(
                partial(our_batch, data, collate),
                partial(stock_batch, data, module.processor),
                rounds,
                repeat=1,
            )
        rows.append({"name": f"a training step of {stage}: stock LLaVA over ours"} | steps)
        rows.append({"name": f"loading a batch of {stage}: stock processor over ours"} | loads)
    return rows
