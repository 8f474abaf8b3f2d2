"""Does the strength with the lowest cross-entropy over folds have the highest mIoU on other photos?

    python -m experiments.statistics.strengths ENCODER DATA ... --images 24 48 100 200 --subsets 2

ENCODER is a DINOv2 in transformers' format, whose states before the last layer are probed; DATA are folder data sets.
Each row is the mean over subsets of so many training photos: mIoU of the validation photos at the chosen strength, and
in points what half a decade stronger, half a decade weaker, and a decade weaker have more; then in how many subsets the
half decade weaker is better. Cross-entropy on the validation photos at the same strengths is below each row.
"""

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModel

from probes.data.batches import MaskPreparer
from probes.data.folder import FolderDataset
from probes.data.samplers import assign_folds
from probes.ops.cross_entropy import loss_and_gradient
from probes.ops.geometry import Geometry
from probes.ops.pixel_counts import Counts, count
from probes.solve.held_out import scored_masks
from probes.solve.objective import NODES, SiteProblem
from probes.solve.strength_search import FoldSearch
from probes.tasks import SEGMENTATION, TASKS

GRID = (16, 16)
GEOMETRY = Geometry(GRID, 224, 224)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
LOSS = TASKS[SEGMENTATION].loss
FOLDS = 4
# of counts
AXIS_OF_IMAGES = {
    "intersection": 1,
    "predicted": 1,
    "labelled": 0,
    "patch_right": 1,
    "patch_valid": 0,
}
STEPS = {"stronger": 0.5, "chosen": 0.0, "weaker": -0.5, "a decade weaker": -1.0}  # decades


@torch.inference_mode()
def read_states(
    encoder: torch.nn.Module, dataset: FolderDataset, images: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Return the patch tokens f[N, T, d] before the last layer, and the masks uint8[H, W]."""
    states = []
    targets = []
    for i in images:
        sample = dataset[i]
        placed = bytearray(GEOMETRY.place(sample["image"]).tobytes())
        square = torch.frombuffer(placed, dtype=torch.uint8)
        pixels = square.view(1, 224, 224, 3).permute(0, 3, 1, 2) / 255
        hidden = encoder((pixels - MEAN) / STD, output_hidden_states=True).hidden_states[-2]
        states.append(hidden[0, -GRID[0] * GRID[1] :].clone())
        targets.append(torch.from_numpy(sample["target"]))
    return torch.stack(states).clone(), targets


def score(
    problem: SiteProblem, points: Tensor, states: Tensor, targets: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return mIoU f[R] and cross-entropy per pixel f[R] of probes f[R, K, d + 1]."""
    weights = problem.space.to_states(points)[..., :-1].float()
    bias = points[..., -1:].float()
    centred = states - problem.space.mean.float()
    classes = points.shape[1]
    counts_of_images: list[Counts] = []
    loss = 0
    pixels = 0
    for state, target in zip(centred, targets, strict=True):
        logits = torch.einsum("td,rkd->rkt", state, weights) + bias
        logits = logits.unflatten(-1, GRID)[:, None]
        view = GEOMETRY.view(tuple(target.shape))
        counts_of_images.append(count(logits, target[None], view))
        masks = MaskPreparer(GEOMETRY, classes, NODES)([target])
        loss_of_image, _ = loss_and_gradient(logits, masks, needs_grad=False)
        loss = loss + loss_of_image.sum(1)
        pixels += int((target != 255).sum())
    joined = {}
    for field, axis in AXIS_OF_IMAGES.items():
        joined[field] = torch.cat([getattr(counts, field) for counts in counts_of_images], axis)
    counts = Counts(**joined)
    task = TASKS[SEGMENTATION]
    scores = task.dataset_scores(task.sums(counts._asdict()).sum(1))
    return scores["miou"], loss / pixels


def solve(states: Tensor, targets: list[Tensor], classes: int) -> tuple[SiteProblem, float, Tensor]:
    """Return the problem, the chosen strength, and the probes f[R, K, d + 1] at `STEPS` from it."""
    prepare = MaskPreparer(GEOMETRY, classes, NODES)
    masks = prepare(targets)
    fold_of = assign_folds(range(len(states)), FOLDS)
    scored = scored_masks(masks, fold_of=fold_of, target_of=lambda i: targets[i], prepare=prepare)
    problem = SiteProblem(loss=LOSS, states=states, masks=masks, fold_of=fold_of, scored=scored)
    tried, _ = FoldSearch(problem).choose()
    chosen = tried.strengths[tried.chosen]
    # from strong to weak, as the solver has them
    given = [chosen * 10**step for step in STEPS.values()]
    _, points = FoldSearch(problem).choose(given)
    return problem, chosen, points


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoder")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--images", type=int, nargs="+", default=[24, 48, 100, 200])
    parser.add_argument("--subsets", type=int, default=2)
    parser.add_argument("--validation", type=int, default=1000, help="most validation photos")
    args = parser.parse_args()
    encoder = AutoModel.from_pretrained(args.encoder).eval()
    print(
        "data, photos: strength, mIoU at it; stronger, weaker, a decade weaker; weaker is better in"
    )
    for root in args.data:
        training = FolderDataset(root, "training")
        validation = FolderDataset(root, "validation")
        most = min(len(training), args.subsets * max(args.images))
        states, targets = read_states(encoder, training, spread(len(training), most))
        most_validated = min(len(validation), args.validation)
        validated = read_states(encoder, validation, spread(len(validation), most_validated))
        for images in args.images:
            if images > most:
                continue
            scores = []
            strengths = []
            start = time.process_time()
            subsets = 1
            if args.subsets * images <= most:
                subsets = args.subsets
            for subset in range(subsets):
                chosen = [i + subset for i in spread(most, images)]
                targets_of_subset = [targets[i] for i in chosen]
                problem, strength, points = solve(
                    states[chosen], targets_of_subset, len(training.classes)
                )
                scores.append(torch.stack(score(problem, points, *validated)))
                strengths.append(f"{strength:.2g}")
            seconds = time.process_time() - start
            name = root.rstrip("/").rpartition("/")[2]
            row = f"{name:<15} {images:4d}: {'/'.join(strengths):<16} {describe(scores)}"
            print(f"{row}   ({seconds:.0f} CPU-s)")
            loss = torch.stack(scores).mean(0)[1]
            differences = ", ".join(f"{other - loss[1]:+.4f}" for other in loss[[0, 2, 3]])
            print(f"{'cross-entropy':<37} {loss[1]:6.4f}; {differences}", flush=True)


def describe(scores: list[Tensor]) -> str:
    """Return mIoU at the chosen strength, what others have more, and where a weaker one is better.

    Args:
        scores: Of each subset, mIoU and cross-entropy f[2, R] at `STEPS`.
    """
    miou = torch.stack(scores).mean(0)[0]
    gains = ", ".join(f"{100 * (other - miou[1]):+5.2f}" for other in miou[[0, 2, 3]])
    better = sum(miou_of_subset[2] > miou_of_subset[1] for miou_of_subset, _ in scores)
    return f"{100 * miou[1]:5.1f}; {gains}; {better} of {len(scores)}"


def spread(images: int, count: int) -> list[int]:
    """Return `count` indices below `images` at equal distances."""
    return [i * images // count for i in range(count)]


if __name__ == "__main__":
    main()
