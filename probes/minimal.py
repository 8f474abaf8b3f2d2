"""The measurement of this project in one file, to read and to copy.

    python -m probes.minimal MODEL DATA --strength 1e-2 --out curve.png

MODEL is a checkpoint of any family that `probes sites` knows, DATA a folder of images and masks
(`data/folder.py`). For each site of the frozen model, a linear probe is solved on the training
images and scored on the validation images:

1. One forward returns the hidden states of the image tokens at all sites (`probes.load`).
2. The loss is the cross-entropy of the logits upsampled to each mask's own size
   (`probes.upsampled_cross_entropy`), plus a penalty on the weights. It is convex, so that L-BFGS
   finds its minimum: there is no learning rate to choose.
3. The score is the mIoU of the upsampled predictions.

`probes solve` gives the same numbers for the same strength, and adds what a study needs: the
strength by cross-validation, certificates, intervals, states that do not fit into memory, several
processes, resuming.

Shapes: N images, T = h * w image tokens, d width of a site, K classes.
"""

import argparse

import torch
from torch import Tensor

import probes
from probes.data.registry import open_dataset
from probes.ops.pixel_counts import count
from probes.ops.quadrature import PreparedMasks, join_masks

NODES = 5  # per cell of the token grid and axis; the loss is then exact to five digits


def read_split(mllm, dataset, batch_size: int = 8) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the states {site: f[N, T, d]} of the images, and their masks, uint8[H, W] each."""
    states = {site: [] for site in mllm.sites}
    targets = []
    for first in range(0, len(dataset), batch_size):
        samples = [dataset[i] for i in range(first, min(first + batch_size, len(dataset)))]
        pixels = mllm.preprocess([sample["image"] for sample in samples])
        for site, of_batch in mllm.states(pixels).items():
            states[site].append(of_batch.float().cpu())
        targets += [torch.from_numpy(sample["target"]) for sample in samples]
    return {site: torch.cat(of_batches) for site, of_batches in states.items()}, targets


def prepare(mllm, targets: list[Tensor], classes: int) -> PreparedMasks:
    """Return the masks as weights on a few nodes of the token grid, which the loss needs."""
    parts = []
    for target in targets:
        view = mllm.geometry.view(tuple(target.shape))
        parts.append(
            probes.prepare_masks(
                target[None],
                classes,
                mllm.grid,
                nodes=NODES,
                view=view,
            )
        )
    return join_masks(parts)


def whiten_channels(states: Tensor, masks: PreparedMasks) -> tuple[Tensor, Tensor]:
    """Return mean and scale f[d] of the channels, the scale pooled within classes.

    The penalty is on weights in these units, so that it does not depend on the scale of a channel.
    """
    soft = masks.soft.flatten(2).double()  # f[N, K, T], weight of each class at each token
    total = soft.sum()
    x = states.double()
    mean = torch.einsum("nkt,ntd->d", soft, x) / total
    x = x - mean
    class_sums = torch.einsum("nkt,ntd->kd", soft, x)
    weights = soft.sum((0, 2)).clamp(min=1e-12)
    between = (class_sums.square() / weights[:, None]).sum(0)
    within = (torch.einsum("nkt,ntd->d", soft, x.square()) - between) / total
    return mean.float(), within.sqrt().float()


def logits_of(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
) -> Tensor:
    """Return the logits f[N, K, h, w] of states f[N, T, d]."""
    return (states @ weight.T + bias).transpose(1, 2).unflatten(2, grid)


def solve(
    states: Tensor,
    masks: PreparedMasks,
    grid: tuple[int, int],
    strength: float,
) -> tuple[Tensor, Tensor]:
    """Return weight f[K, d] and bias f[K] at the minimum of the penalised loss."""
    mean, scale = whiten_channels(states, masks)
    whitened = (states - mean) / scale
    classes = masks.soft.shape[1]
    weight = torch.zeros(classes, states.shape[2], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        history_size=20,
        tolerance_grad=1e-6,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        fit = probes.upsampled_cross_entropy(logits_of(whitened, weight, bias, grid), masks)
        value = fit + strength / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(objective)
    with torch.no_grad():
        unwhitened = weight / scale
        return unwhitened, bias - unwhitened @ mean


def score(
    mllm,
    states: Tensor,
    targets: list[Tensor],
    weight: Tensor,
    bias: Tensor,
) -> float:
    """Return the mIoU over the classes that occur in masks or predictions; pixels of all images are added first."""
    sums = torch.zeros(3, len(bias))  # intersection, predicted, labelled
    for state, target in zip(states, targets, strict=True):
        logits = logits_of(state[None], weight, bias, mllm.grid)
        found = count(logits[None], target[None], mllm.geometry.view(tuple(target.shape)))
        counted = [found.intersection[0, 0], found.predicted[0, 0], found.labelled[0]]
        sums += torch.stack(counted)
    intersection, predicted, labelled = sums
    union = predicted + labelled - intersection
    return (intersection / union)[union > 0].mean().item()


def measure(model: str, data: str, strength: float) -> dict[str, float]:
    """Return {site: mIoU on the validation images} of solved linear probes."""
    mllm = probes.load(model, image_resize="squash")  # all of a photo; masks are placed accordingly
    training = open_dataset("folder", data, "training")
    states, targets = read_split(mllm, training)
    masks = prepare(mllm, targets, len(training.classes))
    validation_states, validation_targets = read_split(
        mllm, open_dataset("folder", data, "validation")
    )
    miou = {}
    for site in mllm.sites:
        weight, bias = solve(states[site], masks, mllm.grid, strength)
        miou[site] = score(
            mllm,
            validation_states[site],
            validation_targets,
            weight,
            bias,
        )
        print(f"{site:12} {100 * miou[site]:5.1f}", flush=True)
    return miou


def main(argv: list[str] | None = None) -> None:
    """Print the mIoU by site, and draw it."""
    parser = argparse.ArgumentParser(
        description="Solve linear probes at all sites of a frozen model."
    )
    parser.add_argument("model", help="checkpoint folder or hub id")
    parser.add_argument("data", help="folder with images/, annotations/ and classes.json")
    parser.add_argument(
        "--strength",
        type=float,
        default=1e-2,
        help="penalty r: r/2 |w|^2 in whitened units",
    )
    parser.add_argument("--out", default="curve.png", help="picture of the curve")
    args = parser.parse_args(argv)
    miou = measure(args.model, args.data, args.strength)

    from matplotlib.figure import Figure

    axes = (figure := Figure(layout="constrained")).add_subplot()
    axes.plot(list(miou), [100 * value for value in miou.values()], marker="o")
    axes.set(ylabel="mIoU (%)")
    axes.tick_params(axis="x", rotation=90)
    figure.savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
