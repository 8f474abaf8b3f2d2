"""Counting, or voting on, a batch of large masks: the most memory that it takes.

python tests/load/masks.py counts --images 16 --size 1024 2048
"""

import argparse
import json

import torch
from memory import peak_mb

from probes.evaluation.metrics import count, patch_labels

CLASSES, GRID = 4, (24, 24)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("counts", "patch labels"))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 2048], metavar=("H", "W"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    target = torch.randint(CLASSES, (args.images, *args.size), dtype=torch.uint8)
    logits = torch.randn(1, args.images, CLASSES, *GRID)
    function = {
        "counts": lambda pixels: count(logits, target[:, :pixels, :pixels], confusion=True),
        "patch labels": lambda pixels: patch_labels(target[:, :pixels, :pixels], CLASSES, GRID),
    }[args.what]
    function(64)  # what the first call allocates for good
    print(json.dumps(vars(args) | {"peak_mb": peak_mb(lambda: function(None)), "masks_mb": target.numel() / 1e6}))


if __name__ == "__main__":
    main()
