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
from probes.models.random_weights import MATCH_IMAGES, Control, layer_updates, permute_weights
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

COUNTS = (100,)  # of an interval that nothing here reads
Split = tuple[list[Image.Image], Tensor]  # images, and targets uint8[N, H, W]


class Effects(NamedTuple):
    """The effects of a model by name, and its best layer."""

    effects: dict[str, Estimate]
    best: str


def read_split(folder: Path, split: str, side: int, limit: int | None) -> tuple[Split, int]:
    """Return images and masks as squares, at most `limit` at equal distances, and the number of classes."""
    data = open_dataset("folder", root=str(folder), split=split, options=None, task=SEGMENTATION)
    count = min(len(data), limit or len(data))
    chosen = np.linspace(0, len(data) - 1, count).round()
    images = []
    targets = []
    for index in chosen:
        sample = data[int(index)]
        images.append(sample["image"].resize((side, side)))
        mask = Image.fromarray(sample["target"])
        square = mask.resize((side, side), Image.Resampling.NEAREST)
        targets.append(np.array(square))
    return (images, torch.from_numpy(np.stack(targets))), len(data.classes)


def patch_shares(targets: Tensor, classes: int, grid: tuple[int, int]) -> Tensor:
    """Return the share of each class in each patch, f[N * T, K], of targets uint8[N, H, W]."""
    labels = targets.long()
    labels = labels.where(labels != IGNORE_INDEX, classes)
    one_hot = F.one_hot(labels, classes + 1)[..., :classes]
    maps = one_hot.permute(0, 3, 1, 2).double()
    shares = F.adaptive_avg_pool2d(maps, grid).flatten(2).mT
    return shares.flatten(0, 1).float()


