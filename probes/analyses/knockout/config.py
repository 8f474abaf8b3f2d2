"""Settings of `probes knockout`."""

from collections.abc import Sequence

from llava_bidir.common.errors import UserError, error_context
from probes.analyses.options import check_ranges
from probes.models.sites import ADAPTER, layer_site
from probes.results.probe_run import ProbeRun

from . import KnockoutOptions
from .layer_sweep import cut_locations
from .schema import CONTROLS


def check_has_layers(run: ProbeRun, layers: Sequence[str]) -> None:
    """Raise a `UserError` unless the run has probes at the adapter and at these decoder layers."""
    if missing := [site for site in (ADAPTER, *layers) if site not in run.sites]:
        raise UserError(
            f"{run.path} has no probes at {', '.join(missing)}; a knockout counts wrong patches at the adapter and at "
            "every decoder layer: make the run with these sites too (`--model.sites null` probes all)"
        )


class KnockoutPlan(KnockoutOptions):
    """The options of a knockout, which fit a run."""

    @classmethod
    def of_run(cls, run: ProbeRun) -> "KnockoutPlan":
        """Return the plan of a run's knockout.json; the paper's for a run without one."""
        results = run.analysis("knockout.json")
        if results is None:
            return cls(classes=())
        with error_context(run.path / "knockout.json"):
            settings = {name: results[name] for name in cls.__dataclass_fields__}
            settings["classes"] = [entry["class"] for entry in results["classes"]]
            return cls(
                **settings | {"layers": None if results["layers"] == "all" else results["layers"]}
            )

    def describe(self) -> str:
        """Return how tokens are blocked if it differs from Eq. 1 as the paper uses it, e.g. "cut in layers 1, 2"."""
        differences = []
        if self.layers is not None:
            differences.append(
                f"cut in layer{'s' * (len(self.layers) > 1)} {', '.join(map(str, self.layers))} only"
            )
        if self.block_by != ADAPTER:
            differences.append(f"blocked by the predictions at {self.block_by}")
        return "; ".join(differences)

    def check(self, run: ProbeRun) -> None:
        """Raise a `UserError` if the plan does not fit the run."""
        check_has_layers(run, [layer_site(layer) for layer in range(1, len(run.layers))])
        choices = {
            "class": (self.classes, run.metrics["classes"]),
            "block_by site": ([self.block_by], run.layers),
            "control": (self.controls, CONTROLS[1:]),
        }
        for kind, (names, known) in choices.items():
            for name in names:
                if name not in known:
                    raise UserError(f"unknown {kind} {name!r}; {run.path} has {', '.join(known)}")
        if repeated := [name for i, name in enumerate(self.classes) if name in self.classes[:i]]:
            raise UserError(f"class {repeated[0]!r} is named twice; its cases would count twice")
        check_ranges(self)
        cut_locations(self.layer_windows, len(run.layers) - 1)
        for layer in self.layers or ():
            if not 1 <= layer < len(run.layers):
                raise UserError(
                    f"layer {layer} is out of range; {run.path} has layers 1..{len(run.layers) - 1}"
                )
