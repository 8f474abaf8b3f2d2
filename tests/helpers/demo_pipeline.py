"""The demo's graph in small, in one process: every command that leaves a result, on a toy world of its own.

    python tests/helpers/demo_pipeline.py OUT

test_determinism.py runs it twice and compares all files.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from llava_bidir.cli import main as llava_bidir
from probes.cli import main as probes

MASKS = ("causal", "bidirectional")


def run(out: Path) -> None:
    """Run the commands, one after the other; `out` has no space in it."""
    assets = out / "assets"
    model = out / "stage2/hf"
    photos = assets / "segmentation"
    probes(f"demo-assets {assets} --scale 0.01".split())
    data = (
        f"--data.annotations {assets}/dialogues.json --data.val_annotations {assets}/questions.json"
    )
    parts = f"--model.encoder.path {assets}/encoder --model.llm {assets}/llm"
    train = (
        f"fit -c configs/demo/stage2.yaml --out {out}/stage2 {parts} {data} --data.images {assets}"
    )
    llava_bidir(train.split())
    probed = f"-c configs/demo/probes.yaml --model.mllm {model} --data.root {photos}"
    for mask in MASKS:
        fit = f"fit {probed} --model.image_attention {mask} --trainer.max_epochs 2"
        probes(f"{fit} --save_predictions true --out {out}/{mask}".split())
        knockout = f"knockout --probes {out}/{mask} --classes auto:3 --draws 2"
        probes(knockout.split())
    probes(f"solve {probed} --out {out}/solved --folds 2 --strengths 1e-2 1".split())
    first, second = (out / mask for mask in MASKS)
    probes(f"maps --probes {first} --image 0 1".split())
    probes(f"umap --probes {first} --image 0".split())
    probes(f"sinks --probes {first}".split())
    probes(f"report {first} {second} {out}/solved --out {out}/report".split())


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
