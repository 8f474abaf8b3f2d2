"""`probes maps`: predicted segmentation maps by site (Figs. 4, 13) and under knockout (Figs. 6, 12).

    maps.json          sites, layers, images, classes, and the image of each knockout
    maps.safetensors   "image/I": uint8[S, H, W]; "knockout/CLASS": uint8[3, L + 1, H, W], conditions none, incorrect,
                       correct by layer 0..L

Of other tasks than segmentation, "image/I" is the prediction, f32[S, H, W] or f32[S, H, W, 3]; there are no knockouts.

Shapes: S sites, L layers, H W pixels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from llava_bidir.common.cli import Indices
from llava_bidir.common.errors import UserError
from probes.analyses.analysis import Analysis, Result, RunOptions, check_images

if TYPE_CHECKING:  # this module answers `probes --help`
    from PIL.Image import Image
    from torch import Tensor

    from probes.runs.read import ProbeRun


@dataclass(frozen=True, kw_only=True)
class MapsOptions(RunOptions):
    """What to show.

    Args:
        image: Indices in the validation split.
        classes: Classes in RUN/knockout.json to show under knockout.
    """

    image: Indices = (0,)
    classes: tuple[str, ...] = ()


def complete(run: "ProbeRun", options: MapsOptions) -> MapsOptions:
    """Raise a UserError if there are classes, but the run is of another task than segmentation."""
    if options.classes and "classes" not in run.metrics:
        raise UserError(
            f"{run.path} has probes of the task {run.task_name}, but --classes is about knockouts of classes; "
            "leave it out"
        )
    return options


def measure(run: "ProbeRun", options: MapsOptions) -> Result:
    """Return the maps of the images at all sites, and of one image for each class under knockout."""
    import torch

    dataset = run.dataset()
    check_images(options.image, len(dataset))
    tensors = {}
    for i in options.image:
        predicted = run.predict_sites(dataset[i]["image"], run.sites)
        tensors[f"image/{i}"] = torch.from_numpy(predicted)
    knockouts = []
    for name in options.classes:
        case, maps = knockout_maps(run, name)
        if case:
            knockouts.append(case)
            tensors[f"knockout/{name}"] = maps
    rows = {
        "sites": run.sites,
        "layers": run.layers,
        "classes": options.classes,
        "images": [{"index": i, "name": dataset.names[i]} for i in options.image],
        "knockout": knockouts,
    }
    return Result(rows, tensors)


KnockoutCase = TypedDict(
    "KnockoutCase",
    {
        "class": str,  # the wrong one, which is blocked
        "correct_class": str,
        "image": int,
        "name": str,
        "layers": list[int] | None,
        "block_by": str,
    },
)


def knockout_maps(run: "ProbeRun", name: str) -> tuple[KnockoutCase | None, "Tensor | None"]:
    """Return image and classes, and maps by condition and layer, uint8[3, L + 1, H, W], for a wrong class `name`.

    The image has the largest minimum of two counts: the mistaken patches and the anchors that could correct them. Both
    are None if no image has such patches.

    Raises:
        UserError: `probes knockout` has not been run for this class.
    """
    import torch

    from probes.runs.files import read_tensors

    results = run.analysis("knockout.json")
    if results is None or name not in results["options"]["classes"]:
        raise UserError(
            f"{run.path} has no knockout of {name!r}; run `probes knockout` with --classes {name!r} first"
        )
    options = results["options"]
    cases = read_tensors(run.path / "knockout.safetensors")
    if f"{name}/patches" not in cases:
        return None, None
    usable = torch.minimum(cases[f"{name}/patches"], cases[f"{name}/anchors"])
    case = usable.argmax()
    image = cases[f"{name}/image"][case].item()
    correct = cases[f"{name}/correct_class"][case].item()
    sample = run.dataset()[image]
    maps = _maps_of_conditions(run, sample["image"], name=name, correct=correct, options=options)
    entry = {
        "class": name,
        "correct_class": run.metrics["classes"][correct],
        "image": image,
        "name": sample["name"],
        "layers": options["layers"],
        "block_by": options["block_by"],
    }
    return entry, maps


def _maps_of_conditions(
    run: "ProbeRun", image: "Image", name: str, correct: int, options: dict[str, Any]
) -> "Tensor":
    """Return the maps of an image with nothing, the wrong class `name`, and the correct class blocked, in order."""
    import torch

    from probes.models.knockout import knockout_of

    site = options["block_by"]
    mllm, probes = run.loaded
    states = mllm.states(mllm.preprocess(image), [site])
    predicted = probes[site](states[site].float()).argmax(-1).cpu()
    knockouts = [None]
    for blocked_class in (run.metrics["classes"].index(name), correct):
        knockouts.append(knockout_of(predicted == blocked_class, options["layers"]))
    maps = [run.predict_sites(image, run.layers, knockout) for knockout in knockouts]
    return torch.stack([torch.from_numpy(of_condition) for of_condition in maps])


ANALYSIS = Analysis(
    name="maps",
    help="predict maps by site (Figs. 4, 13) and under knockout (Figs. 6, 12), into RUN/maps.safetensors",
    question="What do the probes predict on single images, layer by layer? Illustrations, no evidence.",
    options=MapsOptions,
    measure=measure,
    complete=complete,
    title="Maps",
    section="probes.analyses.maps.maps_section:section",
    paper="Figs. 4, 6, 12, 13",
    in_study={"image": (0, 1, 2, 3)},
    arms=("trained", "probes"),
    reads=("knockout",),
    of_encoders=True,
    of_any_task=True,
)
