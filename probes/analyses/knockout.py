"""`probes knockout`: do correctly classified patches pull misclassified ones to the right class? (Sec. 4, App. C)

For a class c, an image takes part if the adapter's probe predicts c on patches that are something else. Their most
frequent true class is the correct one there. Blocked as in Eq. 1, in all layers at once, are in turn

    none               nothing
    incorrect          the patches predicted c
    correct            the patches predicted the correct class
    random_incorrect   as many random patches as in incorrect
    random_correct     as many random patches as in correct

and at each layer l the patches wrongly predicted c are counted, n_c(l), by the same frozen probes. Reported is
n_c(l) / n_c(0), averaged over images (App. C.1). Where the paper does not say which predictions define the blocked
patches, the adapter's (layer 0) are taken, as in C.1; `--labels-from` takes another site's.

Shapes: B images or cases, T patches, L layers, layer 0 the adapter.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ..data.prepared import Prepared, collate
from ..knockout import Knockout
from ..metrics import patch_labels
from ..mllm import ADAPTER, FrozenMLLM
from ..module import by_size
from ..results import ProbeRun, read_tensors, write_json, write_tensors
from ..statistics import bootstrap_weights, interval

CONDITIONS = ("none", "incorrect", "correct", "random_incorrect", "random_correct")


class PatchReader:
    """A model and its probes as one function: pixels in, the class of each patch at each layer out.

    Args:
        run: A finished probe run that has all layers.
    """

    def __init__(self, run: ProbeRun):
        self.mllm: FrozenMLLM = run.mllm()
        self.layers = run.layers
        self.heads = {site: head.to(self.mllm.device) for site, head in run.probes().items()}

    def predict(self, pixels: Tensor, knockout: Knockout | None = None) -> Tensor:
        """long[L + 1, B, T]: the predicted class of each patch, at the adapter and behind each layer."""
        states = self.mllm.states(pixels, self.layers, knockout)
        return torch.stack([self.heads[site](states[site].float()).argmax(-1) for site in self.layers])


@dataclass
class Case:
    """An image in which patches are taken for a class c that they are not.

    Args:
        image: Its index in the split.
        row: Its place in the batch.
        patches: n_c(0), how many there are.
        anchors: Patches that are predicted the correct class.
        wrong_class: c.
        correct_class: The most frequent true class of the patches wrongly predicted c.
        elsewhere: bool[T], labelled patches whose true class is not c.
        blocked: bool[T] by condition other than "none".
    """

    image: int
    row: int
    patches: int
    anchors: int
    wrong_class: int
    correct_class: int
    elsewhere: Tensor
    blocked: dict[str, Tensor]

    def wrong(self, predicted: Tensor) -> Tensor:
        """n_c(l): patches wrongly predicted c at each layer, f[L + 1], from predictions long[L + 1, T]."""
        return ((predicted == self.wrong_class) & self.elsewhere).sum(-1).float()


def find_cases(
    predicted: Tensor, truth: Tensor, index: Tensor, wrong_class: int, reference: int, min_patches: int, rng
) -> list[Case]:
    """The images of a batch in which at least `min_patches` patches are wrongly predicted `wrong_class` at layer 0.

    Args:
        predicted: long[L + 1, B, T] of the unmodified model.
        truth: long[B, T], -1 where unlabelled.
        index: long[B] in the split.
        wrong_class: c.
        reference: The layer whose predictions say what is blocked.
        min_patches: See above.
        rng: Draws the random controls.
    """
    cases = []
    for row, image in enumerate(index.tolist()):
        elsewhere = (truth[row] != wrong_class) & (truth[row] >= 0)
        mistaken = (predicted[0, row] == wrong_class) & elsewhere
        if mistaken.sum() < min_patches:
            continue
        correct_class = truth[row][mistaken].mode().values.item()
        labels = predicted[reference, row]
        blocked = {"incorrect": labels == wrong_class, "correct": labels == correct_class}
        for condition in list(blocked):
            drawn = rng.permutation(len(labels))[: int(blocked[condition].sum())]
            blocked[f"random_{condition}"] = torch.zeros_like(elsewhere).index_fill_(0, torch.from_numpy(drawn), True)
        anchors = int(blocked["correct"].sum())
        cases.append(Case(image, row, int(mistaken.sum()), anchors, wrong_class, correct_class, elsewhere, blocked))
    return cases


def remaining_rates(
    reader: PatchReader,
    pixels: Tensor,
    predicted: Tensor,
    cases: list[Case],
    layers: list[int] | None,
    batch_size: int,
) -> list[dict[str, Tensor]]:
    """n_c(l) / n_c(0) of each case under each condition, f[L + 1]; cases and conditions share forwards."""
    rates = [{"none": case.wrong(predicted[:, case.row])} for case in cases]
    jobs = [(i, condition) for i in range(len(cases)) for condition in CONDITIONS[1:]]
    for start in range(0, len(jobs), batch_size):
        chunk = jobs[start : start + batch_size]
        blocked = torch.stack([cases[i].blocked[condition] for i, condition in chunk])
        cut = reader.predict(pixels[[cases[i].row for i, _ in chunk]], Knockout(blocked, layers))
        for j, (i, condition) in enumerate(chunk):
            rates[i][condition] = cases[i].wrong(cut[:, j])
    return [{condition: n / counts["none"][0] for condition, n in counts.items()} for counts in rates]


def knockout(
    run: ProbeRun,
    classes: list[str],
    *,
    layers: list[int] | None = None,
    labels_from: str = ADAPTER,
    min_patches: int = 1,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[dict, dict[str, Tensor]]:
    """Runs all conditions over the validation split.

    Args:
        run: A finished probe run with all layers.
        classes: The classes c.
        layers: Decoder layers that are cut; None for all.
        labels_from: The site whose predictions say which patches are blocked.
        min_patches: Images with fewer wrong patches are left out.
        limit: Looks at no more than so many images.
        batch_size: Images, or cases under a condition, of a forward.
        seed: Of the random controls and the bootstrap.

    Returns:
        What knockout.json holds; and by "class/condition" the remaining rates f[cases, L + 1], by "class/image",
        "/patches", "/anchors" and "/correct_class" what they are about.

    Raises:
        ValueError: An unknown class or site, or no image in which any of the classes is wrongly predicted.
    """
    names = run.metrics["classes"]
    for name in classes:
        if name not in names:
            raise ValueError(f"unknown class {name!r}; {run.path} has {', '.join(names)}")
    if labels_from not in run.layers:
        raise ValueError(f"unknown labels_from {labels_from!r}; {run.path} has {', '.join(run.layers)}")
    reader, rng, found = PatchReader(run), np.random.default_rng(seed), {name: [] for name in classes}
    for pixels, truth, index in _batches(run, reader, batch_size, limit):
        predicted = reader.predict(pixels)
        cases = [
            case
            for name in classes
            for case in find_cases(
                predicted, truth, index, names.index(name), run.layers.index(labels_from), min_patches, rng
            )
        ]
        for case, rates in zip(
            cases, remaining_rates(reader, pixels, predicted, cases, layers, batch_size), strict=True
        ):
            found[names[case.wrong_class]].append((case, rates))
    if not any(found.values()):
        raise ValueError(f"no image has {min_patches} or more patches wrongly predicted any of {', '.join(classes)}")
    tensors = {}
    for name, cases in found.items():
        if not cases:
            continue
        for fact in ("image", "patches", "anchors", "correct_class"):
            tensors[f"{name}/{fact}"] = torch.tensor([getattr(case, fact) for case, _ in cases])
        tensors |= {f"{name}/{c}": torch.stack([rates[c] for _, rates in cases]) for c in CONDITIONS}
    facts = {
        "image_attention": run.metrics["image_attention"],
        "untrained": run.metrics["untrained"],
        "layers": "all" if layers is None else layers,
        "labels_from": labels_from,
        "min_patches": min_patches,
        "seed": seed,
        "classes": [class_entry(name, tensors, seed, run.groups) for name in classes],
    }
    return facts, tensors


class Cases(NamedTuple):
    """Cases of a finished knockout.

    Args:
        rates: n_c(l) / n_c(0) by condition, f[C, L + 1].
        images: long[C], indices in the split; an image can hold cases of several classes.
    """

    rates: dict[str, Tensor]
    images: Tensor

    def mean(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over cases of `values` f[C, ...], and under `weights` f[R, N] of the split's images, f[R, ...]."""
        weights = weights.double()[:, self.images]
        values = values.double()
        return values.mean(0), torch.tensordot(weights, values, 1) / weights.sum(1).view(-1, *[1] * (values.ndim - 1))


