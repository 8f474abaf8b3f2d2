"""Probes at their optimum where the images do not fit: strengths, losses and certificates pass by pass.

    python tests/bench/passes.py STATES.pt --share 1 0.08 0.02 0.005 [--site random_adapter] [--passes 10]

STATES.pt has {"classes": K, "training": (f[N, T, d], N masks uint8[H, W]), "validation": the same}, as
`extract_states.py` writes it for a Dinov2Model. `--share` is the part of the bytes of all states that the solver may
keep; 1 keeps them all. `--site random_adapter` solves the states after a random two-layer MLP to 576 channels instead.
`--synthetic` draws states of Gaussian classes from a seed, batch by batch, instead of reading a file. They are like
those of DINOv2-S; `--decay 0 --image-share 0.5` makes them much harder.
"""

import argparse
import math
import resource
import time

import torch
import torch.nn.functional as F
from synthetic_states import BATCH, Synthetic

from probes.data.samplers import assign_folds
from probes.ops.bilinear import upsampled_argmax
from probes.ops.geometry import GridPlacement
from probes.ops.quadrature import PreparedMasks, join_masks, prepare_masks
from probes.solve.curvature import SampledPixels
from probes.solve.held_out import (
    class_pixels,
    ignore_classes,
    lone_classes,
    scored_masks,
)
from probes.solve.moments import Moments, SiteSpace
from probes.solve.objective import LOOSE_NODES, TIGHT_NODES, PixelProblem, SiteProblem
from probes.solve.pass_refinement import PassRefinement
from probes.solve.pass_sums import PassSums, null_gradient
from probes.solve.pixel_sample import (
    CANDIDATES,
    AxisRange,
    ChannelRange,
    count_and_seed,
    draw_pixels,
    prefer_uncertain,
)
from probes.solve.refinement import start_refinement
from probes.solve.strength_path import FoldSearch
from probes.tasks import SEGMENTATION, TASKS

LOSS = TASKS[SEGMENTATION].loss
FOLDS = 4


class Images:
    """States and masks of a data set in a file, or after a random MLP."""

    def __init__(self, path: str, site: str, sides: int, device: str = "cpu"):
        data = torch.load(path)
        self.device = device
        self.classes = data["classes"]
        (self.states, self.targets), (states, self.validation_targets) = (
            data["training"],
            data["validation"],
        )
        if site == "random_adapter":
            self.states, states = _random_adapter(self.states, states)
        self.validation = states
        self.grid = (sides, sides)
        self.masks: dict[int, list] = {}

    def __len__(self) -> int:
        return len(self.targets)

    def prepare(self, target: torch.Tensor) -> PreparedMasks:
        """Return masks uint8[B, H, W] with many nodes."""
        return prepare_masks(target, self.classes, self.grid, TIGHT_NODES)

    def prepared(self, nodes: int) -> list:
        """Return all masks, prepared once."""
        if nodes not in self.masks:
            masks = [
                prepare_masks(target[None], self.classes, self.grid, nodes)
                for target in self.targets
            ]
            self.masks[nodes] = masks
        return self.masks[nodes]

    def batches(self):
        """Yield images, states, masks and targets."""
        for start in range(0, len(self), BATCH):
            images = range(start, min(start + BATCH, len(self)))
            masks = join_masks([self.prepared(TIGHT_NODES)[i] for i in images])
            yield (
                list(images),
                self.states[start : start + BATCH].to(self.device),
                masks.to(self.device),
                [self.targets[i] for i in images],
            )


def _random_adapter(*states: torch.Tensor) -> list[torch.Tensor]:
    """Return states after a random MLP of two layers, 576 channels."""
    generator = torch.Generator().manual_seed(1)
    mean = states[0].mean((0, 1))
    deviation = states[0].std((0, 1))
    width = states[0].shape[-1]
    first = torch.randn(width, 576, generator=generator) / width**0.5
    second = torch.randn(576, 576, generator=generator) / 576**0.5

    def adapt(x):
        return F.gelu(((x - mean) / deviation) @ first) @ second

    return [torch.cat([adapt(part) for part in x.split(BATCH)]) for x in states]


