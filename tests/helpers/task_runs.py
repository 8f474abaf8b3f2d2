"""A data set with depth and normals, and the commands that solve or train probes of them on a tiny model."""

import json
import shutil
from pathlib import Path

import numpy as np
import probe_runs
import torch
from PIL import Image
from safetensors.torch import save_file

from probes.models.sites import site_names
from probes.runs.write import summary
from probes.tasks import TASKS

STRENGTHS = [1.0, 1e-1, 1e-3]  # strong to weak
DEPTH_STRENGTHS = [1.0, 1e-1, 1e-3, 1e-5]  # of written runs


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
    demo = f"{command} -c configs/demo/probes.yaml --data.batch_size 2 --data.task {task}".split()
    of_solve = ["--folds", "2", "--strengths", *map(str, STRENGTHS)]
    demo += of_solve if command == "solve" else ["--trainer.max_epochs", "2"]
    demo.append("--save_predictions=true")
    return [*demo, *probe_runs.places(checkpoint, root, out), *more]


def write_depth_run(path: Path, rmse: list[float], root: Path, seed: int = 0, **more) -> None:
    """Write a depth run whose encoder, adapter, layers and final norm have the mean RMSE `rmse`."""
    probe_runs.write_run(path, [0.5] * len(rmse), root=root, **more)
    metrics = json.loads((path / "metrics.json").read_text())
    sites = site_names(len(rmse) - 3)
    task = TASKS["depth"]
    shape = len(rmse), metrics["images"]
    noise = torch.rand(*shape, 7, generator=torch.Generator().manual_seed(seed))
    one = torch.ones(*shape, 1)
    sums = torch.cat([one, 0.1 * noise, one], -1)
    sums[..., 1] += torch.tensor(rmse)[:, None] - 0.05
    scores = {name: x.tolist() for name, x in task.dataset_scores(sums.double().sum(1)).items()}
    for key in ("classes", "baseline"):
        del metrics[key]
    choice = {"strengths": DEPTH_STRENGTHS, "chosen": 1e-3, "lowest": 1e-3}
    choice |= {name: [1.0] * len(DEPTH_STRENGTHS) for name in ("cv_loss", *scores)}
    entries = []
    for i, site in enumerate(sites):
        entry = {"site": site, "dim": 8, "best_epoch": None, "history": []}
        entry |= {name: values[i] for name, values in scores.items()}
        entry |= {f"{name}_ci95": [x[i] - 0.01, x[i] + 0.01] for name, x in scores.items()}
        entries.append(entry)
    metrics |= {
        "task": "depth",
        "scores": {k: "higher" if up else "lower" for k, up in task.scores.items()},
        "sites": entries,
        "summary": summary(dict(zip(sites, scores["rmse"], strict=True)), task.sign),
        "path": {"closed_form": {"sites": [{"site": site} | choice for site in sites]}},
    }
    (path / "metrics.json").write_text(json.dumps(metrics))
    save_file({"sums": sums}, path / "counts.safetensors")
    probe_runs.write_probes(path, sites, sums)
    along_path = sums.expand(len(DEPTH_STRENGTHS), *sums.shape).contiguous()
    save_file({"sums": along_path}, path / probe_runs.BY_STRENGTH)
    probe_runs.write_effects(path)
