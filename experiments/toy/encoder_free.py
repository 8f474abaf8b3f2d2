"""A model without an encoder whose LLM alone makes classes separable, and the same with its LLM's layers shuffled.

    probes demo-assets WORLD --scale 0.3
    python -m experiments.toy.encoder_free WORLD OUT

A tiny random Gemma 4 of the unified kind reads pictures of the binding world as embeddings of 6 x 6 pixels, under its
bidirectional mask. Only the layers of its LLM are trained, on the class of each image token, which a linear head reads
after three quarters of them. Look-alikes follow from other patches with the same border, so that neither the pixels nor
layers of random weights tell them apart. The truth: a recovery of OUT/trained, none of OUT/shuffled.

Writes both checkpoints with a study each, and prints what the reports conclude.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil

import probes
from probes.models.families import FAMILIES
from probes.models.frozen_mllm import FrozenMLLM
from probes.models.random_weights import permute_weights
from probes.worlds.canvas import CLASSES
from probes.worlds.tiny_models import train

FAMILY = "gemma4_unified"
LAYERS = 4
HEAD_LAYER = 3
SITES = ["adapter", *(f"layer_{i:02d}" for i in range(1, LAYERS + 1))]
ARMS = ["trained", "random0", "random1", "permuted0", "permuted1"]
TEMPLATE = "{{ bos_token }}<|image|>{{ messages[0]['content'][1:] | map(attribute='text') | join }}"


def write_random_model(world: Path, out: Path) -> None:
    """Write a random model with the tokenizer of a world."""
    tokenizer = AutoTokenizer.from_pretrained(world / "llm")
    tokenizer.add_tokens(["<|image|>", "<|image>", "<image|>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    ids = tokenizer.get_vocab()
    text = {
        "model_type": "gemma4_unified_text",
        "vocab_size": len(ids),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention"] * (LAYERS - 1) + ["full_attention"],
        "sliding_window": 1024,
        "use_bidirectional_attention": "vision",
    }
    vision = {"patch_size": 2, "mm_embed_dim": 64, "output_proj_dims": 64}
    config = AutoConfig.for_model(
        FAMILY,
        text_config=text,
        vision_config={"model_type": "gemma4_unified_vision", **vision},
        audio_config=None,
        image_token_id=ids["<|image|>"],
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
    )
    FAMILIES[FAMILY].model_cls._from_config(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    CLIPImageProcessorPil(do_resize=False, do_center_crop=False).save_pretrained(out)


def read_labelled_pictures(mllm: FrozenMLLM, folder: Path) -> tuple[Tensor, Tensor]:
    """Return the pixels f[n, 3, H, W] of training pictures and the majority class of each token, i64[n, T]."""
    files = sorted((folder / "images/training").glob("*.png"))
    masks = [np.asarray(Image.open(folder / "annotations/training" / file.name)) for file in files]
    labels = [mllm.geometry.patches(mask).flatten() for mask in masks]
    return mllm.preprocess(files), torch.stack(labels)


def train_layers(mllm: FrozenMLLM, pixels: Tensor, labels: Tensor, steps: int) -> None:
    """Train the layers of the LLM up to `HEAD_LAYER` on the class of each token."""
    head = nn.Linear(mllm.widths["adapter"], len(CLASSES))
    layers = mllm.layers[:HEAD_LAYER].requires_grad_(True)
    read: list[Tensor] = []
    layers[-1].register_forward_hook(lambda module, args, output: read.append(output))

    def loss() -> Tensor:
        chosen = torch.randint(len(pixels), (16,))
        is_image = mllm.is_image.expand(len(chosen), -1)
        inputs = mllm.family.inputs(mllm.model, pixels[chosen], is_image)
        mllm.model.model(input_ids=mllm.ids.expand(len(chosen), -1), use_cache=False, **inputs)
        states = mllm.final_norm(read.pop()[:, mllm.image_positions])
        return F.cross_entropy(head(states).mT, labels[chosen], ignore_index=-1)

    train([*head.parameters(), *layers.parameters()], loss=loss, steps=steps, name="LLM")


def write_models(world: Path, out: Path, steps: int, seed: int) -> None:
    """Write the random model, the trained one, and the trained one with its layers shuffled."""
    torch.manual_seed(seed)
    write_random_model(world, out / "random")
    mllm = probes.load(str(out / "random"), device="cpu", dtype="float32")
    train_layers(mllm, *read_labelled_pictures(mllm, world / "llava"), steps)
    save(mllm, out / "random", out / "trained")
    torch.manual_seed(seed)
    with torch.no_grad():
        permute_weights(mllm.layers)
    save(mllm, out / "random", out / "shuffled")


def save(mllm: FrozenMLLM, source: Path, out: Path) -> None:
    """Write the weights of a model with the other files of its source."""
    shutil.copytree(source, out)
    mllm.model.save_pretrained(out)


def main() -> None:
    """Write the models, unless they are there, and print the conclusions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("world", type=Path, help="folder of demo-assets")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not (options.out / "shuffled").exists():
        write_models(options.world, out=options.out, steps=options.steps, seed=options.seed)
    for name in ("trained", "shuffled"):
        study = probes.study(
            options.out / name,
            options.world / "segmentation",
            out=options.out / f"study_{name}",
            arms=ARMS,
            only=["solve", "report"],
            options={"model": {"sites": SITES}},
        )
        print(f"== {name}\n{study}", flush=True)


if __name__ == "__main__":
    main()
