"""`probes knockout`: do correctly classified patches pull misclassified ones to the right class? (Sec. 4, App. C)

For a class c, an image takes part if the adapter's probe predicts c on patches that are something else. By default in
all layers at once, blocked (Eq. 1) is in turn nothing ("none"), what is called c ("incorrect"), what is called the
class that those patches mostly are ("correct"), and controls. At each layer l the patches wrongly predicted c are
counted, n_c(l), by the same frozen probes. Reported is n_c(l) / n_c(0), averaged over the images with n_c(0) > 0 (or at
least `min_patches`). See knockout_cases.py, knockout_conditions.py, knockout_windows.py, knockout_attention.py.

"none" shows the same patches without a knockout: patches chosen because they are wrong at layer 0 are less often wrong
later whatever is done (regression to the mean), so effects are read against it or against a control, never against 1.

    knockout.json                  rates with intervals, effects against controls with p-values
    knockout.safetensors           "class/condition" f[cases, L + 1], "class/image" and what else a case is about
    knockout_windows.json          the same by window of layers, or by head of a layer, where asked for
    knockout.partial/              batches done so far; removed at the end

Shapes: B images, C cases, T patches, L layers, layer 0 the adapter.
"""

import argparse
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.bootstrap import bootstrap_weights, random_swaps
from llava_bidir.common.errors import UserError
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.analyses.batch_cache import batch_results
from probes.data.batches import PreprocessedDataset, collate
from probes.results.probe_run import ProbeRun

from .batch import knock_out
from .cases import PatchReader, confused_classes
from .config import Plan
from .effects import attention_entry, class_entry, effect_entries, joined, select_cases
from .layer_sweep import SWEEP_CONDITIONS, places_of, sweep_entry


def knockout(run: ProbeRun, plan: Plan, out: Path) -> dict:
    """Runs all conditions over the validation split, writes the files named above into `out` and returns what
    knockout.json holds. The same call goes on where a killed one stopped.

    Raises:
        UserError: The plan does not fit the run, or no image has patches wrongly predicted any of the classes.
    """
    plan.check(run)
    reader = PatchReader(run)
    tensors = _all_cases(run, plan, reader, out / "knockout.partial")
    swept = {key: tensors.pop(key) for key in list(tensors) if "/swept:" in key}
    weights = bootstrap_weights(run.metrics["images"], seed=plan.seed, groups=run.groups)
    swaps = random_swaps(run.metrics["images"], seed=plan.seed, groups=run.groups)
    pools = {name: select_cases(tensors, 1, which) for name, which in _pools(plan).items()}
    pools = {name: cases for name, cases in pools.items() if cases}
    head = {key: run.metrics[key] for key in ("image_attention", "untrained")}
    head |= {"runs": [run.fingerprint], **asdict(plan)}
    facts = head | {
        "layers": plan.layers or "all",
        "classes": [class_entry(name, tensors, plan.seed, run.groups) for name in plan.classes],
        "effects": [e for name, cases in pools.items() for e in effect_entries(name, cases, weights, swaps)],
    }
    if plan.attention:
        facts["attention"] = [attention_entry(name, tensors, _pools(plan)[name]) for name in pools]
    files = {out / "knockout.safetensors": tensors}
    if swept:
        rates = lambda name: {what: joined(swept, f"swept:{what}", _pools(plan)[name]) for what in SWEEP_CONDITIONS}
        entries = [sweep_entry(name, rates(name), cases, weights, swaps) for name, cases in pools.items()]
        places = places_of(plan.windows, plan.heads, len(run.layers) - 1, reader.attention_heads)
        swept_facts = head | {"places": [p._asdict() for p in places], "classes": entries}
        files[out / "knockout_windows.json"] = swept_facts
    write_files(files | {out / "knockout.json": facts})
    shutil.rmtree(out / "knockout.partial")
    return facts


def _all_cases(run: ProbeRun, plan: Plan, reader: PatchReader, partial: Path) -> dict[str, Tensor]:
    """By "class/what", one row a case of the split, batch by batch, each kept in `partial` when done."""
    classes, prepared = run.metrics["classes"], PreprocessedDataset(run.dataset(), reader.mllm.preprocess)
    images = range(min(len(prepared), plan.limit or len(prepared)))

    def compute(batch: int) -> dict[str, Tensor]:
        samples = images[batch * plan.batch_size : (batch + 1) * plan.batch_size]
        return knock_out(reader, plan, classes, collate([prepared[i] for i in samples]))

    arguments = {"plan": asdict(plan), "run": run.fingerprint}
    batches = batch_results(partial, arguments, -(-len(images) // plan.batch_size), compute)
    keys = dict.fromkeys(key for batch in batches for key in batch)
    if not keys:
        shutil.rmtree(partial)
        raise UserError(
            f"no image has {plan.min_patches} or more patches wrongly predicted any of {', '.join(plan.classes)}"
        )
    return {key: torch.cat([batch[key] for batch in batches if key in batch]) for key in keys}


def _pools(plan: Plan) -> dict[str, list[str] | None]:
    """Which classes' cases are spoken of together: all, and each class by itself."""
    return {"all": None} | {name: [name] for name in plan.classes}


def run(args: argparse.Namespace) -> None:
    """`probes knockout`."""
    probed = ProbeRun(args.probes)
    auto = [name for name in args.classes if name.startswith("auto:")]
    if auto and len(args.classes) > 1:
        raise UserError(f"--classes takes names or {auto[0]}, not both")
    if auto:
        count = auto[0].removeprefix("auto:")
        if not count.isdecimal():
            raise UserError(f"--classes {auto[0]}: expected auto:N with a whole number N, such as auto:5")
        args.classes = confused_classes(probed, int(count))
        print(f"most often predicted where they are not: {', '.join(args.classes)}")
    names = Plan.__dataclass_fields__
    out, plan = Path(args.out or args.probes), Plan(**{k: v for k, v in vars(args).items() if k in names})
    with exclusive_run_lock(out, "knockout.json"):
        facts = knockout(probed, plan, out)
    for entry in facts["classes"]:
        last = ", ".join(f"{condition} {rates[-1]:.0%}" for condition, rates in entry["remaining"].items())
        print(f"{entry['class']} ({entry['images']} images), remaining at the last layer: {last}")
    for effect in facts["effects"]:
        if effect["class"] == "all":
            print(describe(effect))


def describe(effect: dict) -> str:
    """One line about an effect in the later half of the layers."""
    value, (low, high), p = (effect["later"][key] for key in ("value", "ci95", "p"))
    what = f"{effect['condition']} against {effect['control']}"
    return f"{what:<42} {100 * value:+6.1f} pp [{100 * low:+.1f}, {100 * high:+.1f}], p = {p:.4f}"