def solve_by_passes(data, share: float, passes: int) -> dict:
    """Solve a site with a sample of a share of the bytes of float32 states; print each pass."""
    fold_of = assign_folds(len(data), FOLDS)
    total = int(
        share * len(data) * data.grid[0] * data.grid[1] * 4
    )  # float32 states, a byte a channel at first
    channels = moments = None
    by_class = torch.zeros(FOLDS, data.classes, dtype=torch.float64, device=data.device)
    kept = []
    for images, states, masks, targets in data.batches():
        by_class += class_pixels(masks, fold_of[images], FOLDS)
        if moments is None:
            channels = ChannelRange.of(states)
            moments = Moments.zeros(channels.mean, 1, data.classes)
        moments.update(states.flatten(0, 1), masks.soft.flatten(2).mT.flatten(0, 1).double(), 0)
        draws = [count_and_seed(image, len(data), total, 0) for image in images]
        pixels = draw_pixels(images, targets, draws, data.grid, GridPlacement.full)
        kept.append((channels.store(pixels.interpolate(states)).cpu(), pixels))
    space = SiteSpace.of_moments(moments)
    null = null_gradient(LOSS, space, moments)
    moments = None
    stored, labels, weights, folds = gather(kept, fold_of, data.device)
    inputs = space.coordinates(channels.restore(stored))
    axes = AxisRange.of(space, inputs)
    found = FoldSearch(PixelProblem(space, LOSS, inputs, labels, weights, folds, FOLDS)).solve()
    chosen = found.path.strengths[found.path.chosen]
    of_all_images = found.points[found.path.solved.index(found.path.chosen)]
    points = torch.cat([found.fold_points, of_all_images[None]])
    refinement = PassRefinement.start(LOSS, space, null, chosen, points, None)
    print(
        f"  pass 1: {len(labels)} pixels choose {chosen:.2g}; {cpu_seconds():.0f} CPU-s", flush=True
    )
    lone = lone_classes(by_class).cpu()
    for number in range(2, passes + 1):
        sums = PassSums(LOSS, *refinement.arguments())
        pixel_count = torch.zeros(FOLDS, dtype=torch.float64, device=data.device)
        kept = []
        for images, states, masks, targets in data.batches():
            folds = fold_of[images]
            scored = ignore_classes(
                masks, lone[folds], lambda i, targets=targets: targets[i], data.prepare
            )
            sums.add(states, masks, scored, folds.tolist())
            pixel_count.index_add_(0, folds.to(data.device), masks.pixels)
            draws = [count_and_seed(image, len(data), 2 * total, number - 1) for image in images]
            draws = [(CANDIDATES * count, seed) for count, seed in draws]
            pixels = draw_pixels(images, targets, draws, data.grid, GridPlacement.full)
            pixels = prefer_uncertain(pixels, sums.uncertainty(states, pixels).cpu())
            kept.append((axes.store(pixels.interpolate(states)).cpu(), pixels))
        refinement.accept_losses(*sums.means(space, pixel_count))
        stored, _, weights, folds = gather(kept, fold_of, data.device)
        sample = SampledPixels(axes.coordinates_of(stored), weights.float(), folds)
        refinement.step(sample, is_last=number == passes)
        strengths = [f"{strength:.2g}" for strength in refinement.window.strengths]
        certificates = ", ".join(
            f"{c.gradient:.1e} {c.decrease:.1e}" for c in refinement.certificates
        )
        losses = [
            f"{refinement.window.losses.get(s, math.nan):.4f}" for s in refinement.window.strengths
        ]
        print(
            f"  pass {number}: window {' '.join(strengths)}, cross-validated {' '.join(losses)}, "
            f"{'settled, ' if refinement.window.settled else ''}certificates {certificates}; {cpu_seconds():.0f} CPU-s",
            flush=True,
        )
        if refinement.converged:
            break
    return refinement.window.path()._asdict() | {
        "space": space,
        "points": refinement.points,
        "passes": number,
        "certificates": refinement.certificates,
        "converged": refinement.converged,
    }


def gather(kept, fold_of: torch.Tensor, device: str):
    """Return the stored states, labels, weights and folds of a sample, on a device."""
    states = torch.cat([stored.view(torch.uint8) for stored, _ in kept]).view(kept[0][0].dtype)
    labels, weights, images = (
        torch.cat([getattr(p, n) for _, p in kept]) for n in ("labels", "weights", "images")
    )
    return tuple(x.to(device) for x in (states, labels, weights, fold_of[images]))


