"""`probes knockout`: do correctly classified patches pull misclassified ones to the right class (Eq. 1, App. C.1)?

A case of class c is an image in which the adapter's probe predicts c on patches of other classes. Per case, Eq. 1
blocks in turn nothing ("none"), the tokens predicted as c ("incorrect"), those predicted as the class that the mistaken
patches mostly are ("correct"), and as many random ones; in all layers at once, or those of `layers`. The same frozen
probes count n_c(l), the patches wrongly predicted as c at layer l. The result is n_c(l) / n_c(0), averaged over the
images with n_c(0) > 0 (or at least `min_patches`).

Patches selected for being wrong at layer 0 are less often wrong later without any knockout (regression to the mean).
Effects are therefore read against "none" or a control, never against 1. README.md lists the limits and the files.

Shapes: C cases, L layers, layer 0 the adapter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_bidir.common.cli import Count, Indices, Seed
from llava_bidir.common.errors import NothingToMeasure, UserError
from llava_bidir.common.files import read_json
from probes.analyses.analysis import (
    Analysis,
    Claim,
    Result,
    Row,
    RunOptions,
    lacks_layers,
    table_row,
)
from probes.models.sites import ADAPTER, layer_number, layer_site

if TYPE_CHECKING:  # this module answers `probes --help`
    from probes.runs.read import ProbeRun

    from .knockout_effects import KnockoutRows


@dataclass(frozen=True, kw_only=True)
class KnockoutOptions(RunOptions):
    """What to run for each case; knockout.json has all of it.

    Args:
        classes: Classes c, or auto:N for the N most often confused, at most all.
        like: A knockout.json whose classes are blocked instead, if there is one: that of a model to compare with.
        layers: Layers to cut, counted from 1 (default: all).
        block_by: Site whose predictions define the blocked tokens.
        min_patches: Leave out images with fewer wrong patches.
        limit: Number of images to read (default: all).
        batch_size: Images, or cases, per forward.
        draws: Draws to average for each condition with random tokens.
        seed: Random seed of the controls.
    """

    classes: tuple[str, ...]
    like: Path | None = None
    layers: Indices | None = None
    block_by: str = ADAPTER
    min_patches: Count = 1
    limit: Count | None = None
    batch_size: Count = 64
    draws: Count = 5
    seed: Seed = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on, beside the run; `like` by its classes."""
        settings = super().settings
        del settings["like"]
        return settings


def complete(run: "ProbeRun", options: KnockoutOptions) -> KnockoutOptions:
    """Return the options with the classes that are blocked.

    Raises:
        UserError: The options do not fit the run.
    """
    last = layer_number(run.last_layer)
    needed = [ADAPTER, *map(layer_site, range(1, last + 1))]
    if missing := [site for site in needed if site not in run.sites]:
        raise UserError(
            f"{run.path} has no probes at {', '.join(missing)}; a knockout counts wrong patches at the adapter and at "
            "every decoder layer: make the run with these sites too (`--model.sites null` probes all)"
        )
    if options.like and options.like.is_file():
        classes = tuple(entry["class"] for entry in read_json(options.like)["classes"])
    else:
        classes = _named_classes(run, options.classes)
    choices = {
        "class": (classes, run.metrics["classes"]),
        "block_by site": ([options.block_by], run.layers),
    }
    for kind, (names, choosable) in choices.items():
        for name in names:
            if name not in choosable:
                raise UserError(f"unknown {kind} {name!r}; {run.path} has {', '.join(choosable)}")
    if repeated := [name for i, name in enumerate(classes) if name in classes[:i]]:
        raise UserError(f"class {repeated[0]!r} is named twice; its cases would count twice")
    for layer in options.layers or ():
        if not 1 <= layer <= last:
            raise UserError(f"layer {layer} is out of range; {run.path} has layers 1..{last}")
    return replace(options, classes=classes, like=None)


