"""`probes study --dry-run`: what a study will do, what it costs, and which effects it can find."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava_bidir.common.errors import UserError
from probes.analyses.learning_curve import ANALYSIS as CURVE
from probes.analyses.learning_curve import DRAWS, check_sizes
from probes.config import StudyOptions
from probes.data.registry import open_splits
from probes.report.best_layers import detectable_difference
from probes.report.verdicts import MARGIN, POWER
from probes.runs.study import CONTROLS
from probes.score.estimate import student_quantile
from probes.steps.progress import format_duration
from probes.steps.record import Outcome, Step
from probes.steps.runner import find_missing

from .arms import Arm, arm_names, kind_of, plan_arms
from .plan import RUNS, Planned, check_folder, plan, trained_first

if TYPE_CHECKING:  # torch, which a study without missing steps needs not
    from probes.solve.run import RunCost

SPACED = 3  # what sparser controls would cost
REPORT_S = 5.0  # a page of two models on 60 photos
PASSES = {
    "knockout": 6,
    "routes": 20,
    "maps": 0.1,
    "position": 0.1,
}  # forwards over the validation images; else one
SIMULATED = 20_000  # studies
# standard deviations of recovery beyond random in the toy world, as fractions (experiments/statistics/draws.py)
OF_AN_IMAGE = 0.0028 * math.sqrt(600)
OF_DRAWS = 0.0035
# half width of the interval of the best layers of two models, as a fraction, times the root of the images: of the
# demo's masks (30 pictures) it is 0.18, of two real encoders (20 photos) 0.21
OF_A_PAIR = 0.2


def print_estimate(study: StudyOptions) -> None:
    """Print the missing steps, the time of a pass over the images, disk space, and the effect that can be detected.

    Raises:
        UserError: The study cannot be run.
    """
    planned = plan(study)
    check_folder(study, planned)
    missing = find_missing(planned.steps, study.out)
    if not missing:
        print(f"{study.out} is complete; nothing to do")
        return
    missing = [step for step in trained_first(missing) if not step.why_left_out]
    for step in missing:
        print(f"  {step.name}")
    runs = [step for step in missing if step.kind in RUNS]
    arms = Counter(kind_of(Path(step.name).name) for step in runs)
    kinds = ", ".join(f"{count} {arm}" for arm, count in arms.items())
    print(f"{len(missing)} steps, {len(runs)} of them passes over the images: {kinds}")
    for step in planned.steps:
        if step.why_left_out:
            print(f"{step.name} {Outcome.LEFT_OUT}: {step.why_left_out}")
    images = len(planned.validation)
    # counts of all images and of the solved path, at 40 sites
    numbers = 40 * images * len(planned.validation.classes) * (3 + 2 * 3 + 1)
    print(f"disk: about {len(runs) * numbers * 4 / 2**20:.0f} MB")
    if any(arm.why_left_out for arm in planned.arms):
        print("without matched random layers, nothing can be told from random models")
    else:
        masks = {arm.run.mask for arm in planned.arms}
        print(describe_power(study, images, len(masks)))
    if len(study.models) > 1:
        print(describe_comparison(images, study.margin / 100))
    if runs:
        print(describe_time(study, planned, missing))


def describe_time(study: StudyOptions, planned: Planned, missing: Sequence[Step]) -> str:
    """Return how long the missing steps take, measured on a few images with each model, or without weights, why not.

    Raises:
        UserError: A model cannot read the images.
    """
    from probes.solve.run import dry_run

    trained = [arm for arm in planned.arms if arm.is_trained]
    try:
        costs = {arm.label: dry_run(arm.config) for arm in trained}
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        # weights that are on another machine
        images = sum(len(dataset) for dataset in open_splits(trained[0].config.data).values())
        costs_of_configs = [describe_config(arm.config.model.mllm, images) for arm in trained]
        return "\n".join([f"the time is not known here: {error}", *costs_of_configs])
    images = len(planned.training)
    by_kind = seconds_by_kind(missing, planned.arms, costs, images)
    parts = [f"{kind} {format_duration(seconds)}" for kind, seconds in by_kind.items()]
    total = by_kind.total()
    text = f"{len(missing)} steps: about {format_duration(total)} on an idle machine ({', '.join(parts)})"
    spaced_arms = plan_arms(replace(study, control_sites=SPACED), planned.models)
    spaced = seconds_by_kind(missing, spaced_arms, costs, images).total()
    if spaced < total:
        text += f"; with --control_sites {SPACED}: {format_duration(spaced)}"
    return text


def seconds_by_kind(
    missing: Sequence[Step], arms: Sequence[Arm], costs: Mapping[str, "RunCost"], images: int
) -> Counter:
    """Return the seconds of steps by kind, from the sites of arms, the cost of each model, and the training images."""
    sites = {arm.run.name: len(arm.run.sites) for arm in arms}
    by_kind: Counter = Counter()
    for step in missing:
        run = step.name if step.kind in RUNS else step.name.rpartition("/")[0]
        cost = costs.get(run.rpartition("/")[0])
        if step.kind == "report":
            by_kind["report"] += REPORT_S
        elif step.kind in RUNS:  # those of other tasks have the sites of the trained arm at most
            by_kind[step.kind] += cost.seconds(sites.get(run, max(sites.values())))
        elif step.kind == CURVE.name:
            of_subsets = DRAWS * sum(check_sizes(step.config.images, images)) / images
            by_kind[step.kind] += cost.seconds(of_subsets * sites[run])
        else:
            by_kind[step.kind] += cost.start + PASSES.get(step.kind, 1) * cost.validation
    return by_kind


def describe_config(path: str, images: int) -> str:
    """Return an estimate of a forward over so many images from a model's config."""
    import torch

    from probes.models.families import family_of
    from probes.models.read_config import read_config

    config = read_config(path)
    family = family_of(config)
    with torch.device("meta"):
        model = family.model_cls(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = 2 * parameters * math.prod(family.grid(config))
    return (
        f"from the config of {path}: {parameters / 1e9:.3g} billion parameters, {flops / 1e12:.3g} TFLOP a photo; at "
        f"100 TFLOP/s a forward over {images:,} photos takes {format_duration(images * flops / 1e14)}, to which an arm "
        "adds the solutions of its sites"
    )


def describe_power(study: StudyOptions, images: int, masks: int) -> str:
    """Return which effects a study of models with so many masks can tell from those of random models."""
    arms = arm_names(study, has_llm=True)
    random, permuted = draws = [
        sum(arm.startswith(control) for arm in arms) for control in CONTROLS["llm"]
    ]
    effect = detectable_effect(images, draws, masks, study.margin / 100)
    if effect is None:
        return (
            "with fewer than two random and two permuted draws, nothing can be told from random models: give "
            "--draws 2 or more, or random0, random1, permuted0 and permuted1 among --arms"
        )
    return (
        f"{images} validation images, {random} random and {permuted} permuted draws: an effect must exceed those of "
        f"both by {100 * effect:.1f} points to be found in 4 of 5 studies, if images differ as in the toy world"
    )


def describe_comparison(images: int, margin: float = MARGIN) -> str:
    """Return which difference of two models a study can show."""
    half_width = OF_A_PAIR / math.sqrt(images)
    difference = detectable_difference(half_width, margin)
    return (
        f"{images} validation images: one model must read {100 * difference:.1f} points more than another one to be "
        "found better in 4 of 5 studies, if images differ as in the toy world"
    )


def detectable_effect(
    images: int, draws: Sequence[int], masks: int, margin: float = MARGIN
) -> float | None:
    """Return the effect that 80% of studies find beyond all controls, as a fraction; None if it cannot be tested.

    Studies are simulated and judged as in a report (`interval_over_draws`), with the spread of draws pooled over masks
    and controls.

    Args:
        images: Validation images.
        draws: Draws of each control.
        masks: Masks of the study.
        margin: Smallest effect that counts, as a fraction.
    """
    if min(draws) < 2:
        return None
    rng = np.random.default_rng(0)
    of_images = OF_AN_IMAGE / math.sqrt(images)
    values = [OF_DRAWS * rng.standard_normal((SIMULATED, masks, count)) for count in draws]
    variances = [x.var(-1, ddof=1) for x in values]
    df = masks * (sum(draws) - len(draws))
    pooled = sum(
        variance.sum(1) * (count - 1) for variance, count in zip(variances, draws, strict=True)
    )
    error = of_images * rng.standard_normal(SIMULATED)
    needed = []
    for x, variance, count in zip(values, variances, draws, strict=True):
        variance = np.maximum(variance[:, 0], pooled / df)
        of_draws = student_quantile(0.975, df) * np.sqrt(variance / count)
        half = np.hypot(1.96 * of_images, of_draws)
        needed.append(np.maximum(half, margin) + x[:, 0].mean(1) - error)
    return float(np.quantile(np.max(needed, 0), POWER))