def solve_in_memory(data) -> dict:
    """Solve a site with all states in memory."""
    loose, tight = (
        join_masks(data.prepared(nodes)).to(data.device) for nodes in (LOOSE_NODES, TIGHT_NODES)
    )
    states = data.states.to(data.device)
    fold_of = assign_folds(len(data), FOLDS)
    scored = scored_masks(tight, fold_of, lambda i: data.targets[i], data.prepare)
    problem = SiteProblem(
        LOSS,
        states,
        loose,
        tight,
        fold_of,
        scored,
    )
    path, refinement = start_refinement(problem)
    refinement.solve_in_memory()
    return path._asdict() | {
        "space": problem.space,
        "points": refinement.accepted.points,
        "passes": 1,
        "certificates": refinement.certificates,
        "converged": refinement.converged,
    }


def mean_iou(data, found: dict, row: int) -> float:
    """Return the mIoU in % of a probe on the validation images."""
    space = found["space"]
    point = found["points"][row]
    weights = space.to_states(point[:, :-1]).float()
    bias = point[:, -1].float()
    both = torch.zeros(data.classes)
    either = torch.zeros(data.classes)
    for states, target in zip(data.validation, data.validation_targets, strict=True):
        centred = states.to(data.device) - space.mean.float()
        logits = (centred @ weights.T + bias).T.unflatten(1, data.grid)
        predicted = upsampled_argmax(logits, tuple(target.shape)).cpu()
        for k in range(data.classes):
            mine = (predicted == k) & (target != 255)
            true = target == k
            both[k] += (mine & true).sum()
            either[k] += (mine | true).sum()
    return 100 * (both / either)[either > 0].mean().item()


def cpu_seconds() -> float:
    """Return the CPU time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@torch.no_grad()
def main() -> None:
    """Print a line for each pass, and the result of each share."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("states", nargs="?")
    parser.add_argument("--site", choices=["states", "random_adapter"], default="states")
    parser.add_argument(
        "--share",
        type=float,
        nargs="+",
        default=[1, 0.08, 0.02, 0.005],
    )
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument(
        "--side",
        type=int,
        default=16,
        help="tokens of a side",
    )
    parser.add_argument(
        "--synthetic",
        type=int,
        nargs=3,
        metavar=("IMAGES", "WIDTH", "CLASSES"),
    )
    parser.add_argument(
        "--decay", type=float, default=1.0, help="of the variance of synthetic axes"
    )
    parser.add_argument(
        "--image-share",
        type=float,
        default=0.1,
        help="of the variance of synthetic states within classes",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.synthetic:
        images, width, classes = args.synthetic
        shape = (images, args.side, width, classes)
        data = Synthetic(*shape, args.decay, args.image_share, args.device)
    else:
        data = Images(args.states, args.site, args.side, args.device)
    for share in args.share:
        if not args.synthetic:
            data.prepared(TIGHT_NODES)  # not counted: once per data set
            data.prepared(LOOSE_NODES)
        started = cpu_seconds()
        clock = time.monotonic()
        found = solve_in_memory(data) if share >= 1 else solve_by_passes(data, share, args.passes)
        spent = cpu_seconds() - started
        waited = time.monotonic() - clock
        rows = found["solved"]
        chosen = rows.index(found["chosen"])
        scores = [] if args.synthetic else [mean_iou(data, found, row) for row in range(len(rows))]
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"
        if args.device == "cuda":
            memory += f", of the GPU {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        print(
            f"share {share:g}: {found['passes']} passes, strength {found['strengths'][found['chosen']]:.2g}, mIoU "
            f"{' '.join(f'{score:.2f}' for score in scores)} (chosen: number {chosen + 1}), "
            f"{'converged' if found['converged'] else 'NOT converged'}: "
            f"{[(f'{c.gradient:.1e}', f'{c.decrease:.1e}') for c in found['certificates']]}; "
            f"{spent:.1f} CPU-s, {waited:.0f} s, peak {memory}",
            flush=True,
        )


if __name__ == "__main__":
    main()
