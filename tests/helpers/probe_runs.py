"""Probe runs of one epoch on a tiny model, and finished ones from random counts, without a model."""

import hashlib
import json
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np
import tiny_models
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_bidir.common.bootstrap import bootstrap_weights, interval
from llava_bidir.common.files import write_files
from probes.cli import main
from probes.data.registry import identity_of_splits, open_dataset
from probes.models.sites import last_layer, site_names
from probes.ops.pixel_counts import Counts
from probes.runs.read import ProbeRun
from probes.runs.write import summary
from probes.score.effects import EFFECTS_FILE, EffectSource, effect_file
from probes.score.estimate import Estimate, dataset_scores, resampled_scores
from probes.score.strengths import ROWS
from probes.tasks import TASKS

GRID = (2, 2)
CLASSES_TASK = TASKS["segmentation"]
# of solved runs, strong to weak; the first and last are not solved
STRENGTHS = {
    True: [3.0, 0.3, 0.03, 0.003, 0.0003],
    False: [1.0, 0.1, 0.01, 0.001, 0.0001],
}  # by site == "encoder"
BY_STRENGTH = "by_strength.safetensors"  # of written runs alone
SETTINGS = {
    "head": "linear",
    "feature_norm": "batchnorm",
    "solved": "optimum",
    "seed": 0,
    "folds": 4,
}


def arguments(checkpoint, root, out, *more: str) -> list[str]:
    """Return a command that trains the demo's probes for one epoch, unless `more` says otherwise."""
    demo = "fit -c configs/demo/probes.yaml --trainer.max_epochs 1"
    return [*demo.split(), *places(checkpoint, root, out), *more]


def places(checkpoint, root, out) -> list[str]:
    """Return the options of a run for its model, data and folder."""
    return ["--model.mllm", str(checkpoint), "--data.root", str(root), "--out", str(out)]


def fit(checkpoint, root, out, *more: str) -> ProbeRun:
    main(arguments(checkpoint, root, out, *more))
    return ProbeRun(out)


def read_masks(folder: Path) -> list[np.ndarray]:
    """Return the masks of a folder in the order of their names."""
    return [np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]


def write_questions(run: ProbeRun, folder: Path) -> Path:
    """Write questions with regions about two validation images of a run, and return their file."""
    root = Path(run.manifest["data"]["root"]) / "images/validation"
    names = [shutil.copy(file, folder) and file.name for file in sorted(root.iterdir())[:2]]
    turns = tiny_models.turns("<image>\nname the wall", "sky")
    regions = [{"box": [0, 0, 0.5, 0.5], "class": "sky"}]
    asked = {"conversations": turns, "regions": regions}
    records = [{"id": name, "image": name} | asked for name in names]
    (folder / "questions.json").write_text(json.dumps(records))
    return folder / "questions.json"


