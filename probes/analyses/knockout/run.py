"""`probes knockout`: do correctly classified patches pull misclassified ones to the right class (Sec. 4, App. C)?

A case of class c is an image in which the adapter's probe predicts c on patches of other classes. Per case, Eq. 1
blocks in turn nothing ("none"), the tokens predicted as c ("incorrect"), those predicted as the class that the mistaken
patches mostly are ("correct"), and controls; in all layers at once, unless the plan says differently. The same frozen
probes count n_c(l), the patches wrongly predicted as c at layer l. The result is n_c(l) / n_c(0), averaged over the
images with n_c(0) > 0 (or at least `min_patches`).

Patches selected for being wrong at layer 0 are less often wrong later without any knockout (regression to the mean).
Effects are therefore read against "none" or a control, never against 1. README.md lists the limits.

    knockout.json                  rates and effects with intervals
    knockout.safetensors           "class/condition" and "class/OUTCOME:condition" f[cases, L + 1], see cases.py;
                                   "class/image" and other fields of a case
    knockout_effects.safetensors   what claims are made from, see probes/analyses/effects.py
    knockout.partial/              finished batches, removed at the end

Shapes: B images, C cases, T patches, L layers, layer 0 the adapter.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_bidir.common.errors import NothingToMeasure, UserError
from llava_bidir.common.files import exclusive_run_lock, write_files
from probes.analyses.base import check_has_llm
from probes.analyses.batch_cache import cached_batches
from probes.analyses.effects import effects_path
from probes.analyses.measured_sinks import sinks_of_run
from probes.analyses.replacement import check_replaceable
from probes.analyses.sinks import describe_sinks
from probes.data.batches import PreprocessedDataset, collate
from probes.models.sites import is_layer
from probes.runs.probe_run import ProbeRun
from probes.score.effect_file import effect_file
from probes.score.estimate import Estimate, estimate_text

from . import KnockoutOptions
from .batch import knock_out_batch
from .cases import PatchReader, confused_classes
from .config import check_fits, check_has_layers, cut_layers
from .contrasts import knockout_effects
from .rates import class_entry


def knockout(run: ProbeRun, plan: KnockoutOptions) -> dict[str, Any]:
    """Run all conditions over the validation split, write the files named above, return the content of knockout.json.

    The same call resumes after the last finished batch if a previous one was killed.

    Raises:
        UserError: The options do not fit the run.
        NothingToMeasure: No image has patches wrongly predicted as any of the classes.
    """
    out = plan.folder
    check_fits(plan, run)
    reader = PatchReader(run)
    check_has_layers(run, [site for site in reader.mllm.sites if is_layer(site)])
    tensors = _compute_cases(run, plan, reader, out / "knockout.partial")
    effects = knockout_effects(run, tensors)
    sinks = sinks_of_run(run, reader.mllm)
    results = summarise_cases(run, plan, tensors, effects, sinks)
    write_files(
        {
            out / "knockout.safetensors": tensors,
            effects_path(out, "knockout"): effect_file(effects, run.fingerprint),
            out / "knockout.json": results,
        }
    )
    shutil.rmtree(out / "knockout.partial")
    return results


def summarise_cases(
    run: ProbeRun,
    plan: KnockoutOptions,
    tensors: dict[str, Tensor],
    effects: dict[str, Estimate],
    sinks: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of knockout.json, from that of knockout.safetensors, the effects, and attention sinks."""
    header = {key: run.metrics[key] for key in ("image_attention", "untrained")}
    return header | {
        "runs": [run.fingerprint],
        **plan.settings,
        "layers": plan.layers or "all",
        "classes": [class_entry(name, tensors, plan.seed, run.groups) for name in plan.classes],
        "effects": {name: effect.json() for name, effect in effects.items()},
        "sinks": sinks,
    }


def _compute_cases(
    run: ProbeRun,
    plan: KnockoutOptions,
    reader: PatchReader,
    partial: Path,
) -> dict[str, Tensor]:
    """Return the results of the split by "class/key", one row per case; finished batches are kept in `partial`."""
    classes = run.metrics["classes"]
    dataset = PreprocessedDataset(run.dataset(), reader.mllm.preprocess)
    images = range(min(len(dataset), plan.limit or len(dataset)))

    def compute(indices):
        batch = collate([dataset[i] for i in indices])
        return knock_out_batch(reader, plan, classes, batch)

    arguments = {"plan": plan.settings, "run": run.fingerprint}
    tensors = cached_batches(partial, arguments, images, plan.batch_size, compute)
    if not tensors:
        shutil.rmtree(partial)
        raise NothingToMeasure(
            f"{run.path}: no image has {plan.min_patches} or more patches wrongly predicted as "
            f"{' or '.join(plan.classes)}; choose other --classes (such as auto:5) or fewer --min-patches"
        )
    return tensors


def run(options: KnockoutOptions) -> None:
    """Run `probes knockout`."""
    probe_run = ProbeRun(options.probes, trust=options.trust)
    check_has_llm(probe_run, "knockout")
    plan = replace(options, classes=_resolve_classes(probe_run, options.classes))
    made_from = {
        "runs": [probe_run.fingerprint],
        **plan.settings,
        "layers": plan.layers or "all",
    }

    def classes_of(results):
        return results | {"classes": [entry["class"] for entry in results["classes"]]}

    with exclusive_run_lock(plan.folder, "knockout.json"):
        result = plan.folder / "knockout.json"
        check_replaceable(result, made_from, plan.overwrite, classes_of)
        results = knockout(probe_run, plan)
    for entry in results["classes"]:
        rates = ", ".join(
            f"{condition} {values[-1]:.0%}" for condition, values in entry["remaining"].items()
        )
        print(f"{entry['class']} ({entry['images']} images), remaining at the last layer: {rates}")
    print_effects(results)


def _resolve_classes(run: ProbeRun, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the classes, with auto:N replaced by the N most often confused ones."""
    auto = next((name for name in classes if name.startswith("auto:")), None)
    if auto is None:
        return classes
    count = auto.removeprefix("auto:")
    if len(classes) > 1 or not count.isdecimal():
        raise UserError(
            f"--classes {' '.join(classes)}: expected class names, or auto:N alone, such as auto:5"
        )
    classes = tuple(confused_classes(run, int(count)))
    print(f"most often wrongly predicted: {', '.join(classes)}")
    return classes


def print_effects(results: dict[str, Any]) -> None:
    """Print the effects in the later half of the layers, as the paper measures them and against other tokens."""
    print("Effects in the later half of the layers, as in the paper and (@) against other tokens:")
    for name, effect in results["effects"].items():
        print(f"  {name:<30} {estimate_text(effect, '+.1%')}")
    if sentence := describe_sinks(cut_layers(results), results["sinks"]):
        print(f"{sentence}.")