def remember_images(mllm: nn.Module) -> None:
    """Let an MLLM run encoder and adapter once for the same pixels: no subject and no control changes them."""
    compute = mllm.model.model.get_image_features
    features_of_pixels = {}

    def image_features(pixel_values: Tensor, **options):
        key = pixel_values.numpy().tobytes()
        if key not in features_of_pixels:
            features_of_pixels[key] = compute(pixel_values=pixel_values, **options)
        return features_of_pixels[key]

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
        self.causal = None
        self.claims = CLAIMS[mllm.has_llm]
        if starvation:
            self.causal = mllm.with_attention("causal")
            self.claims += tuple(STARVATION)
        self.sites = mllm.layer_sites
        if mllm.has_llm:
            self.sites = ["adapter", *mllm.layer_sites[1:]]
        self.match_images = training[0][:MATCH_IMAGES]
        self.pixels = mllm.preprocess([*training[0], *validation[0]])
        self.targets = validation[1]
        self.labels = patch_shares(training[1], classes, mllm.grid)
        self.training = len(training[0])
        self.weights = bootstrap_weights(len(self.targets))

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits f[N, K, h, w] of the validation images from states f[N, T, d] of all images."""
        training = states[: self.training].flatten(0, 1)
        mean = training.mean(0)
        scale = training.std(0).clamp_min(1e-8)
        z = (training - mean) / scale
        mass = self.labels.sum(0)
        centres = (self.labels.T @ z) / mass.clamp_min(1e-6)[:, None]
        second_moments = (z.T * self.labels.sum(1)) @ z
        between = (centres.T * mass) @ centres
        within = second_moments - between
        within /= mass.sum()
        within += RIDGE * within.diagonal().mean() * torch.eye(len(within))
        weight = torch.linalg.solve(within.double(), centres.T.double()).float()
        log_priors = (mass / mass.sum()).clamp_min(1e-9).log()
        bias = log_priors - 0.5 * (weight.T * centres).sum(1)
        validation = (states[self.training :] - mean) / scale
        logits = validation @ weight + bias
        return logits.transpose(1, 2).unflatten(-1, tuple(self.mllm.grid))

    def numbers(self, site: str | None = None) -> tuple[dict[str, Estimate], str | None]:
        """Return the number of each claim about the model as it is now, and where the masks were compared.

        Args:
            site: Where the masks are compared; None for the best layer under the causal mask.
        """
        effects, _ = self.effects(self.mllm)
        numbers = {claim: effects[claim] for claim in CLAIMS[self.mllm.has_llm]}
        if self.causal is not None:
            causal_effects, best = self.effects(self.causal)
            site = site or best
            for claim, effect in STARVATION.items():
                at_site = f"{effect}@{site}"
                numbers[claim] = effects[at_site] - causal_effects[at_site]
        return numbers, site

    def effects(self, mllm: nn.Module) -> Effects:
        """Return the effects of a model, which has the layers of this one."""
        batches = [mllm.states(pixels, self.sites) for pixels in self.pixels.split(BATCH)]
        logits = []
        for site in self.sites:
            states = torch.cat([batch[site].float() for batch in batches])
            logits.append(self.logits(states))
        view = mllm.geometry.view(tuple(self.targets.shape[-2:]))
        counts = count(torch.stack(logits), self.targets, view)
        task = TASKS[SEGMENTATION]
        sums = task.sums(counts._asdict())
        last = None
        if not mllm.has_llm:
            last = last_layer(mllm.sites)
        source = EffectSource(self.sites, last_layer=last, task=task, weights=self.weights)
        effects = source.effects(sums)
        if self.causal is not None:
            effects |= source.patch_accuracies(counts, columns=mllm.grid[1])
        values = dataset_scores(task, sums)[task.score].tolist()
        scores = dict(zip(self.sites, values, strict=True))
        layers = filter(is_layer, self.sites)
        return Effects(effects, max(layers, key=scores.get))


@contextmanager
def edited(mllm: nn.Module, edit: Callable[[nn.ModuleList], None], seed: int) -> Iterator[None]:
    """Edit the layers of a model while the context is open."""
    before = {name: weight.clone() for name, weight in mllm.layers.state_dict().items()}
    torch.manual_seed(seed)
    edit(mllm.layers)
    try:
        yield
    finally:
        mllm.layers.load_state_dict(before)


@contextmanager
def matched(mllm: nn.Module, draw: int, images: list[Image.Image]) -> Iterator[None]:
    """Give a model random layers with the updates of the present ones while the context is open."""
    part = mllm.family.layers_part
    with edited(mllm, lambda layers: None, 0):
        control = Control(untrained=[part], match="update", draw=draw, match_images=images)
        with control.replace_weights(mllm):
            yield
    mllm.update_scales = None


def entropy(mllm: nn.Module, pixels: Tensor) -> float:
    """Return the mean entropy of attention among image tokens, in nats."""
    by_layer = mllm.attention(pixels, average_heads=False)
    weights = torch.stack([*by_layer.values()])
    shares = weights / weights.sum(-1, keepdim=True)
    nats = -shares.xlogy(shares).sum(-1)
    return nats.mean().item()


def draw_matrices(draw: Callable[[nn.ModuleList], None], layers: nn.ModuleList) -> None:
    """Draw layers, and put biases, norms and layer scales back."""
    vectors = {}
    for name, weight in layers.named_parameters():
        if weight.ndim < 2:
            vectors[name] = weight.clone()
    draw(layers)
    layers.load_state_dict(vectors, strict=False)


class Judged(NamedTuple):
    """The effect of a model, and whether each rule calls it learned."""

    effect: Estimate
    learned: dict[str, bool]


def judge_subject(readout: Readout, number: int) -> dict[str, Judged]:
    """Return the effect of the model as it is now, and whether each rule calls it learned, by claim."""
    mllm = readout.mllm
    effects, site = readout.numbers()
    random = []
    permuted = []
    for draw in range(3):
        seed = 100 * number + draw + 13
        with matched(mllm, seed, readout.match_images):
            random.append(readout.numbers(site)[0])
        with edited(mllm, permute_weights, seed):
            permuted.append(readout.numbers(site)[0])
    judged = {}
    for claim in readout.claims:
        learned = judge(
            effects[claim],
            random=[numbers[claim] for numbers in random],
            permuted=[numbers[claim] for numbers in permuted],
        )
        judged[claim] = Judged(effects[claim], learned)
    return judged


def judge(effect: Estimate, random: list[Estimate], permuted: list[Estimate]) -> dict[str, bool]:
    """Return whether each rule calls an effect learned, from those of the draws."""
    beyond = {
        "update": compare_to_draws(effect, random),
        "permuted": compare_to_draws(effect, permuted),
        "two": compare_to_draws(effect, permuted[:2]),
        "mean": compare_to_draws(effect, random + permuted),
    }
    columns = {name: judge_draws(1, compared, counts=COUNTS) for name, compared in beyond.items()}
    pooled = {
        "random": judge_draws(1, beyond["update"], [beyond["two"]], counts=COUNTS),
        "permuted": judge_draws(1, beyond["two"], [beyond["update"]], counts=COUNTS),
    }
    columns["both"] = worst_of(1, [columns["update"], columns["permuted"]])
    columns["study"] = worst_of(1, [*pooled.values()])
    holds = {rule: column["verdict"] == HOLDS for rule, column in columns.items()}
    above_zero = effect.ci95[0] > 0
    return holds | {"supported": holds["study"] and above_zero}


class Family(NamedTuple):
    """The judged subjects of a family by claim, and update and entropy of the first one."""

    subjects: list[dict[str, Judged]]
    update: float
    entropy: float


def count_family(readout: Readout, edit: Callable[[nn.ModuleList], None], subjects: int) -> Family:
    """Judge the subjects of a family."""
    mllm = readout.mllm
    judged = []
    for number in range(subjects):
        with edited(mllm, edit, 1000 * number + 7):
            if number == 0:
                updates = layer_updates(mllm, readout.pixels[:16])
                update = sum(updates) / len(mllm.layers)
                spread = entropy(mllm, readout.pixels[:4])
            judged.append(judge_subject(readout, number))
    return Family(judged, update, spread)


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
    usual = OF_ENCODERS
    if mllm.has_llm:
        usual = [name for name in FAMILIES if name not in OF_LANGUAGE]
    print("family  claim  subjects  effect (range)  update  entropy  " + "  ".join(RULES))
    for name in args.families or usual:
        edit = FAMILIES[name]
        if not mllm.has_llm:
            edit = partial(draw_matrices, edit)
        family = count_family(readout, edit, args.subjects)
        for claim in readout.claims:
            print(describe(name, family=family, claim=claim), flush=True)


def describe(name: str, family: Family, claim: str) -> str:
    """Return a row of the table."""
    judged = [subject[claim] for subject in family.subjects]
    values = [100 * one.effect.value for one in judged]
    mean = sum(values) / len(values)
    effect = f"{mean:+.1f} ({min(values):+.1f} to {max(values):+.1f})"
    cells = [name, claim, str(len(values)), effect]
    cells += [f"{family.update:.2f}", f"{family.entropy:.2f}"]
    for rule in RULES:
        learned = sum(one.learned[rule] for one in judged)
        cells.append(str(learned))
    return "  ".join(cells)


if __name__ == "__main__":
    main()