def random_counts(quality: list[float], images: int, classes: int, seed: int) -> Counts:
    """Return the counts of sites with the pixel accuracies `quality`, of images that all runs share."""
    same = torch.Generator().manual_seed(1000)
    labelled = torch.randint(20, 400, (images, classes), generator=same)
    ease = 0.1 * torch.randn(images, 1, generator=same)
    towards = torch.rand(classes, classes, generator=same).square()
    towards.fill_diagonal_(0)
    generator = torch.Generator().manual_seed(seed)
    intersection = []
    predicted = []
    for q in quality:
        rate = (q + ease + 0.03 * torch.randn(images, classes, generator=generator)).clamp(
            0.02, 0.98
        )
        right = (rate * labelled).long()
        wrong = ((labelled - right)[..., None] * towards / towards.sum(1, keepdim=True)).long()
        right = labelled - wrong.sum(-1)
        intersection.append(right)
        predicted.append(right + wrong.sum(1))
    intersection = torch.stack(intersection)
    predicted = torch.stack(predicted)
    tokens = GRID[0] * GRID[1]
    patch = (intersection.sum(-1, keepdim=True) // tokens).expand(-1, -1, tokens).contiguous()
    valid = (labelled.sum(-1, keepdim=True) // tokens).expand(-1, tokens).contiguous()
    return Counts(
        intersection=intersection,
        predicted=predicted,
        labelled=labelled,
        patch_right=patch,
        patch_valid=valid,
    )


def sums_of(counts: Counts) -> torch.Tensor:
    """Return the sums of segmentation, [S, N, 3 K]."""
    return CLASSES_TASK.sums(counts._asdict())


def entries(sites: list[str], counts: Counts, weights: torch.Tensor) -> list[dict]:
    """Return the sites of metrics.json."""
    sums = sums_of(counts)
    score = dataset_scores(CLASSES_TASK, sums)
    drawn = resampled_scores(CLASSES_TASK, sums, weights)
    iou = CLASSES_TASK.iou(sums.sum(1))
    sites_of_metrics = []
    for i, site in enumerate(sites):
        entry = {
            "site": site,
            "dim": 16 if site == "encoder" else 32,
            "best_epoch": 2,
            "iou_per_class": iou[i].tolist(),
        }
        for name in ("miou", "pacc"):
            entry[name] = score[name][i].item()
            entry[f"{name}_ci95"] = interval(entry[name], drawn[name][:, i])
        entry["history"] = [0.8 * entry["miou"], entry["miou"]]
        sites_of_metrics.append(entry)
    return sites_of_metrics


def write_run(
    path: Path,
    quality: list[float],
    *,
    root: Path,
    mask: str = "causal",
    dataset: str = "toy world",
    encoder: str | None = None,
    untrained: bool = False,
    groups: torch.Tensor | None = None,
    images: int = 40,
    seed: int = 0,
    sites: list[str] | None = None,
    metrics: dict | None = None,
) -> Path:
    """Write a run whose encoder, adapter, layers 1..L and final norm have the pixel accuracies `quality`.

    Its manifest has no hashes of the files, so that tests may change them; :func:`record_hashes` adds them.

    Args:
        path: Folder.
        quality: L + 3 pixel accuracies.
        root: A folder dataset with classes and colours.
        encoder: Encoder in training.json; None for a checkpoint without that file.
        sites: Names of the sites, if they are others.
        metrics: Further or other values of metrics.json.
    """
    classes = json.loads((root / "classes.json").read_text())["classes"]
    sites = sites or site_names(len(quality) - 3)
    weights = bootstrap_weights(images, 300, groups=groups)
    counts = random_counts(
        quality, images=images, classes=len(classes), seed=seed + 10 * (mask != "causal")
    )
    probe = {
        "head": "linear",
        "feature_norm": "none",
        "learning_rate": 0.001,
        "seed": 0,
        "batch_size": 64,
        "epochs": 2,
        "steps": 20,
        "validated_at": [10, 20],
    }
    main = entries(sites, counts, weights)
    tensors = {name: x for name, x in counts._asdict().items() if x is not None}
    tensors["patch_class"] = torch.arange(counts.patch_valid.numel()).view_as(counts.patch_valid)
    tensors["patch_class"] %= len(classes)
    if groups is not None:
        tensors["group"] = groups
    facts = {
        "dataset": dataset,
        "split": "validation",
        "images": images,
        "mllm": "some/hf",
        "model_kind": "mllm",
        "image_attention": mask,
        "own_image_attention": None,
        "last_layer": last_layer(sites),
        "image_resize": "squash",
        "dtype": "float32",
        "untrained": ["adapter", "llm"] if untrained else [],
        "match": "none",
        "draw": 0,
        "seed": 0,
        "probe": probe,
        "classes": classes,
        "baseline": {"class": classes[0], "miou": 0.1, "pacc": 0.3},
        "grid": list(GRID),
        "sites": main,
        "summary": summary({entry["site"]: entry["miou"] for entry in main}),
    }
    facts |= metrics or {}
    training = {"encoder": {"name": encoder, "path": "x"}, "llm": "lmsys/vicuna-7b-v1.5"}
    manifest = {
        "versions": {"torch": "2", "transformers": "5"},
        "git_commit": None,
        "config": {},
        "data": {
            "root": str(root),
            "dataset": "folder",
            "options": {},
            "fingerprint": f"{dataset} {images}",
        },
        "identity": {"data": data_identity(root), "model": {}, "settings": {}},
        "mllm_training": encoder and training,
        "hardware": {"machine": "none", "cpu_threads": 1, "gpu": None},
    }
    path.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "counts.safetensors")
    (path / "metrics.json").write_text(json.dumps(facts))
    (path / "manifest.json").write_text(json.dumps(manifest))
    write_probes(path, sites, tensors["intersection"])
    write_effects(path)
    return path


def write_probes(path: Path, sites: list[str], counted: torch.Tensor) -> None:
    """Write probes of no use, which differ where what was counted [S, N, ...] does."""
    weights = counted.double().mean((1, 2))
    save_file(
        {f"{site}.head.weight": x[None].clone() for site, x in zip(sites, weights, strict=True)},
        path / "probes.safetensors",
    )


def data_identity(root: Path) -> dict[str, str]:
    """Return what a run records of a folder of images and masks; {} if there are only classes."""
    identity: dict[str, str] = {}
    if (root / "images").is_dir():
        for split in ("training", "validation"):
            identity |= identity_of_splits({split: open_dataset("folder", str(root), split)})
    return identity


def sums_by_strength(run: ProbeRun) -> torch.Tensor:
    """Return the sums per image of a written run at each row of solved strengths, strong to weak, [R, S, N, M]."""
    return load_file(run.path / BY_STRENGTH)["sums"]


def effects_of_counts(run: ProbeRun) -> dict[str, Estimate]:
    """Return the effects of a run, computed from its counts; of a written one, also those of each row of strengths."""
    source = EffectSource(
        run.sites,
        last_layer=None if run.has_llm else run.last_layer,
        task=run.task,
        weights=run.weights,
        groups=run.groups,
    )
    effects = source.effects(run.sums_at(run.sites))
    is_written = (run.path / BY_STRENGTH).is_file()
    if is_written and run.strengths is not None:
        effects |= source.effects_at_strengths(run.strengths, sums_by_strength(run))
    if run.task_name == "segmentation":
        effects |= source.patch_accuracies(run.counts, columns=run.metrics["grid"][1])
    return effects


def write_effects(path: Path) -> None:
    """Write the effects of a written run, of whose counts or path a test has made others."""
    write_files({path / EFFECTS_FILE: effect_file(effects_of_counts(ProbeRun(path)))})


def record_hashes(path: Path) -> None:
    """Write the SHA-256 of a run's files into its manifest, as after an edit on purpose."""
    manifest = json.loads((path / "manifest.json").read_text())
    files = [
        file for file in (path / "metrics.json", *path.glob("*.safetensors")) if file.is_file()
    ]
    manifest["files"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (path / "manifest.json").write_text(json.dumps(manifest))


def write_solved(
    path: Path,
    quality: list[float],
    *,
    stronger: list[float] | None = None,
    unconverged: Collection[tuple[str, str]] = (),
    seed: int = 0,
    **options,
) -> str:
    """Write a solved run with the pixel accuracies `quality` at all rows of strengths.

    Args:
        path: Folder.
        quality: As of :func:`write_run`.
        stronger: Those of the stronger row, if they are others.
        unconverged: Rows and sites whose probes have not converged.
        seed: As of :func:`write_run`.
        **options: Those of :func:`write_run`.
    """
    write_run(path, quality, seed=seed, **options)
    metrics = json.loads((path / "metrics.json").read_text())
    shape = metrics["images"], len(metrics["classes"])
    curves = enumerate([stronger or quality, quality, quality])
    counts = [random_counts(x, *shape, seed + 50 + 7 * i) for i, x in curves]
    counted = {
        name: torch.stack([getattr(c, name) for c in counts])
        for name in ("intersection", "predicted")
    }
    counted["labelled"] = counts[0].labelled
    scores = [None, 0.5, 0.5, 0.5, None]
    sites = []
    for entry in metrics["sites"]:
        entry |= {"best_epoch": None, "history": []}
        site = entry["site"]
        strengths = STRENGTHS[site == "encoder"]
        certificates = [
            {"gradient": 0.0, "decrease": 0.0, "converged": (row, site) not in unconverged}
            for row in ROWS
        ]
        sites.append(
            {
                "site": site,
                "strengths": strengths,
                "cv_cross_entropy": [0.9, 0.6, 0.5, 0.6, 0.9],
                "miou": scores,
                "pacc": scores,
                "chosen": strengths[2],
                "lowest": strengths[2],
                "certificates": [None, *certificates, None],
            }
        )
    metrics |= {"probe": SETTINGS, "path": {"optimum": {"sites": sites}}}
    (path / "metrics.json").write_text(json.dumps(metrics))
    save_file({"sums": CLASSES_TASK.sums(counted)}, path / BY_STRENGTH)
    write_effects(path)
    return str(path)
