"""The figures that ask how sure a curve is, and what else there is to see in the states."""

from collections.abc import Iterator
from typing import Any

from probes.models.frozen_mllm import ADAPTER
from probes.report.probe_sensitivity import alike_but_for, recipes_of
from probes.report.study import MASKS, Study

from . import confusion, feature_statistics, layer_curves, mask_comparison, probe_sensitivity, training_budget
from .style import ReportFigure

SCALE = "The scale of the features"


def paired_pictures(facts: dict[str, Any] | None) -> Iterator[ReportFigure]:
    if facts is None:
        return
    yield ReportFigure(
        "paired_sites",
        "Bidirectional against causal",
        "The difference by site",
        "mIoU under bidirectional attention minus that under causal attention, on the same images (Fig. 8). Look for "
        "layers whose line stays off zero. Lines: 95% intervals, paired. Filled: significant by a permutation test, "
        f"corrected for {len(facts['sites'])} sites.",
        mask_comparison.paired_curve(facts),
    )


def confusion_pictures(study: Study, facts: dict[str, list[dict[str, Any]]]) -> Iterator[ReportFigure]:
    for mask, pairs in facts.items():
        yield ReportFigure(
            f"confusion_{mask}",
            "Which classes are told apart where",
            f"Confused classes, {mask}",
            "Of the pixels of a class, the share that is taken for another, for the pairs that are confused most at "
            "the adapter (Sec. 3.3). Look for rows that fade to the right. Green: from this layer on half of the "
            "adapter's confusion is gone; rows without it keep more than half.",
            confusion.confusion_map(study.trained[mask], pairs),
            "wide",
        )


def recipe_pictures(study: Study, scale: dict[str, dict[str, Any]]) -> Iterator[ReportFigure]:
    """Norms and learning rates, then heads, seeds and controls."""
    if scale:
        keys = ("feature_norm", "learning_rate")
        varied = {mask: (study.by_recipe[mask], alike_but_for(study.by_recipe[mask], *keys)) for mask in scale}
        yield ReportFigure(
            "scale_effects",
            SCALE,
            "Drop-off and recovery under every norm and learning rate",
            "The two effects by how the probe was trained. Look for whether all of them lie on the same side of zero. "
            "Filled: the 95% interval lies above zero.",
            probe_sensitivity.effects_by_recipe(scale),
        )
        yield ReportFigure(
            "scale_curves",
            SCALE,
            "The curves behind it",
            "mIoU over the stack under each recipe; thick: the one of the first figure. Curves that differ in shape, "
            "not only in height, show where the scale of the features decides.",
            probe_sensitivity.recipe_curves(varied, *keys),
        )
    heads = _found(study, lambda run: [r for r in recipes_of(run) if r.settings["labels"] == "true"], "head")
    if heads:
        yield ReportFigure(
            "heads",
            "Richer heads",
            "Linear and richer heads",
            "The same states read by heads that can do more than a linear map (the paper's limitations ask for them). "
            "A drop-off that a richer head closes is a matter of format, one that stays is lost.",
            probe_sensitivity.recipe_curves(heads, "head"),
        )
    seeds = _found(study, lambda run: alike_but_for(run, "seed"), "seed")
    if seeds:
        yield ReportFigure(
            "seeds",
            "Probe seeds",
            "Probes from other seeds",
            "One line a seed of the probes, beside the interval over images, which leaves that chance out. Lines that "
            "lie within the band add little to it.",
            probe_sensitivity.seed_curves(seeds),
        )
    shuffled = {
        mask: [recipe for recipe in recipes_of(run) if recipe.settings["labels"] == "shuffled"]
        for mask, run in study.by_recipe.items()
    }
    if any(shuffled.values()):
        yield ReportFigure(
            "controls",
            "Controls",
            "What is there without training",
            "The same probes on shuffled labels, which is what the probe alone can fit, and on the untrained model, "
            "which is what the architecture gives. What the trained curve has beyond them is what training gave.",
            probe_sensitivity.controls(study, shuffled),
        )


def _found(study: Study, recipes_in, key: str) -> dict[str, Any]:
    """Run and recipes by mask, one recipe a value of `key`, where it has more than one value."""
    found = {}
    for mask, run in study.by_recipe.items():
        by_value = {}
        for recipe in recipes_in(run):
            by_value.setdefault(recipe.settings[key], recipe)
        if len(by_value) > 1:
            found[mask] = (run, list(by_value.values()))
    return found


def state_pictures(study: Study) -> Iterator[ReportFigure]:
    if all("states" in run.metrics["sites"][0] for run in study.trained.values()):
        yield ReportFigure(
            "states",
            "The states themselves",
            "Scale, anisotropy, neighbourhoods",
            "No probe is trained for these: the root mean square of the states, how much of it one channel holds, how "
            "much the states of different images point the same way, and the share of a patch's nearest neighbours "
            "that have its class. Look for jumps in scale where the curve of the first figure moves.",
            feature_statistics.state_statistics(study),
        )


def budget_pictures(study: Study) -> Iterator[ReportFigure]:
    probe = study.first.metrics["probe"]
    if all(entry["history"] for entry in study.first.metrics["sites"]):
        yield ReportFigure(
            "budget",
            "The probe's budget",
            "How much is the probe?",
            f"The curve of the first figure ({probe['epochs']} epochs of probe training) after fewer epochs and, where "
            "given, dashed, by probes trained for longer. Under-trained probes show how easily a class is read off, "
            "converged ones whether it is there: trust what does not change between the two.",
            training_budget.probe_budget(study),
        )
        if all("validated_at" in run.metrics["probe"] for run in study.trained.values()):
            yield ReportFigure(
                "budget_steps",
                "The probe's budget",
                "Score against steps",
                "The same pass, one line a site, from the encoder (light) to the last layer (dark). Lines that still "
                "rise at the end belong to probes that had too few steps.",
                training_budget.score_by_step(study),
            )


def overview_pictures(studies: list[Study]) -> Iterator[ReportFigure]:
    """Across models and datasets, of a report on several."""
    for mask in MASKS:
        found = [study for study in studies if mask in study.trained]
        if not found:
            continue
        yield ReportFigure(
            f"models_{mask}",
            "Across models and datasets",
            f"Every model, {mask}",
            "mIoU over the stack, a line a model (Figs. 3 and 9). Dashed: its best layer, with what it gains over the "
            "adapter. Bands: 95% intervals.",
            layer_curves.models_by_dataset(found, mask),
        )
        with_adapter = [study for study in found if ADAPTER in study.trained[mask].sites]
        if with_adapter:
            yield ReportFigure(
                f"over_adapter_{mask}",
                "Across models and datasets",
                f"Recovery of every model, {mask}",
                "The same curves less their value at the adapter (Fig. 10), so that models of different depth and "
                "encoder can be laid over each other.",
                layer_curves.models_by_dataset(with_adapter, mask, over_adapter=True),
            )
    both = [study for study in studies if study.pair()]
    if both:
        yield ReportFigure(
            "masks",
            "Across models and datasets",
            "Causal and bidirectional attention",
            "Both masks of every model (Fig. 8). Dashed: the best layer, with what it gains over the adapter.",
            layer_curves.masks_by_model(both),
        )
