"""What `probes knockout` does to each case."""

from collections.abc import Sequence
from dataclasses import dataclass

from llava_bidir.common.errors import UserError
from probes.models.frozen_mllm import ADAPTER
from probes.results.probe_run import ProbeRun

from .cases import ANCHORS
from .conditions import CONTROLS
from .layer_sweep import places_of


@dataclass(frozen=True)
class Plan:
    """What is done to each case.

    Args:
        classes: The classes c.
        layers: Decoder layers that are cut; None for all.
        labels_from: The site whose predictions say which patches are blocked.
        anchors: Block what is "predicted" a class (Eq. 1), or only the "true" ones of it, see knockout_cases.py.
        min_patches: Images with fewer wrong patches are left out.
        limit: Looks at no more than so many images.
        batch_size: Images, or cases under a condition, of a forward.
        controls: Beside random ones: distance, mass, high_norm.
        draws: Of every condition that draws tokens.
        doses: Fractions of the blocked tokens that are also blocked alone.
        reverse: Also keep only attention to the sets.
        windows: Also cut windows of layers; the width of the sliding ones.
        heads: Also cut each head of each layer by itself.
        attention: Also say where mistaken patches look.
        seed: Of everything drawn, and the bootstrap.
    """

    classes: Sequence[str]
    layers: Sequence[int] | None = None
    labels_from: str = ADAPTER
    anchors: str = "predicted"
    min_patches: int = 1
    limit: int | None = None
    batch_size: int = 64
    controls: Sequence[str] = ()
    draws: int = 5
    doses: Sequence[float] = ()
    reverse: bool = False
    windows: int | None = None
    heads: bool = False
    attention: bool = False
    seed: int = 0

    def check(self, run: ProbeRun) -> None:
        """Raises ValueError where the plan does not fit the run."""
        known = {
            "class": (self.classes, run.metrics["classes"]),
            "labels_from": ([self.labels_from], run.layers),
            "anchors": ([self.anchors], ANCHORS),
            "control": (self.controls, (*CONTROLS[1:], "high_norm")),
        }
        for what, (given, allowed) in known.items():
            for name in given:
                if name not in allowed:
                    raise UserError(f"unknown {what} {name!r}; {run.path} has {', '.join(allowed)}")
        for what, number in (("draws", self.draws), ("min_patches", self.min_patches), ("batch_size", self.batch_size)):
            if number < 1:
                raise UserError(f"{what} must be at least 1, got {number}")
        places_of(self.windows, self.heads, len(run.layers) - 1, 1)
        for layer in self.layers or ():
            if not 1 <= layer < len(run.layers):
                raise UserError(f"layer {layer} is out of range; {run.path} has layers 1..{len(run.layers) - 1}")
        for dose in self.doses:
            if not 0 < dose < 1:
                raise UserError(f"a dose is a fraction between 0 and 1, got {dose:g}")
