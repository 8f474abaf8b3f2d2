"""False findings of recovery in LLMs that have learned nothing, by kind of random weights and by rule.

    python tests/bench/beyond_random.py MODEL WORLD --subjects 20

MODEL is a planted model of `probes calibrate` (seedN/models/bidirectional/planted/hf), WORLD its seedN/assets. Each
subject has layers of a family of `random_llms.py`, and its own draws of both controls. Judged as in a report, but with
linear discriminants, in closed form, in place of solved probes: 0.5 instead of 10 CPU-seconds for a model.

A line for each family: mean recovery in points, relative update of a layer, entropy of attention among image tokens in
nats, and of the subjects that were called learned

    update     beyond three random LLMs of the same updates, the rule until now
    permuted   beyond three permuted LLMs
    both       beyond both, the rule of reports, from three draws each
    study      the same from the draws of a study, three and two
    mean       beyond the mean of all six

Shapes: N images, T tokens, d width, K classes.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import probes
from llava_bidir.common.bootstrap import bootstrap_weights
from probes.data.registry import open_dataset
from probes.evaluation.estimate import Estimate
from probes.evaluation.layer_effects import run_effects
from probes.models.matched_updates import MATCH_IMAGES, layer_updates
from probes.models.random_init import permute_weights, random_layers
from probes.models.sites import last_layer
from probes.ops.pixel_counts import count
from probes.report.verdicts import HOLDS, compare_to_draws, judge_draws, least_favourable
from probes.tasks import SEGMENTATION, TASKS
from probes.worlds.dialogues import patch_shares
from probes.worlds.random_llms import FAMILIES, OF_LANGUAGE

RIDGE = 1e-3  # of the covariance within classes, in units of its mean variance
RULES = ("update", "permuted", "both", "study", "mean")


class Readout:
    """Recovery of a model by linear discriminants of the classes of patches.

    Args:
        mllm: The model.
        folder: Images and masks.
    """

    def __init__(self, mllm: nn.Module, folder: Path):
        self.mllm = mllm
        self.sites = ["adapter", *mllm.layer_sites[1:]]
        splits = [
            open_dataset("folder", str(folder), name, None, SEGMENTATION)
            for name in ("training", "validation")
        ]
        training, validation = ([split[i] for i in range(len(split))] for split in splits)
        self.match_images = [row["image"] for row in training[:MATCH_IMAGES]]
        self.pixels = mllm.preprocess([row["image"] for row in (*training, *validation)])
        self.targets = torch.stack([torch.as_tensor(row["target"]) for row in validation])
        shares = [torch.as_tensor(patch_shares(row["target"])) for row in training]
        self.labels = torch.cat(shares).float()  # [N * T, K]
        self.training = len(training)
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

    def recovery(self) -> Estimate:
        """Return the recovery of the model as it is now."""
        parts = [self.mllm.states(part, self.sites) for part in self.pixels.split(32)]
        logits = [
            self.logits(torch.cat([part[site].float() for part in parts])) for site in self.sites
        ]
        view = self.mllm.geometry.view(tuple(self.targets.shape[-2:]))
        counts = count(torch.stack(logits), self.targets, view, by_token=False)
        task = TASKS[SEGMENTATION]
        sums = task.sums(counts._asdict())
        last = last_layer(self.mllm.sites)
        return run_effects(self.sites, last, task, sums, self.weights, None)["recovery"]


@contextmanager
def edited(mllm: nn.Module, edit: Callable[[nn.ModuleList], None], seed: int) -> Iterator[None]:
    """Edit the layers of a model while the context is open."""
    kept = {name: x.clone() for name, x in mllm.layers.state_dict().items()}
    torch.manual_seed(seed)
    edit(mllm.layers)
    mllm.clear_prefix_cache()
    try:
        yield
    finally:
        mllm.layers.load_state_dict(kept)
        mllm.clear_prefix_cache()


def entropy(mllm: nn.Module, pixels: Tensor) -> float:
    """Return the mean entropy of attention among image tokens, in nats."""
    weights = torch.stack(mllm.attention(pixels, average_heads=False))
    weights = weights / weights.sum(-1, keepdim=True)
    return -weights.xlogy(weights).sum(-1).mean().item()


def judge_subject(readout: Readout, number: int) -> tuple[Estimate, dict[str, bool]]:
    """Return the recovery of the model as it is now, and whether each rule calls it learned."""
    mllm = readout.mllm
    own = readout.recovery()
    random = []
    permuted = []
    for draw in range(3):
        seed = 100 * number + draw + 13
        with random_layers(mllm, "update", seed, match_images=readout.match_images):
            random.append(readout.recovery())
        with edited(mllm, permute_weights, seed):
            permuted.append(readout.recovery())
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
    columns["both"] = least_favourable(1, {name: columns[name] for name in RULES[:2]})
    columns["study"] = least_favourable(1, pooled)
    return own, {rule: columns[rule]["verdict"] == HOLDS for rule in RULES}


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a planted model of the toy world")
    parser.add_argument("world", type=Path, help="the folder of its world")
    parser.add_argument("--subjects", type=int, default=20, help="models of each family")
    parser.add_argument(
        "--families", nargs="+", default=[x for x in FAMILIES if x not in OF_LANGUAGE]
    )
    args = parser.parse_args()
    mllm = probes.load(args.model, device="cpu")
    readout = Readout(mllm, args.world / "segmentation")
    print("family  subjects  recovery  update  entropy  " + "  ".join(RULES))
    for name in args.families:
        values = []
        yes = dict.fromkeys(RULES, 0)
        for number in range(args.subjects):
            with edited(mllm, FAMILIES[name], 1000 * number + 7):
                if number == 0:
                    updates = torch.tensor(layer_updates(mllm, readout.pixels[:16])).mean()
                    spread = entropy(mllm, readout.pixels[:4])
                own, said = judge_subject(readout, number)
            values.append(own.value)
            yes = {rule: yes[rule] + said[rule] for rule in RULES}
        mean = 100 * sum(values) / len(values)
        counts = "  ".join(map(str, yes.values()))
        print(
            f"{name}  {len(values)}  {mean:+.1f}  {updates:.2f}  {spread:.2f}  {counts}", flush=True
        )


if __name__ == "__main__":
    main()
