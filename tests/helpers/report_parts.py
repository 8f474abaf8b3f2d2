"""Parts of a report, without a page, and references for its numbers."""

from types import SimpleNamespace

import numpy as np
from reference import miou_of_counts

from probes.report.claims import evaluate_claims
from probes.report.readings import SiteReading
from probes.runs.read import ProbeRun
from probes.runs.study import StudyRuns, group_runs

# pixel accuracies of encoder, adapter, layers 1 to 3, and final norm
CURVE = [0.5, 0.4, 0.5, 0.6, 0.7, 0.7]
FLAT = [0.5, 0.4, 0.4, 0.4, 0.4, 0.4]


def studies_of(paths) -> list[StudyRuns]:
    """Return the studies that runs make; NAME=PATH names the model."""
    runs = []
    for name, separator, path in (str(path).rpartition("=") for path in paths):
        run = ProbeRun(path)
        run.model = name if separator else None
        runs.append(run)
    return group_runs(runs)


def claims_of(paths) -> dict[str, dict]:
    """Return the claims of a study by name, those under causal attention first."""
    claims = evaluate_claims(*studies_of(paths))
    return {claim["claim"]: claim for claim in reversed(claims)}


def differs(row: dict, margin: float = 0.01) -> bool:
    """Return whether a difference is a finding: an interval without 0, the margin, of classes a p below 5%."""
    is_clear = abs(row["difference"]) >= margin and row["low"] * row["high"] > 0
    return is_clear and (row["of"] != "class" or (row["p"] is not None and row["p"] < 0.05))


def reading(scores: dict[str, float], has_llm: bool) -> SiteReading:
    """A model A of these scores."""
    model = SimpleNamespace(key="A", has_llm=has_llm, depth=len(scores) - (2 if has_llm else 1))
    rows = [
        SimpleNamespace(site=site, value=value, value_text=f"{100 * value:.1f}")
        for site, value in scores.items()
    ]
    own = {site: site for site in scores}
    return SiteReading(
        model=model,
        mask="causal",
        data="toy",
        task="segmentation",
        seed=0,
        rows=rows,
        draws={"layer_01": [0.1]},
        own=own,
        pictures={},
        images=20,
        resize="squash",
        margin=0.01,
    )


def miou(run, weights=None) -> np.ndarray:
    """Return mIoU by site in numpy, f[S], or f[S, R] under the multiplicities of images f[R, N]."""
    right, predicted, labelled = run.counts[:3]
    pairs = zip(right, predicted, strict=True)
    return np.array(
        [miou_of_counts(i, predicted=p, labelled=labelled, weights=weights) for i, p in pairs]
    )
