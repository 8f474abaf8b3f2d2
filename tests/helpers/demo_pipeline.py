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
    assets = out / "assets"
    model = out / "stage2/hf"
    few = ["--trainer.max_epochs", "2"]
    llava_bidir(["demo-assets", str(assets), "--scale", "0.01"])
    llava_bidir(
        [
            "fit",
            "-c",
            "configs/demo/stage2.yaml",
            "--out",
            str(out / "stage2"),
            "--model.llm",
            str(assets / "llm"),
        ]
        + [
            "--model.encoder.path",
            str(assets / "encoder"),
            "--data.annotations",
            str(assets / "dialogues.json"),
        ]
        + ["--data.val_annotations", str(assets / "questions.json"), "--data.images", str(assets)]
    )
    runs = [str(out / mask) for mask in MASKS]
    for mask, path in zip(MASKS, runs, strict=True):
        probes(
            [
                "fit",
                "-c",
                "configs/demo/probes.yaml",
                "--model.mllm",
                str(model),
                "--model.image_attention",
                mask,
                *few,
            ]
            + ["--save_predictions", "true", "--out", path]
            + ["--data.root", str(assets / "segmentation")]
        )
        probes(
            [
                "knockout",
                "--probes",
                path,
                "--classes",
                "auto:3",
                "--controls",
                "distance",
                "--draws",
                "2",
            ]
        )
    probes(
        ["solve", "-c", "configs/demo/probes.yaml", "--model.mllm", str(model), "--data.root"]
        + [
            str(assets / "segmentation"),
            "--out",
            str(out / "solved"),
            "--model.sites",
            "[encoder, adapter, layer_01]",
        ]
        + ["--folds", "2", "--strengths", "1e-2", "1"]
    )
    probes(["maps", "--probes", runs[0], "--image", "0", "1"])
    probes(["umap", "--probes", runs[0], "--image", "0"])
    probes(["starvation", "--probes", *runs, "--by-class"])
    probes(["explore", *runs, "--images", "0", "1", "--out", str(out / "report")])
    probes(["report", *runs, str(out / "solved"), "--out", str(out / "report")])


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
