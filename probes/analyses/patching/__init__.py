"""`probes patching`: replace states of image tokens at one layer by those of another image, and read what follows.

An object's tokens are those of the class with the most patches in an image. At each layer from 0, the adapter, to the
one before the read-out, their states are replaced by those of another image of the split, drawn at random, at the same
tokens and layer. The probe of the read-out site then gives the log-odds of each labelled patch's true class, log p / (1
- p), in nats. The change against the image's own forward is averaged per image over the labelled patches of the object
("patched") and over all others ("others"): what the object's tokens have passed on after that layer. The control
replaces as many random tokens outside of the object ("random"); its "others", and those of the object in the
difference, are the patches in neither.

    patching.json          "site", "layers", "images", "total": {"value", "ci95"}, and by group [{"layer", "value",
                           "ci95"}], whose intervals hold for all layers together
    patching.safetensors   "total" f[N]: the other image's states minus the own ones, over all labelled patches
                           "patched", "others", "random", "difference" f[N, L], NaN without patches

The paper makes no claim about them; they are exploratory. Shapes: N images, L layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llava_bidir.common.cli import Count, Indices, Seed
from llava_bidir.common.errors import UserError
from probes.analyses.analysis import Analysis, PlannedRun, Result, RunOptions
from probes.models.sites import ADAPTER, FINAL_NORM, is_layer, layer_number, layer_site

if TYPE_CHECKING:  # this module answers `probes --help`
    from probes.runs.read import ProbeRun

    from .patch import PatchingResults

GROUPS = ("patched", "others", "random", "difference")


@dataclass(frozen=True, kw_only=True)
class PatchingOptions(RunOptions):
    """What to patch.

    Args:
        site: Site of the read-out (default: the run's best decoder layer).
        layers: Layers whose states are replaced, 0 for the adapter (default: all before the read-out).
        limit: Number of images to read (default: all).
        draws: Draws to average for each condition with random tokens.
        batch_size: Images per forward.
        seed: Random seed of the other images, the random tokens and the bootstrap.
    """

    site: str | None = None
    layers: Indices | None = None
    limit: Count | None = None
    draws: Count = 3
    batch_size: Count = 16
    seed: Seed = 0

    @property
    def places(self) -> list[str]:
        """Sites whose states are replaced."""
        return [layer_site(layer) if layer else ADAPTER for layer in self.layers]


def lacks(run: PlannedRun, options: Mapping[str, Any]) -> str:
    """Return "no probe after the adapter" if a planned run has none to read out; "" if it has."""
    later = [site for site in run.sites if is_layer(site) or site == FINAL_NORM]
    return "" if later else "no probe after the adapter, which is the read-out (model.sites)"


def complete(run: "ProbeRun", options: PatchingOptions) -> PatchingOptions:
    """Return the options with the site and the layers that are their defaults for a run.

    Raises:
        UserError: There is no such site, or a layer is not before the read-out.
    """
    site = run.check_site(options.site)
    before = 0
    if is_layer(site):
        before = layer_number(site)
    elif site == FINAL_NORM:
        before = layer_number(run.last_layer) + 1
    if not before:
        raise UserError(
            f"no layer is before the read-out {site}; name a decoder layer or final_norm by --site"
        )
    layers = tuple(sorted({*(options.layers or range(before))}))
    if wrong := [layer for layer in layers if layer >= before]:
        raise UserError(
            f"--layers {wrong[0]} is not before the read-out {site}; expected 0 to {before - 1}"
        )
    return replace(options, site=site, layers=layers)


def measure(run: "ProbeRun", options: PatchingOptions) -> Result:
    """Return the changes of all images, and their means."""
    from .patch import Experiment, other_images, patching_effects

    dataset = run.dataset()
    mllm = run.mllm()
    experiment = Experiment(mllm, run.probes()[options.site].to(mllm.device), options)
    images = range(len(dataset))[: options.limit]
    others = other_images(len(dataset), options.seed)

    def compute(indices):
        return experiment.patch(
            {i: dataset[i] for i in indices}, [dataset[others[i]]["image"] for i in indices]
        )

    tensors = ANALYSIS.in_batches(
        run, options=options, items=images, size=options.batch_size, compute=compute
    )
    rows = {"site": options.site, "layers": options.layers}
    return Result(rows | patching_effects(tensors, options, run.groups), tensors)


def lines(results: "PatchingResults") -> Iterator[str]:
    """Yield the effects at other tokens than the patched ones, by layer."""
    from probes.score.estimate import estimate_text

    total = estimate_text(results["total"], "+.3f")
    yield f"other image's states at {results['site']}, {results['images']} images: {total} nats"
    for group in ("others", "difference"):
        for place in results.get(group, ()):
            yield f"  layer {place['layer']:>2}, {group}: {estimate_text(place, '+.3f')}"


ANALYSIS = Analysis(
    name="patching",
    help="replace an object's states at one layer by another image's, and read what follows, into RUN/patching.json",
    question="In which layers do tokens receive what they need from others, and at which do others still read it?",
    options=PatchingOptions,
    measure=measure,
    complete=complete,
    lines=lines,
    lacks=lacks,
    title="Patching",
    section="probes.analyses.patching.patching_section:section",
)