def _named_classes(run: "ProbeRun", classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the classes, with auto:N replaced by the N most often confused ones."""
    auto = next((name for name in classes if name.startswith("auto:")), None)
    if auto is None:
        return classes
    count = auto.removeprefix("auto:")
    if len(classes) > 1 or not count.isdecimal() or int(count) < 1:
        raise UserError(
            f"--classes {' '.join(classes)}: expected class names, or auto:N alone, such as auto:5"
        )
    confused = confused_classes(run, int(count))
    print(f"most often wrongly predicted: {', '.join(confused)}")
    return tuple(confused)


def confused_classes(run: "ProbeRun", count: int) -> list[str]:
    """Return the `count` classes with the most wrongly predicted pixels at the adapter, most frequent first."""
    site = run.sites.index(ADAPTER)
    wrong = (run.counts.predicted[site] - run.counts.intersection[site]).sum(0)
    ranked = wrong.argsort(descending=True, stable=True).tolist()
    return [run.metrics["classes"][k] for k in ranked[:count]]


def measure(run: "ProbeRun", options: KnockoutOptions) -> Result:
    """Return the rates by class, the outcomes of all cases, and the effects.

    Raises:
        NothingToMeasure: No image has patches wrongly predicted as any of the classes.
    """
    from .cases import PatchReader, knock_out_batch
    from .knockout_effects import knockout_effects, knockout_rows

    reader = PatchReader(run)
    dataset = run.dataset()
    images = range(min(len(dataset), options.limit or len(dataset)))

    def compute(indices: Sequence[int]):
        samples = {i: dataset[i] for i in indices}
        return knock_out_batch(
            reader, options=options, classes=run.metrics["classes"], samples=samples
        )

    tensors = ANALYSIS.in_batches(
        run, options=options, items=images, size=options.batch_size, compute=compute
    )
    if not tensors:
        raise NothingToMeasure(
            f"{run.path}: no image has {options.min_patches} or more patches wrongly predicted as "
            f"{' or '.join(options.classes)}; choose other --classes (such as auto:5) or fewer --min-patches"
        )
    effects = knockout_effects(run, tensors)
    return Result(
        knockout_rows(run, options=options, tensors=tensors, effects=effects), tensors, effects
    )


def lines(results: "KnockoutRows") -> Iterator[str]:
    """Yield the rates at the last layer, and the effects, of knockout.json."""
    from probes.score.estimate import estimate_text

    for entry in results["classes"]:
        rates = ", ".join(
            f"{condition} {values[-1]:.0%}" for condition, values in entry["remaining"].items()
        )
        yield f"{entry['class']} ({entry['images']} images), remaining at the last layer: {rates}"
    yield "Effects in the later half of the layers, as in the paper and (@) against other tokens:"
    for name, effect in results["effects"].items():
        yield f"  {name:<30} {estimate_text(effect, '+.1%')}"


def table_rows(results: "KnockoutRows") -> Iterator[Row]:
    """Yield the share of wrong patches left, by class, condition and site."""
    for entry in results["classes"]:
        for condition, values in entry["remaining"].items():
            intervals = entry["ci95"][condition]
            for layer, (value, ci95) in enumerate(zip(values, intervals, strict=True)):
                site = layer_site(layer) if layer else ADAPTER
                of = {"class": entry["class"], "condition": condition}
                yield table_row(site, metric="wrong_patches_left", value=value, interval=ci95, **of)


ANALYSIS = Analysis(
    name="knockout",
    help="block image tokens (Eq. 1) and count the wrong patches that remain (App. C.1), into RUN/knockout.json",
    question="Do correctly classified image tokens pull misclassified ones to the right class in the LLM?",
    options=KnockoutOptions,
    measure=measure,
    complete=complete,
    lines=lines,
    rows=table_rows,
    lacks=lambda run, options: lacks_layers(run),
    title="Knockout",
    section="probes.analyses.knockout.knockout_section:section",
    paper="Sec. 4, App. C.1, Fig. 11",
    in_study={"classes": ("auto:4",)},
    arms=("trained", "random", "permuted", "probes"),
    default=True,
    claims={
        "knockout_incorrect": Claim(
            -1,
            "Blocking the wrong class helps: wrong patches left, minus other tokens blocked",
            against_tokens=True,
        ),
        "knockout_correct": Claim(
            +1,
            "Blocking the right class hurts: wrong patches left, minus other tokens blocked",
            against_tokens=True,
        ),
        "knockout_specificity": Claim(
            +1,
            "The effect is of the class: wrong patches left, right minus wrong class blocked",
            against_tokens=True,
        ),
    },
)
