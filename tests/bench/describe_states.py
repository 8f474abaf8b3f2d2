"""What makes the states of a site easy or hard to solve; `passes.py --synthetic` draws states that are like them.

    python tests/bench/describe_states.py STATES.pt ... [--site random_adapter]

For groups of principal axes of the correlations within classes, from the largest variance on:

- the variance in the units of the solver's penalty, whose mean over all axes is 1;
- the distance of class means: its square in units of that variance, the mean over tokens. Means of two halves of the
  images are multiplied, so that few images do not add to it;
- the parts of the variance that are common to an image, and to all tokens of a class in an image.

STATES.pt is what `extract_states.py` writes. A token's class is the one that most of its pixels have.
"""

import argparse

import torch
from passes import Images

from probes.ops.quadrature import prepare_masks
from probes.training.solve.moments import SiteSpace

EDGES = (0, 1, 3, 10, 30, 100, 200)
BLOCK = 8  # neighbouring images that share a half, since they may be frames of a video


def soft_labels(data: Images) -> torch.Tensor:
    """Return the weight of each class at each token, f32[N, K, h, w]."""
    masks = [prepare_masks(target[None], data.classes, data.grid, 2) for target in data.targets]
    return torch.cat([mask.soft for mask in masks])


def group_means(states: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means f64[G, d] and sizes f64[G] of groups i64[n] of states f64[n, d]."""
    sizes = torch.bincount(groups).double()
    sums = states.new_zeros(len(sizes), states.shape[1]).index_add_(0, groups, states)
    return sums / sizes.clamp(min=1)[:, None], sizes


def common_part(states: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return the part of each axis' variance that is common to a group, f64[d]: one-way analysis of variance."""
    means, sizes = group_means(states, groups)
    inside = (states - means[groups]).square().sum(0) / (len(states) - (sizes > 0).sum())
    return 1 - inside / states.square().mean(0)


def squared_distance(
    states: torch.Tensor, labels: torch.Tensor, images: torch.Tensor
) -> torch.Tensor:
    """Return the mean squared distance of class means from the mean of all along each axis, f64[d]."""
    _, sizes = group_means(states, labels)
    halves = []
    for half in (0, 1):
        own = (images // BLOCK) % 2 == half
        means, seen = group_means(states[own], labels[own])
        missing = len(sizes) - len(means)
        means = torch.cat([means, means.new_zeros(missing, means.shape[1])])
        sizes = sizes * torch.cat([seen > 0, seen.new_zeros(missing) > 0])
        halves.append(means)
    share = (sizes / sizes.sum())[:, None]
    first, second = (means - (share * means).sum(0) for means in halves)
    return (share * first * second).sum(0)


def describe(data: Images) -> dict[str, torch.Tensor]:
    """Return each quantity by axis, f64[d]."""
    soft = soft_labels(data)
    space = SiteSpace.of(data.states, soft)
    by_token = soft.flatten(2).mT.flatten(0, 1)
    labelled = by_token.sum(1) > 0
    labels = by_token.argmax(1)[labelled]
    images, tokens, _ = data.states.shape
    image = torch.arange(images).repeat_interleave(tokens)[labelled]
    states = space.coordinates(data.states.flatten(0, 1)[labelled])[:, :-1].double()
    means, _ = group_means(states, labels)
    within = states - means[labels]
    by_axis = {
        "variance": space.spectrum,
        "distance^2": squared_distance(states, labels, image) / within.square().mean(0),
        "of image": common_part(within, image),
        "of class in image": common_part(within, image * data.classes + labels),
    }
    return {name: values.flip(0) for name, values in by_axis.items()}


@torch.no_grad()
def main() -> None:
    """Print a table for each file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("states", nargs="+")
    parser.add_argument("--site", choices=["states", "random_adapter"], default="states")
    parser.add_argument("--side", type=int, default=16, help="tokens of a side")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for path in args.states:
        by_axis = describe(Images(path, args.site, args.side))
        width = len(by_axis["variance"])
        edges = [edge for edge in EDGES if edge < width] + [width]
        groups = list(zip(edges, edges[1:], strict=False))
        heads = "".join(f"{f'{first + 1}-{last}':>10}" for first, last in groups)
        print(f"{path}, {args.site}\n{'axes':20}{heads}{'all':>10}")
        for name, values in by_axis.items():
            means = [values[first:last].mean().item() for first, last in groups]
            means.append((values.sum() if name == "distance^2" else values.mean()).item())
            print(f"{name:20}" + "".join(f"{mean:10.3g}" for mean in means))


if __name__ == "__main__":
    main()
