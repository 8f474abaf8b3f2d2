"""`probes knockout`: do correctly classified patches pull misclassified ones to the right class (Sec. 4, App. C)?

A case of class c is an image in which the adapter's probe predicts c on patches of other classes. Per case, Eq. 1
blocks in turn nothing ("none"), the tokens predicted as c ("incorrect"), those predicted as the class that the mistaken
patches mostly are ("correct"), and controls; in all layers at once, unless the plan says differently. The same frozen
probes count n_c(l), the patches wrongly predicted as c at layer l. The result is n_c(l) / n_c(0), averaged over the
images with n_c(0) > 0 (or at least `min_patches`).

Patches selected for being wrong at layer 0 are less often wrong later without any knockout (regression to the mean).
Effects are therefore read against "none" or a control, never against 1. README.md lists the limits.

    knockout.json                  rates with intervals, effects against controls with p-values
    knockout.safetensors           "class/condition" and "class/OUTCOME:condition" f[cases, L + 1], see cases.py;
                                   "class/image" and other fields of a case
    knockout_effects.safetensors   what claims are made from, see probes/analyses/effects.py
    knockout_windows.json          effects by window of layers, if asked for
    knockout.partial/              finished batches, removed at the end

Shapes: B images, C cases, T patches, L layers, layer 0 the adapter.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.bootstrap import bootstrap_weights, random_swaps
from llava_bidir.common.errors import NothingToMeasure, UserError
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.analyses.base import check_has_llm
from probes.analyses.batch_cache import cached_batches
from probes.analyses.effects import effects_path
from probes.analyses.replacement import check_replaceable
from probes.data.batches import PreprocessedDataset, collate
from probes.evaluation.effect_file import effect_file
from probes.models.sites import is_layer
from probes.results.probe_run import ProbeRun

from . import Options
from .batch import knock_out_batch
from .cases import PatchReader, confused_classes
from .config import check_fits, check_has_layers
from .contrasts import knockout_effects
from .effects import (
    MIN_IMAGES,
    class_entry,
    concat_classes,
    correct_for_classes,
    effect_entries,
    enough_units,
    select_cases,
)
from .layer_sweep import SWEEP_CONDITIONS, cut_locations, sweep_entry


def knockout(run: ProbeRun, plan: Options) -> dict[str, Any]:
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
    swept = {key: tensors.pop(key) for key in list(tensors) if "/swept:" in key}
    results, windows = summarise_cases(run, plan, tensors, swept)
    files = {
        out / "knockout.safetensors": tensors,
        effects_path(out, "knockout"): effect_file(knockout_effects(run, tensors), run.fingerprint),
        out / "knockout.json": results,
    }
    if windows:
        files = {out / "knockout_windows.json": windows} | files
    else:
        # of the knockout that this one replaces
        (out / "knockout_windows.json").unlink(missing_ok=True)
    write_files(files)
    shutil.rmtree(out / "knockout.partial")
    return results


def summarise_cases(
    run: ProbeRun,
    plan: Options,
    tensors: dict[str, Tensor],
    swept: dict[str, Tensor],
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the contents of knockout.json and of knockout_windows.json, None without windows.

    Takes those of knockout.safetensors, and the rates by window, "class/swept:condition" f[C, W, L + 1].
    """
    weights = bootstrap_weights(run.metrics["images"], seed=plan.seed, groups=run.groups)
    swaps = random_swaps(run.metrics["images"], seed=plan.seed, groups=run.groups)
    # pooled over classes, and each class alone
    pools = {"all": None} | {name: [name] for name in plan.classes}
    cases = {
        name: found for name, members in pools.items() if (found := select_cases(tensors, members))
    }
    effects = [
        entry for name in cases for entry in effect_entries(name, cases[name], weights, swaps)
    ]
    tested = [
        name for name in plan.classes if name in cases and enough_units(cases[name], run.groups)
    ]
    correct_for_classes(effects, tested)
    header = {key: run.metrics[key] for key in ("image_attention", "untrained")}
    header |= {"runs": [run.fingerprint], **plan.settings}
    results = header | {
        "layers": plan.layers or "all",
        "classes": [class_entry(name, tensors, plan.seed, run.groups) for name in plan.classes],
        "too_few_images": [name for name in plan.classes if name in cases and name not in tested],
        "effects": effects,
    }
    if not swept:
        return results, None

    def rates(name):
        return {key: concat_classes(swept, f"swept:{key}", pools[name]) for key in SWEEP_CONDITIONS}

    entries = [
        sweep_entry(
            name,
            rates(name),
            cases[name],
            weights,
            swaps,
        )
        for name in cases
    ]
    places = [
        location._asdict() for location in cut_locations(plan.layer_windows, len(run.layers) - 1)
    ]
    return results, header | {"places": places, "classes": entries}


def _compute_cases(
    run: ProbeRun,
    plan: Options,
    reader: PatchReader,
    partial: Path,
) -> dict[str, Tensor]:
    """Return the results of the split by "class/key", one row per case; finished batches are kept in `partial`."""
    classes = run.metrics["classes"]
    dataset = PreprocessedDataset(run.dataset(), reader.mllm.preprocess)
    images = range(min(len(dataset), plan.limit or len(dataset)))

    def compute(indices):
        return knock_out_batch(reader, plan, classes, collate([dataset[i] for i in indices]))

    arguments = {"plan": plan.settings, "run": run.fingerprint}
    batches = cached_batches(partial, arguments, images, plan.batch_size, compute)
    keys = dict.fromkeys(key for batch in batches for key in batch)
    if not keys:
        shutil.rmtree(partial)
        raise NothingToMeasure(
            f"{run.path}: no image has {plan.min_patches} or more patches wrongly predicted as "
            f"{' or '.join(plan.classes)}; choose other --classes (such as auto:5) or fewer --min-patches"
        )
    return {key: torch.cat([batch[key] for batch in batches if key in batch]) for key in keys}


def run(options: Options) -> None:
    """Run `probes knockout`."""
    probe_run = ProbeRun(options.probes)
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
    """Print the effects over the cases of all classes together, and in how many classes each is significant."""
    effects = [effect for effect in results["effects"] if effect["class"] == "all"]
    print(
        f"Effect in the later half of the layers, {effects[0]['cases']} cases in {effects[0]['images']} images pooled; "
        "classes in which it is significant, with Holm's correction:"
    )
    for effect in effects:
        key = [effect["condition"], effect["control"]]
        same = [
            entry["later"]
            for entry in results["effects"]
            if [entry["condition"], entry["control"]] == key
        ]
        tested = [later["p_holm"] for later in same if later["p_holm"] is not None]
        print(
            f"  {format_effect(effect)}; {sum(p < 0.05 for p in tested)} of {len(tested)} classes"
        )
    if few := results["too_few_images"]:
        print(
            f"Not tested, in fewer than {MIN_IMAGES} images, or groups of images: {', '.join(few)}"
        )


def format_effect(effect: dict[str, Any]) -> str:
    """Return one line about an effect in the later half of the layers."""
    value, (low, high), p = (effect["later"][key] for key in ("value", "ci95", "p"))
    comparison = f"{effect['condition']} against {effect['control']}"
    return f"{comparison:<42} {100 * value:+6.1f} pp [{100 * low:+.1f}, {100 * high:+.1f}], p = {p:.4f}"