def read_cases(run: ProbeRun, min_patches: int, classes: list[str] | None = None) -> Cases | None:
    """The cases of a run's knockout with at least `min_patches` patches wrong at the adapter; None if there is none."""
    path = run.path / "knockout.safetensors"
    tensors = read_tensors(path) if path.is_file() else {}
    kept = {
        name: tensors[f"{name}/patches"] >= min_patches
        for name in (key.removesuffix("/patches") for key in tensors if key.endswith("/patches"))
        if classes is None or name in classes
    }
    if not any(mask.any() for mask in kept.values()):
        return None
    joined = lambda what: torch.cat([tensors[f"{name}/{what}"][mask] for name, mask in kept.items()])
    return Cases({condition: joined(condition) for condition in CONDITIONS}, joined("image"))


def class_entry(name: str, tensors: dict[str, Tensor], seed: int, groups: Tensor | None = None) -> dict:
    """Mean remaining rate by condition and layer, with intervals over images (or their groups, long[N]); empty where no
    image has a case."""
    if f"{name}/image" not in tensors:
        return {"class": name, "images": 0, "remaining": {}, "ci95": {}}
    images = len(tensors[f"{name}/image"])
    groups = None if groups is None else groups[tensors[f"{name}/image"]]
    weights = bootstrap_weights(images, seed=seed, groups=groups)
    weights /= weights.sum(1, keepdim=True)
    entry = {"class": name, "images": images, "remaining": {}, "ci95": {}}
    for condition in CONDITIONS:
        rates = tensors[f"{name}/{condition}"]
        mean, resampled = rates.mean(0).tolist(), weights @ rates
        entry["remaining"][condition] = mean
        entry["ci95"][condition] = [interval(m, resampled[:, i]) for i, m in enumerate(mean)]
    return entry


