"""Settings of `probes knockout`."""

from collections.abc import Mapping, Sequence
from typing import Any

from llava_bidir.common.errors import UserError
from probes.models.sites import ADAPTER, layer_site
from probes.runs.probe_run import ProbeRun

from . import KnockoutOptions


def check_has_layers(run: ProbeRun, layers: Sequence[str]) -> None:
    """Raise a `UserError` unless the run has probes at the adapter and at these decoder layers."""
    if missing := [site for site in (ADAPTER, *layers) if site not in run.sites]:
        raise UserError(
            f"{run.path} has no probes at {', '.join(missing)}; a knockout counts wrong patches at the adapter and at "
            "every decoder layer: make the run with these sites too (`--model.sites null` probes all)"
        )


def options_of_run(run: ProbeRun) -> KnockoutOptions:
    """Return the options of a run's knockout.json; the paper's for a run without one."""
    results = run.analysis("knockout.json")
    if results is None:
        return KnockoutOptions(probes=run.path, classes=())
    names = KnockoutOptions(probes=run.path, classes=()).settings
    settings = {name: results[name] for name in names}
    settings["classes"] = tuple(entry["class"] for entry in results["classes"])
    settings["layers"] = None if results["layers"] == "all" else tuple(results["layers"])
    return KnockoutOptions(probes=run.path, **settings)


def cut_layers(results: Mapping[str, Any]) -> Sequence[int]:
    """Return the layers that a knockout cuts, from knockout.json."""
    if results["layers"] != "all":
        return results["layers"]
    return range(1, len(results["sinks"]["layers"]) + 1)


def describe(options: KnockoutOptions) -> str:
    """Return how tokens are blocked if it differs from Eq. 1 as the paper uses it, e.g. "cut in layers 1, 2"."""
    differences = []
    if layers := options.layers:
        numbers = ", ".join(map(str, layers))
        differences.append(f"cut in layer{'s' * (len(layers) > 1)} {numbers} only")
    if options.block_by != ADAPTER:
        differences.append(f"blocked by the predictions at {options.block_by}")
    return "; ".join(differences)


def check_fits(options: KnockoutOptions, run: ProbeRun) -> None:
    """Raise a `UserError` if the options do not fit the run."""
    check_has_layers(run, [layer_site(layer) for layer in range(1, len(run.layers))])
    choices = {
        "class": (options.classes, run.metrics["classes"]),
        "block_by site": ([options.block_by], run.layers),
    }
    for kind, (names, known) in choices.items():
        for name in names:
            if name not in known:
                raise UserError(f"unknown {kind} {name!r}; {run.path} has {', '.join(known)}")
    if repeated := [name for i, name in enumerate(options.classes) if name in options.classes[:i]]:
        raise UserError(f"class {repeated[0]!r} is named twice; its cases would count twice")
    for layer in options.layers or ():
        if not 1 <= layer < len(run.layers):
            raise UserError(
                f"layer {layer} is out of range; {run.path} has layers 1..{len(run.layers) - 1}"
            )
