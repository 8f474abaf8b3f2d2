"""Write the files of a finished run; `runs/read.py` lists the files and reads them back."""

import math
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from llava_bidir.common.bootstrap import bootstrap_weights, interval
from llava_bidir.common.files import write_files
from llava_bidir.common.hf import read_training
from llava_bidir.common.identity import Identity, describe_digest
from probes.data.probe_data import ProbeData
from probes.models.module_sources import absolute_source, is_source
from probes.models.sites import ADAPTER, ENCODER, FINAL_NORM, is_layer, last_layer
from probes.ops.pixel_counts import Counts
from probes.score.effects import EFFECTS_FILE, EffectSource, effect_file
from probes.score.estimate import dataset_scores, resampled_scores
from probes.score.strengths import Strengths
from probes.site_probes import SiteProbes
from probes.tasks import SEGMENTATION, Task

PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "numpy")


class SiteEntry(TypedDict):
    """A site in metrics.json; each score of the task is a further number, and its interval NAME_ci95."""

    site: str
    dim: int
    best_epoch: int | float | None
    history: list[float]  # main score of each validation
    last: NotRequired[float]  # of trained probes: score of the last validation
    selection: NotRequired[float]  # what choosing the best one on the images that are scored adds
    iou_per_class: NotRequired[list[float | None]]  # of segmentation


Baseline = TypedDict("Baseline", {"class": str, "miou": float, "pacc": float})


class Summary(TypedDict):
    """Table 2: the main score; None if not probed. Differences are positive where the best layer is better."""

    encoder: float | None
    adapter: float | None
    peak_llm: float | None
    peak_site: str | None
    final_norm: float | None
    delta_enc: float | None  # to the encoder
    recovery: float | None  # to the adapter


class Manifest(TypedDict):
    """Content of manifest.json, beside the hashes of the files."""

    versions: dict[str, str]
    git_commit: str | None
    config: dict[str, Any]
    data: dict[str, Any]
    identity: Identity
    mllm_training: dict[str, Any] | None
    hardware: dict[str, str | int | None]


@dataclass
class RunRecord:
    """How the probes of a run were made.

    Args:
        settings: Options of the model and of training or solving.
        identity: Of the run.
        probe: What metrics.json says of the probes.
        history: Main score of each validation by site; empty for solved probes.
        epochs: Of each validation.
        strengths: Of solved probes.
        sums_at_strengths: Sums per image at those that were solved, [R, S, N, M].
    """

    settings: Mapping[str, Any]
    identity: Identity
    probe: dict[str, Any]
    history: dict[str, list[float]] = field(default_factory=dict)
    epochs: list[int | float] = field(default_factory=list)
    strengths: Strengths | None = None
    sums_at_strengths: Tensor | None = None


def save_run(
    probes: SiteProbes,
    record: RunRecord,
    data: ProbeData,
    counted: dict[str, Tensor],
    out: str | Path,
) -> None:
    """Write all files of a finished run into `out`.

    Args:
        probes: The model and its probes.
        record: How the probes were made.
        data: Images and targets.
        counted: What the task counts of each image, by name.
        out: Folder of the run.
    """
    out = Path(out)
    task = probes.task
    validation = data.splits["validation"]
    groups = None  # i64[N], the group (city) of each image, numbered alphabetically
    if validation.groups is not None:
        groups = torch.tensor(np.unique(validation.groups, return_inverse=True)[1])
    weights = bootstrap_weights(len(validation), groups=groups)
    last = None if probes.mllm.has_llm else last_layer(probes.mllm.sites)
    source = EffectSource(probes.sites, last_layer=last, task=task, weights=weights, groups=groups)
    effects = source.effects(task.sums(counted))
    if record.strengths is not None:
        effects |= source.effects_at_strengths(record.strengths, record.sums_at_strengths)
    if task.name == SEGMENTATION:
        counts = Counts(**{name: counted[name] for name in Counts._fields})
        effects |= source.patch_accuracies(counts, columns=probes.mllm.grid[1])
    about = manifest(probes, record, data)
    write_files(
        {
            out / "counts.safetensors": counted if groups is None else counted | {"group": groups},
            out / EFFECTS_FILE: effect_file(effects),
            out / "probes.safetensors": probes.heads.state_dict(),
            out / "manifest.json": lambda hashes: about | {"files": hashes},
            out / "metrics.json": make_metrics(
                probes, record=record, data=data, counted=counted, weights=weights
            ),
        }
    )


def make_metrics(
    probes: SiteProbes,
    record: RunRecord,
    data: ProbeData,
    counted: dict[str, Tensor],
    weights: Tensor,
) -> dict[str, Any]:
    """Return metrics.json of a run: the model, the settings, and the scores of all sites.

    `task` and `scores` are those of another task than segmentation: `scores` maps the names of its scores to "higher"
    or "lower", whichever is better, the main score first. `classes` and `baseline` are those of segmentation.

    Args:
        probes: The model and its probes.
        record: How the probes were made.
        data: Images and targets.
        counted: As in :func:`save_run`.
        weights: f[R, N], of the bootstrap.
    """
    settings = record.settings
    mllm = probes.mllm
    task = probes.task
    sums = task.sums(counted)
    sites = site_entries(probes, record=record, sums=sums, weights=weights)
    metrics = {
        "dataset": data.name,
        "split": "validation",
        "images": len(data.splits["validation"]),
        "mllm": settings["mllm"],
        "model_kind": "mllm" if mllm.has_llm else "encoder",
        "image_attention": mllm.image_attention,
        "own_image_attention": mllm.own_image_attention,
        "last_layer": last_layer(mllm.sites),
        "image_resize": settings["image_resize"],
        "dtype": str(mllm.model.dtype).removeprefix("torch."),
        "untrained": list(settings["untrained"] or ()),
        **{name: settings[name] for name in ("match", "draw", "seed")},
        **_metrics_of_task(task, data=data, counted=counted),
        "grid": list(mllm.grid),
        "probe": record.probe,
        "sites": sites,
        "summary": summary({site["site"]: site[task.score] for site in sites}, task.sign),
    }
    if settings["cut"]:
        metrics["cut"] = settings["cut"]
    if data.is_blank:
        metrics["blank"] = True
    if record.strengths:
        metrics["path"] = {record.probe["solved"]: {"sites": record.strengths.sites}}
    return metrics


