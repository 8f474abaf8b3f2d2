"""The measurement of this project in one file, to read and to copy.

    python -m probes.minimal MODEL DATA --strength 1e-2 --out curve.png

MODEL is a checkpoint of any family that `probes sites` knows, DATA a folder of images and masks
(`data/folder.py`). For each site of the frozen model, a linear probe is solved on the training
images and scored on the validation images:

1. One forward returns the hidden states of the image tokens at all sites (`probes.load`).
2. The loss of the task is that of the logits upsampled to each mask's own size
   (`tasks/losses.py`), plus a penalty on the weights (`solve/objective.py`). It is convex,
   so that its minimum is found without a learning rate (`solve/refinement.py`).
3. The score is the mIoU of the upsampled predictions (`tasks/segmentation.py`).

These are the functions of `probes solve`, which adds what a study needs: the strength by
cross-validation, intervals, states that do not fit into memory, several processes, resuming.

Shapes: N images, T = h * w image tokens, d width of a site, K classes.
"""

import torch
from jsonargparse import auto_cli
from torch import Tensor

import probes
from probes.data.batches import MaskPreparer
from probes.data.registry import open_dataset
from probes.ops.quadrature import PreparedMasks
from probes.solve.objective import NODES, SiteProblem
from probes.solve.refinement import refine
from probes.tasks import SEGMENTATION, TASKS

TASK = TASKS[SEGMENTATION]
BATCH = 8


def read_split(mllm, dataset) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the states {site: f[N, T, d]} of the images, and their masks, uint8[H, W] each."""
    states = {site: [] for site in mllm.sites}
    targets = []
    for batch in torch.arange(len(dataset)).split(BATCH):
        samples = [dataset[i] for i in batch.tolist()]
        pixels = mllm.preprocess([sample["image"] for sample in samples])
        for site, of_batch in mllm.states(pixels).items():
            states[site].append(of_batch.cpu())
        targets += [torch.from_numpy(sample["target"]) for sample in samples]
    return {site: torch.cat(of_batches) for site, of_batches in states.items()}, targets


def solve(states: Tensor, masks: PreparedMasks, strength: float) -> tuple[Tensor, Tensor]:
    """Return weight f[K, d] and bias f[K] at the minimum of the penalised loss.

    Args:
        states: f[N, T, d].
        masks: As weights on nodes, by which the loss is exact to five digits.
        strength: Penalty r: r/2 |w|^2 in units of each channel.
    """
    one_fold = torch.zeros(len(states), dtype=torch.long)  # no image is left out
    problem = SiteProblem(loss=TASK.loss, states=states, masks=masks, fold_of=one_fold)
    strengths = torch.tensor([strength], dtype=torch.float64)
    points, _ = refine(problem, strengths, problem.start[None])
    probe = problem.space.to_states(points[0])  # of x - mean
    bias = probe[:, -1] - probe[:, :-1] @ problem.space.mean
    return probe[:, :-1].float(), bias.float()


def score(mllm, states: Tensor, targets: list[Tensor], weight: Tensor, bias: Tensor) -> float:
    """Return the mIoU over the classes that occur in masks or predictions; pixels of all images are added first."""
    sums = []
    for state, target in zip(states, targets, strict=True):
        logits = (state.float() @ weight.T + bias).T.unflatten(1, mllm.grid)  # f[K, h, w]
        counted = TASK.count(logits[None, None], target[None], mllm.geometry)
        sums.append(TASK.sums(counted)[0, 0])
    return TASK.dataset_scores(torch.stack(sums).sum(0))[TASK.score].item()


def measure(model: str, data: str, strength: float) -> dict[str, float]:
    """Return {site: mIoU on the validation images} of solved linear probes."""
    mllm = probes.load(model, image_resize="squash")  # all of a photo; masks are placed accordingly
    training = open_dataset("folder", data, "training")
    states, targets = read_split(mllm, training)
    classes = len(training.classes)
    # the masks as weights on a few nodes per cell of the token grid, which the loss needs
    masks = MaskPreparer(mllm.geometry, classes, NODES)(targets)
    validation_states, validation_targets = read_split(
        mllm, open_dataset("folder", data, "validation")
    )
    miou = {}
    for site in mllm.sites:
        weight, bias = solve(states[site], masks, strength)
        miou[site] = score(
            mllm,
            states=validation_states[site],
            targets=validation_targets,
            weight=weight,
            bias=bias,
        )
        print(f"{site:12} {100 * miou[site]:5.1f}", flush=True)
    return miou


def main(model: str, data: str, strength: float = 1e-2, out: str = "curve.png") -> None:
    """Print the mIoU by site, and draw it.

    Args:
        model: Checkpoint folder or hub id.
        data: Folder with images/, annotations/ and classes.json.
        strength: Penalty r: r/2 |w|^2 in whitened units.
        out: Picture of the curve.
    """
    miou = measure(model, data, strength)

    from matplotlib.figure import Figure

    axes = (figure := Figure(layout="constrained")).add_subplot()
    axes.plot(list(miou), [100 * value for value in miou.values()], marker="o")
    axes.set(ylabel="mIoU (%)")
    axes.tick_params(axis="x", rotation=90)
    figure.savefig(out)
    print(out)


if __name__ == "__main__":
    auto_cli(main)
