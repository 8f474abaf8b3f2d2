"""What a probe run writes when it ends; `probe_run.py` says which files, and reads them back."""

import logging
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.bootstrap import bootstrap_weights, interval
from llava_bidir.common.hf_loading import read_json
from probes.evaluation.bootstrap import dataset_scores, resampled_scores
from probes.evaluation.metrics import Counts, summary

from .probe_variants import probe_name

log = logging.getLogger(__name__)

PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "numpy")


def save_run(
    module, data, counts: dict[str | None, Counts], states: dict[str, dict[str, float | None]], out: str | Path
) -> None:
    """Writes all files of a finished run into `out`; `probe_run.py` says which.

    Args:
        module: The `ProbeModule`.
        data: Its `SegmentationData`.
        counts: By recipe; the main one's under None.
        states: Statistics of the states by site.
        out: Folder of the run.
    """
    out, args, main = Path(out), module.hparams, counts[None]
    results = {name: recipe_results(module, data, name, counts[name]) for name in module.recipes}
    for entry in results[None]["sites"]:
        entry["states"] = states[entry["site"]]
    metrics = {
        "dataset": data.name,
        "split": "validation",
        "images": len(data.splits["validation"]),
        "mllm": args.mllm,
        "image_attention": module.mllm.image_attention,
        "own_image_attention": module.mllm.own_image_attention,
        "image_resize": args.image_resize,
        "untrained": list(args.untrained or ()),
        "seed": args.seed,
        "classes": data.classes,
        "baseline": baseline(main, data.classes),
        "grid": list(module.mllm.grid),
        **results.pop(None),
        "recipes": results,
    }
    further = {f"{name}/{k}": getattr(counts[name], k) for name in results for k in ("intersection", "predicted")}
    tensors = main._asdict() | {"group": group_of(data.splits["validation"])}
    files = {out / "counts.safetensors": {k: v for k, v in tensors.items() if v is not None}}
    if further:
        files[out / "recipes.safetensors"] = further
    files[out / "probes.safetensors"] = module.heads.state_dict()
    write_files(files | {out / "manifest.json": manifest(module, data), out / "metrics.json": metrics})


def recipe_results(module, data, recipe: str | None, counts: Counts) -> dict[str, Any]:
    """{"probe": how it was trained, "sites": scores by site, "summary"} of a recipe."""
    probe = asdict(module.recipes[recipe]) | {
        "batch_size": data.batch_size,
        "epochs": module.trainer.max_epochs,
        "steps": module.trainer.max_epochs * data.steps_per_epoch,
        "validated_at": module.validated_at,
    }
    sites = site_scores(module, data, recipe, counts)
    return {"probe": probe, "sites": sites, "summary": summary({site["site"]: site["miou"] for site in sites})}


def site_scores(module, data, recipe: str | None, counts: Counts) -> list[dict[str, Any]]:
    """One entry a site: scores with intervals over images, the best epoch, and the score at each validation."""
    score = dataset_scores(counts)
    groups = group_of(data.splits["validation"])
    weights = bootstrap_weights(len(counts.labelled), seed=module.hparams.seed, groups=groups)
    resampled = resampled_scores(counts, weights)
    entries = []
    for i, site in enumerate(module.sites):
        history = module.history.get(probe_name(recipe, site), [])
        entries.append(
            {
                "site": site,
                "dim": module.mllm.widths[site],
                "miou": score.miou[i].item(),
                "miou_ci95": interval(score.miou[i].item(), resampled.miou[:, i]),
                "pacc": score.pacc[i].item(),
                "pacc_ci95": interval(score.pacc[i].item(), resampled.pacc[:, i]),
                "best_epoch": module.epochs[history.index(max(history))] if history else None,
                "iou_per_class": [None if x != x else x for x in score.iou[i].tolist()],
                "history": history,
            }
        )
    return entries


def group_of(dataset) -> torch.Tensor | None:
    """i64[N], which group (city) an image is of, in alphabetical order; None where the dataset has no groups."""
    groups = getattr(dataset, "groups", None)
    return None if groups is None else torch.tensor([sorted(set(groups)).index(group) for group in groups])


def baseline(counts: Counts, classes: list[str]) -> dict[str, Any]:
    """What always answering the most frequent class of these images would score."""
    labelled = counts.labelled.sum(0).double()
    most, occurring = int(labelled.argmax()), int((labelled > 0).sum())
    share = (labelled[most] / labelled.sum()).item()
    return {"class": classes[most], "miou": share / occurring, "pacc": share}


def manifest(module, data) -> dict[str, Any]:
    """What ran on what."""
    return {
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "git_commit": _git_commit(),
        "config": dict(module.hparams) | {"mllm": _absolute(module.hparams.mllm)},
        "data": {
            "root": _absolute(data.root),
            "dataset": data.dataset,
            "options": data.options,
            "fingerprint": data.fingerprint(),
        },
        "mllm_training": _training(Path(module.hparams.mllm) / "training.json"),
        "hardware": {
            "machine": platform.machine(),
            "cpu_threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _training(file: Path) -> dict[str, Any] | None:
    """What a checkpoint says of its making. A damaged one must not cost the run that has just ended."""
    try:
        return read_json(file) if file.is_file() else None
    except ValueError as error:
        log.warning("%s; manifest.json goes without it", error)
        return None


def _absolute(path: str) -> str:
    """A folder's absolute path, so that analyses find it from anywhere; a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _git_commit() -> str | None:
    here = Path(__file__).parent
    found = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or None