def _metrics_of_task(task: Task, data: ProbeData, counted: dict[str, Tensor]) -> dict[str, Any]:
    if task.name == SEGMENTATION:
        return {"classes": data.classes, "baseline": baseline(counted["labelled"], data.classes)}
    better = {name: "higher" if is_higher else "lower" for name, is_higher in task.scores.items()}
    return {"task": task.name, "scores": better}


def site_entries(
    probes: SiteProbes, record: RunRecord, sums: Tensor, weights: Tensor
) -> list[SiteEntry]:
    """Return per site the scores with intervals over images, the best epoch, and the main score of each validation.

    Args:
        probes: The model and its probes.
        record: How the probes were made.
        sums: Per image, f[S, N, M].
        weights: f[R, N], of the bootstrap.
    """
    task = probes.task
    scores = dataset_scores(task, sums)
    resampled = resampled_scores(task, sums, weights)
    entries = []
    for i, site in enumerate(probes.sites):
        history = record.history.get(site, [])
        numbers = [score for score in history if not math.isnan(score)]
        best_epoch = None
        if numbers:
            best = max(numbers, key=lambda score: task.sign * score)
            best_epoch = record.epochs[history.index(best)]
        entry = {
            "site": site,
            "dim": probes.mllm.widths[site],
            "best_epoch": best_epoch,
            "history": history,
        }
        if numbers and not math.isnan(history[-1]):
            entry |= {"last": history[-1], "selection": task.sign * (best - history[-1])}
        for name, values in scores.items():
            value = values[i].item()
            ci95 = interval(value, resampled[name][:, i], lowest=0.0, highest=task.highest)
            entry |= {name: value, f"{name}_ci95": ci95}
        entries.append(entry)
    if task.name == SEGMENTATION:
        for entry, ious in zip(entries, task.iou(sums.sum(1)).tolist(), strict=True):
            entry["iou_per_class"] = [None if math.isnan(iou) else iou for iou in ious]
    return entries


def baseline(labelled: Tensor, classes: list[str]) -> Baseline:
    """Return the scores of predicting the most frequent class everywhere; `labelled` i64[N, K] are pixels."""
    pixels = labelled.sum(0).double()
    share = (pixels.max() / pixels.sum()).item()
    return {
        "class": classes[pixels.argmax()],
        "miou": share / pixels.count_nonzero().item(),
        "pacc": share,
    }


def manifest(probes: SiteProbes, record: RunRecord, data: ProbeData) -> Manifest:
    """Return the versions, commit, configuration, data and hardware of a run."""
    model = record.settings["mllm"]
    config = {"mllm": _absolute(model), "update_scales": probes.mllm.update_scales}
    images = {
        "root": _absolute(data.root),
        "dataset": data.dataset,
        "options": data.options,
        "fingerprint": describe_digest(record.identity["data"]),
    }
    if data.labels:  # of both splits, if the files were checked in this process
        labels = {split: counts._asdict() for split, counts in data.labels.items()}
        images |= {"labels": labels} | data.remarks
    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    versions = {name: version(name) for name in PACKAGES}
    return {
        "versions": versions | {"python": platform.python_version()},
        "git_commit": _git_commit(),
        "config": dict(record.settings) | config,
        "data": images,
        "identity": record.identity,
        "mllm_training": read_training(Path(model)) or None,
        "hardware": {
            "machine": platform.machine(),
            "cpu_threads": torch.get_num_threads(),
            "gpu": gpu,
        },
    }


def _absolute(path: str) -> str:
    """Return the absolute path of a folder, so that analyses find it from any directory; a hub id unchanged."""
    if is_source(path):
        return absolute_source(path)
    if Path(path).is_dir():
        return str(Path(path).resolve())
    return path


def _git_commit() -> str | None:
    """Return the commit of the clone that this code is in; None without git, or if it is installed, also in a clone."""
    if not shutil.which("git"):
        return None
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", root, "rev-parse", "--show-toplevel", "HEAD"]
    answer = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    if len(answer) == 2 and answer[0] == str(root):
        return answer[1]
    return None


def summary(scores: dict[str, float], sign: int = 1) -> Summary:
    """Return the score of encoder, adapter and best layer with their differences.

    `final_norm` is reported beside the best layer: the paper does
    not say whether its last layer is normalised.

    Args:
        scores: The main score by site.
        sign: 1 if a higher score is better, else -1.
    """
    layers = filter(is_layer, scores)  # without `final_norm`, the last layer, normalised
    peak = max(layers, key=lambda site: sign * scores[site], default=None)
    best = scores.get(peak)

    def gain_over(site: str) -> float | None:
        if peak is None or site not in scores:
            return None
        return sign * (best - scores[site])

    return {
        "encoder": scores.get(ENCODER),
        "adapter": scores.get(ADAPTER),
        "peak_llm": best,
        "peak_site": peak,
        "final_norm": scores.get(FINAL_NORM),
        "delta_enc": gain_over(ENCODER),
        "recovery": gain_over(ADAPTER),
    }
