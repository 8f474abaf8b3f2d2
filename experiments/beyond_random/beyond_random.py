"""False findings in layers that have learned nothing, by kind of random weights and by rule.

    python -m experiments.beyond_random.beyond_random MODEL DATA --subjects 20

MODEL is an MLLM, such as a planted model of `make calibrate` (seedN/models/bidirectional/planted/hf), and DATA a folder
of images and masks, such as its seedN/assets/segmentation; photos become squares of the model's side. Each subject has
layers of a family of `toy/random_llms.py`, and its own draws of both controls. Judged as in a report, but with linear
discriminants, in closed form, in place of solved probes: 0.5 instead of 10 CPU-seconds for a model.

A line for each family: mean recovery in points with its range, relative update of a layer, entropy of attention among
image tokens in nats, and of the subjects that were called learned

    update     beyond three random LLMs of the same updates, the rule until now
    permuted   beyond three permuted LLMs
    both       beyond both, the rule of reports, from three draws each
    study      the same from the draws of a study, three and two
    supported  the same, and its own effect is above 0: "supported" in a report needs both
    mean       beyond the mean of all six

With `--starvation`, a line is also of starvation at patch 0 and in the first row: accuracy under bidirectional minus
that under causal attention, of the same layers, at the subject's best layer under the causal mask.

MODEL can also be a bare vision encoder. Its layers are the subjects, a line is of a claim as well (a best layer beyond
the last one, or beyond the patch embeddings), and only matrices are drawn: biases, norms and layer scales stay trained.

Shapes: N images, T tokens, d width, K classes.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import probes
from experiments.toy.random_llms import FAMILIES, OF_LANGUAGE
from llava_bidir.common.bootstrap import bootstrap_weights
from probes.data.registry import open_dataset
from probes.models.random_weights import (
    MATCH_IMAGES,
    layer_updates,
    permute_weights,
    replace_weights,
)
from probes.models.sites import is_layer, last_layer
from probes.ops.geometry import IGNORE_INDEX
from probes.ops.pixel_counts import count
from probes.report.verdicts import HOLDS, compare_to_draws, judge_draws, worst_of
from probes.score.effects import EffectSource
from probes.score.estimate import Estimate, dataset_scores
from probes.tasks import SEGMENTATION, TASKS

RIDGE = 1e-3  # of the covariance within classes, in units of its mean variance
RULES = ("update", "permuted", "both", "study", "supported", "mean")
BATCH = 32
# Those that draw matrices of any layer, at scales that suit an encoder's width
OF_ENCODERS = ("shuffled", "normal_0.02", "normal_0.04", "normal_0.08", "orthogonal")
CLAIMS = {True: ("recovery",), False: ("over_last", "layer_gain")}  # with an LLM, and without
STARVATION = {"starvation": "patch_0", "starvation_first_row": "first_row"}  # effects at a site

Split = tuple[list[Image.Image], Tensor]  # images, and targets uint8[N, H, W]


class Effects(NamedTuple):
    """The effects of a model by name, and its best layer."""

    effects: dict[str, Estimate]
    best: str


def read_split(folder: Path, split: str, side: int, limit: int | None) -> tuple[Split, int]:
    """Return images and masks as squares, at most `limit` at equal distances, and the number of classes."""
    data = open_dataset("folder", root=str(folder), split=split, options=None, task=SEGMENTATION)
    chosen = np.linspace(0, len(data) - 1, min(len(data), limit or len(data))).round()
    rows = [data[int(i)] for i in chosen]
    images = [row["image"].resize((side, side)) for row in rows]
    masks = [Image.fromarray(row["target"]) for row in rows]
    squares = [np.array(mask.resize((side, side), Image.Resampling.NEAREST)) for mask in masks]
    return (images, torch.from_numpy(np.stack(squares))), len(data.classes)


def patch_shares(targets: Tensor, classes: int, grid: tuple[int, int]) -> Tensor:
    """Return the share of each class in each patch, f[N * T, K], of targets uint8[N, H, W]."""
    labels = targets.long()
    labels = labels.where(labels != IGNORE_INDEX, classes)
    pixels = F.one_hot(labels, classes + 1)[..., :classes].permute(0, 3, 1, 2).double()
    return F.adaptive_avg_pool2d(pixels, grid).flatten(2).mT.flatten(0, 1).float()


def remember_images(mllm: nn.Module) -> None:
    """Let an MLLM run encoder and adapter once for the same pixels: no subject and no control changes them."""
    compute = mllm.model.model.get_image_features
    known = {}

    def image_features(pixel_values: Tensor, **options):
        key = pixel_values.numpy().tobytes()
        if key not in known:
            known[key] = compute(pixel_values=pixel_values, **options)
        return known[key]

    mllm.model.model.get_image_features = image_features


class Readout:
    """Effects of a model by linear discriminants of the classes of patches.

    Args:
        mllm: The model.
        training, validation: Images and targets.
        classes: K.
        starvation: Measure starvation, too: the claims of a model are then of both masks.
    """

    def __init__(
        self,
        mllm: nn.Module,
        training: Split,
        validation: Split,
        classes: int,
        *,
        starvation: bool = False,
    ):
        self.mllm = mllm
        self.causal = mllm.with_attention("causal") if starvation else None
        self.claims = CLAIMS[mllm.has_llm] + (tuple(STARVATION) if starvation else ())
        self.sites = ["adapter", *mllm.layer_sites[1:]] if mllm.has_llm else mllm.layer_sites
        self.match_images = training[0][:MATCH_IMAGES]
        self.pixels = mllm.preprocess([*training[0], *validation[0]])
        self.targets = validation[1]
        self.labels = patch_shares(training[1], classes, mllm.grid)
        self.training = len(training[0])
        self.weights = bootstrap_weights(len(self.targets))

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits f[N, K, h, w] of the validation images from states f[N, T, d] of all images."""
        x = states[: self.training].flatten(0, 1)
        mean = x.mean(0)
        scale = x.std(0).clamp_min(1e-8)
        z = (x - mean) / scale
        mass = self.labels.sum(0)
        centres = (self.labels.T @ z) / mass.clamp_min(1e-6)[:, None]
        within = (z.T * self.labels.sum(1)) @ z - (centres.T * mass) @ centres
        within /= mass.sum()
        within += RIDGE * within.diagonal().mean() * torch.eye(len(within))
        weight = torch.linalg.solve(within.double(), centres.T.double()).float()
        bias = (mass / mass.sum()).clamp_min(1e-9).log() - 0.5 * (weight.T * centres).sum(1)
        logits = (states[self.training :] - mean) / scale @ weight + bias
        return logits.transpose(1, 2).unflatten(-1, tuple(self.mllm.grid))

    def numbers(self, site: str | None = None) -> tuple[dict[str, Estimate], str | None]:
        """Return the number of each claim about the model as it is now, and where the masks were compared.

        Args:
            site: Where the masks are compared; None for the best layer under the causal mask.
        """
        own, _ = self.effects(self.mllm)
        numbers = {claim: own[claim] for claim in CLAIMS[self.mllm.has_llm]}
        if self.causal is not None:
            of_causal, best = self.effects(self.causal)
            site = site or best
            for claim, effect in STARVATION.items():
                at_site = f"{effect}@{site}"
                numbers[claim] = own[at_site] - of_causal[at_site]
        return numbers, site

    def effects(self, mllm: nn.Module) -> Effects:
        """Return the effects of a model, which has the layers of this one."""
        parts = [mllm.states(part, self.sites) for part in self.pixels.split(BATCH)]
        logits = [
            self.logits(torch.cat([part[site].float() for part in parts])) for site in self.sites
        ]
        view = mllm.geometry.view(tuple(self.targets.shape[-2:]))
        counts = count(torch.stack(logits), self.targets, view)
        task = TASKS[SEGMENTATION]
        sums = task.sums(counts._asdict())
        last = None if mllm.has_llm else last_layer(mllm.sites)
        source = EffectSource(self.sites, last_layer=last, task=task, weights=self.weights)
        effects = source.effects(sums)
        if self.causal is not None:
            effects |= source.patch_accuracies(counts, columns=mllm.grid[1])
        scores = dataset_scores(task, sums)[task.score].tolist()
        of_layers = {
            site: score for site, score in zip(self.sites, scores, strict=True) if is_layer(site)
        }
        return Effects(effects, max(of_layers, key=of_layers.get))


