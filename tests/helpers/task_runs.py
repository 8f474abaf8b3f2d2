"""A data set with depth and normals, and the commands that solve or train probes of them on a tiny model."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

STRENGTHS = [1.0, 1e-1, 1e-3]  # strong to weak


def write_targets(segmentation: Path, root: Path) -> Path:
    """Write the segmentation images with depth and normals that follow the classes, and pixels without a value."""
    shutil.copytree(segmentation, root)
    rng = np.random.default_rng(0)
    (root / "targets.json").write_text(json.dumps({"depth_scale": 0.001}))
    for file in sorted((root / "annotations").rglob("*.png")):
        mask = np.asarray(Image.open(file))
        level = np.where(mask == 255, 0, mask).astype(int)
        depth = (1000 * (1 + level) + rng.integers(0, 200, mask.shape)).astype(np.uint16)
        depth[mask == 255] = 0
        normals = np.array([[0, 0, 1], [0, -1, 0], [1, 0, 0]])[level] + rng.normal(
            0, 0.1, (*mask.shape, 3)
        )
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        encoded = ((normals + 1) * 127.5).round().astype(np.uint8)
        encoded[mask == 255] = 0
        for name, array in (("depth", depth), ("normals", encoded)):
            out = root / name / file.parent.name / file.name
            out.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(out)
    return root


def arguments(command, task, checkpoint, root, out, *more: str) -> list[str]:
    """Return a command that solves probes in closed form, or trains them for two epochs."""
    demo = [
        command,
        "-c",
        "configs/demo/probes.yaml",
        "--data.batch_size",
        "2",
        "--data.task",
        task,
    ]
    demo += ["--folds", "2", "--strengths", *map(str, STRENGTHS)] if command == "solve" else []
    demo += ["--trainer.max_epochs", "2", "--save_predictions", "true"]
    return [
        *demo,
        "--model.mllm",
        str(checkpoint),
        "--data.root",
        str(root),
        "--out",
        str(out),
        *more,
    ]
