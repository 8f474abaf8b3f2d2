"""Count at which layers the logit lens reads the word of a patch's class.

    python -m experiments.real.class_words RUN [RUN ...] [--top 10]

RUN is a finished run of `probes solve` on an MLLM. A patch has the class of most of its labelled pixels. Its states at
a site become words by the LLM's final norm and output head. Printed per site, as a share of the patches of the
validation split, classes weighted equally:

    own     the word of the patch's class is among the most probable ones
    other   the word of another class is, as a mean over the other classes: what a model reaches that says the same
            words everywhere

A class's word is the first token of its name, with or without a space before it, in lower case or capitalised.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import probes
from probes.models.sites import is_before_adapter


def class_tokens(mllm, classes: list[str]) -> list[Tensor]:
    """Return the ids of the first token of each class's spellings."""
    tokenizer = mllm.chat.tokenizer
    ids = []
    for name in classes:
        capitalised = name.capitalize()
        first = set()
        for spelling in (name, capitalised, f" {name}", f" {capitalised}"):
            tokens = tokenizer(spelling, add_special_tokens=False).input_ids
            first.add(tokens[0])
        ids.append(torch.tensor(sorted(first)))
    return ids


@torch.no_grad()
def count_words(run: probes.ProbeRun, top: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return by site how many patches of class i have the word of class j, f64[K, K], and the patches f64[K]."""
    classes = run.metrics["classes"]
    count = len(classes)
    mllm = run.mllm()
    words = class_tokens(mllm, classes)
    sites = [site for site in run.sites if not is_before_adapter(site)]
    counts = {site: torch.zeros(count, count, dtype=torch.float64) for site in sites}
    patches = torch.zeros(count, dtype=torch.float64)
    dataset = run.dataset()
    for image in tqdm(range(len(dataset)), mininterval=5):
        sample = dataset[image]
        labels = mllm.geometry.patches(sample["target"]).flatten()
        labelled = labels >= 0
        labels = labels[labelled]
        patches += labels.bincount(minlength=count)
        pixels = mllm.preprocess([sample["image"]])
        states = mllm.states(pixels, sites)
        for site in sites:
            logits = mllm.word_head(site)(states[site][0, labelled])
            likely = logits.topk(top).indices
            for j, ids in enumerate(words):
                says = torch.isin(likely, ids).any(-1)
                counts[site][:, j] += labels[says].bincount(minlength=count)
    return counts, patches


def main() -> None:
    """Print a table of sites for each run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--top", type=int, default=10)
    args = parser.parse_args()
    for path in args.runs:
        by_site, patches = count_words(probes.ProbeRun(path), args.top)
        seen = patches > 0
        print(f"{path}: word of the class among the first {args.top}, % of the patches")
        print(f"{'site':12}{'own':>8}{'other':>8}")
        for site, counts in by_site.items():
            shares = counts[seen][:, seen] / patches[seen, None]
            same = shares.diagonal()
            others = (shares.sum(1) - same) / (int(seen.sum()) - 1)
            print(f"{site:12}{100 * same.mean().item():8.1f}{100 * others.mean().item():8.1f}")


if __name__ == "__main__":
    main()