@contextmanager
def edited(mllm: nn.Module, edit: Callable[[nn.ModuleList], None], seed: int) -> Iterator[None]:
    """Edit the layers of a model while the context is open."""
    kept = {name: x.clone() for name, x in mllm.layers.state_dict().items()}
    torch.manual_seed(seed)
    edit(mllm.layers)
    try:
        yield
    finally:
        mllm.layers.load_state_dict(kept)


@contextmanager
def matched(mllm: nn.Module, draw: int, images: list[Image.Image]) -> Iterator[None]:
    """Give a model random layers with the updates of the present ones while the context is open."""
    part = mllm.family.layers_part
    with edited(mllm, lambda layers: None, 0):
        with replace_weights(
            mllm, parts=[part], match="update", draw=draw, seed=0, images=images, scales=None
        ):
            yield
    mllm.update_scales = None


def entropy(mllm: nn.Module, pixels: Tensor) -> float:
    """Return the mean entropy of attention among image tokens, in nats."""
    weights = torch.stack([*mllm.attention(pixels, average_heads=False).values()])
    weights = weights / weights.sum(-1, keepdim=True)
    return -weights.xlogy(weights).sum(-1).mean().item()


def draw_matrices(draw: Callable[[nn.ModuleList], None], layers: nn.ModuleList) -> None:
    """Draw layers, and put biases, norms and layer scales back."""
    vectors = {name: x.clone() for name, x in layers.named_parameters() if x.ndim < 2}
    draw(layers)
    layers.load_state_dict(vectors, strict=False)


