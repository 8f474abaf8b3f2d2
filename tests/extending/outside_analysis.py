"""An analysis outside the repository: it adds a claim to the report of finished runs.

    python outside_analysis.py STUDY --out REPORT

The claim is that the first decoder layer already improves on the adapter, in pixel accuracy. Runs of a study are
the trained model, with solved and with trained probes, and its random controls. Each gets the file
first_layer_effects.safetensors; the report judges the claim in the same three columns as the paper's.
"""

import argparse

import torch

import probes
from probes.cli import main
from probes.runs.study import read_study

CLAIM = probes.Claim(
    sign=+1,
    text="The first layer improves on the adapter: pixel accuracy at layer 1 minus the adapter's",
)


def first_layer_gain(run: probes.ProbeRun) -> probes.Estimate:
    """Return the gain in pixel accuracy, and its values under the resamplings that all runs share."""
    right = run.counts.intersection.sum(-1).double()  # [S, N] pixels
    labelled = run.counts.labelled.sum(-1).double()  # [N]
    value = torch.ones_like(run.weights[:1])  # each image once
    weights = torch.cat([value, run.weights]).double()  # [1 + R, N]
    accuracy = (weights @ right.T) / (weights @ labelled)[:, None]
    first = accuracy[:, run.sites.index("layer_01")]
    adapter = accuracy[:, run.sites.index("adapter")]
    return probes.Estimate.from_vector(first - adapter)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    probes.register_analysis("first_layer", {"first_layer": CLAIM})
    for run in read_study(args.study):
        probes.write_effects(run, "first_layer", {"first_layer": first_layer_gain(run)})
    main(["report", args.study, "--out", args.out])
