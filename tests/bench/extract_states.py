"""States of a Dinov2Model and the masks of a folder data set, for solver.py.

python tests/bench/extract_states.py MODEL DATA STATES.pt [--layer -2] [--px 224]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
BATCH = 8


def read_photo(file: Path, px: int) -> torch.Tensor:
    """Return the pixels f32[3, px, px] of a photo, normalised as the encoder expects."""
    photo = Image.open(file).convert("RGB").resize((px, px), Image.BICUBIC)
    return (torch.tensor(np.asarray(photo)).permute(2, 0, 1) / 255 - MEAN) / DEVIATION


@torch.inference_mode()
def read_split(
    model,
    data: Path,
    split: str,
    layer: int,
    px: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the states f32[N, T, d] without CLS, and N masks uint8[H, W]."""
    files = sorted((data / "images" / split).iterdir())
    states = []
    for start in range(0, len(files), BATCH):
        pixels = torch.stack([read_photo(file, px) for file in files[start : start + BATCH]])
        states.append(model(pixels, output_hidden_states=True).hidden_states[layer][:, 1:].clone())
    masks = [Image.open(data / "annotations" / split / f"{file.stem}.png") for file in files]
    return torch.cat(states), [torch.tensor(np.asarray(mask)) for mask in masks]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layer", type=int, default=-2)
    parser.add_argument("--px", type=int, default=224)
    args = parser.parse_args()
    model = AutoModel.from_pretrained(args.model).eval()
    result = {"classes": len(json.loads((args.data / "classes.json").read_text())["classes"])}
    for split in ("training", "validation"):
        result[split] = read_split(model, args.data, split, args.layer, args.px)
    torch.save(result, args.out)


if __name__ == "__main__":
    main()