def judge_subject(readout: Readout, number: int) -> dict[str, tuple[Estimate, dict[str, bool]]]:
    """Return the effect of the model as it is now, and whether each rule calls it learned, by claim."""
    mllm = readout.mllm
    own, site = readout.numbers()
    random = []
    permuted = []
    for draw in range(3):
        seed = 100 * number + draw + 13
        with matched(mllm, seed, readout.match_images):
            random.append(readout.numbers(site)[0])
        with edited(mllm, permute_weights, seed):
            permuted.append(readout.numbers(site)[0])

    def judged(claim: str) -> tuple[Estimate, dict[str, bool]]:
        draws = [[numbers[claim] for numbers in kind] for kind in (random, permuted)]
        return own[claim], judge(own[claim], *draws)

    return {claim: judged(claim) for claim in readout.claims}


def judge(own: Estimate, random: list[Estimate], permuted: list[Estimate]) -> dict[str, bool]:
    """Return whether each rule calls an effect learned, from those of the draws."""
    beyond = {
        "update": compare_to_draws(own, random),
        "permuted": compare_to_draws(own, permuted),
        "two": compare_to_draws(own, permuted[:2]),
        "mean": compare_to_draws(own, random + permuted),
    }
    columns = {name: judge_draws(1, compared) for name, compared in beyond.items()}
    pooled = {
        "random": judge_draws(1, beyond["update"], [beyond["two"]]),
        "permuted": judge_draws(1, beyond["two"], [beyond["update"]]),
    }
    columns["both"] = worst_of(1, [columns[name] for name in RULES[:2]])
    columns["study"] = worst_of(1, [*pooled.values()])
    holds = {rule: column["verdict"] == HOLDS for rule, column in columns.items()}
    above_zero = own.ci95[0] > 0
    return holds | {"supported": holds["study"] and above_zero}


def count_family(
    readout: Readout, edit: Callable[[nn.ModuleList], None], subjects: int
) -> tuple[list[dict[str, tuple[Estimate, dict[str, bool]]]], list[float]]:
    """Return the judged subjects of a family, and the update and entropy of the first one."""
    mllm = readout.mllm
    judged = []
    about = []
    for number in range(subjects):
        with edited(mllm, edit, 1000 * number + 7):
            if number == 0:
                about.append(sum(layer_updates(mllm, readout.pixels[:16])) / len(mllm.layers))
                about.append(entropy(mllm, readout.pixels[:4]))
            judged.append(judge_subject(readout, number))
    return judged, about


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="an MLLM or a bare vision encoder")
    parser.add_argument("data", type=Path, help="a folder of images and masks")
    parser.add_argument("--subjects", type=int, default=20, help="models of each family")
    parser.add_argument("--families", nargs="+", choices=FAMILIES)
    parser.add_argument("--training", type=int, help="training images; default: all")
    parser.add_argument("--validation", type=int, help="validation images; default: all")
    parser.add_argument("--side", type=int, help="of a bare encoder's images, in pixels")
    parser.add_argument("--starvation", action="store_true", help="judge starvation, too")
    args = parser.parse_args()
    mllm = probes.load(args.model, device="cpu", image_px=args.side)
    side = mllm.geometry.image_px
    training, classes = read_split(args.data, split="training", side=side, limit=args.training)
    validation, _ = read_split(args.data, split="validation", side=side, limit=args.validation)
    if mllm.has_llm:
        remember_images(mllm)
    readout = Readout(mllm, training, validation, classes, starvation=args.starvation)
    usual = [x for x in FAMILIES if x not in OF_LANGUAGE] if mllm.has_llm else OF_ENCODERS
    print("family  claim  subjects  effect (range)  update  entropy  " + "  ".join(RULES))
    for name in args.families or usual:
        edit = FAMILIES[name] if mllm.has_llm else partial(draw_matrices, FAMILIES[name])
        judged, (update, spread) = count_family(readout, edit, args.subjects)
        for claim in readout.claims:
            values = [100 * subject[claim][0].value for subject in judged]
            mean = sum(values) / len(values)
            yes = "  ".join(str(sum(x[claim][1][rule] for x in judged)) for rule in RULES)
            effect = f"{mean:+.1f} ({min(values):+.1f} to {max(values):+.1f})"
            print(
                f"{name}  {claim}  {len(values)}  {effect}  {update:.2f}  {spread:.2f}  {yes}",
                flush=True,
            )


if __name__ == "__main__":
    main()