def _batches(
    run: ProbeRun, reader: PatchReader, batch_size: int, limit: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pixels f[B, 3, H, W], true class of each patch long[B, T], index long[B]."""
    dataset = Prepared(run.dataset(), reader.mllm.preprocess)
    dataset = Subset(dataset, range(min(len(dataset), limit or len(dataset))))
    for batch in tqdm(DataLoader(dataset, batch_size, collate_fn=collate), desc="knockout", mininterval=5):
        truth = torch.empty(len(batch["index"]), reader.mllm.grid[0] * reader.mllm.grid[1], dtype=torch.long)
        for images, target in by_size(batch["target"]):
            view = reader.mllm.geometry.view(target.shape[1:])
            truth[images] = patch_labels(target, len(run.metrics["classes"]), reader.mllm.grid, view=view)
        yield batch["pixels"], truth, batch["index"]


def run(args: argparse.Namespace) -> None:
    """`probes knockout`."""
    facts, tensors = knockout(
        ProbeRun(args.probes),
        args.classes,
        layers=args.layers,
        labels_from=args.labels_from,
        min_patches=args.min_patches,
        limit=args.limit,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    out = Path(args.out or args.probes)
    write_tensors(out / "knockout.safetensors", tensors)
    write_json(out / "knockout.json", facts)
    for entry in facts["classes"]:
        last = ", ".join(f"{condition} {rates[-1]:.0%}" for condition, rates in entry["remaining"].items())
        print(f"{entry['class']} ({entry['images']} images), remaining at the last layer: {last}")
