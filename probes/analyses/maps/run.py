"""`probes maps`: predicted segmentation maps by site (Figs. 4, 13) and under knockout (Figs. 6, 12).

maps.json            images, sites and classes
maps.safetensors     "image/I": uint8[S, H, W]; "knockout/CLASS": uint8[3, L + 1, H, W], conditions none, incorrect,
                     correct by layer 0..L

Of other tasks than segmentation, "image/I" is the prediction, f32[S, H, W] or f32[S, H, W, 3]; there are no knockouts.

Shapes: S sites, T patches, L layers, H W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import exclusive_run_lock, write_files
from probes.analyses.base import check_image
from probes.analyses.knockout.cases import PatchReader, find_cases
from probes.analyses.knockout.config import describe, options_of_run
from probes.analyses.replacement import check_replaceable
from probes.models.knockout import Knockout
from probes.ops.bilinear import upsampled_argmax
from probes.runs.probe_run import ProbeRun
from probes.runs.run_files import read_tensors
from probes.runs.runs import open_run
from probes.score.true_classes import true_classes
from probes.tasks import SEGMENTATION

from . import MapsOptions

MAP_CONDITIONS = ("none", "incorrect", "correct")


def predict_maps(
    reader: PatchReader,
    sample: dict,
    sites: list[str],
    blocked: Tensor | None = None,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Return the predicted class of each pixel of the target at each site, uint8[S, H, W].

    `blocked` are the patches to knock out, bool[T], in decoder layers `layers` (None: all).
    """
    pixels = reader.mllm.preprocess([sample["image"]])
    knockout = None if blocked is None else Knockout(blocked[None], layers)
    states = reader.mllm.states(pixels, sites, knockout)
    logits = []
    for site in sites:
        of_site = reader.probes[site](states[site].float())[0]
        logits.append(of_site.T.unflatten(-1, reader.mllm.grid))
    size = sample["target"].shape
    view = reader.mllm.geometry.view(size)
    maps = upsampled_argmax(torch.stack(logits), size, view)
    return maps.to(torch.uint8).cpu()


def predict_knockout_maps(
    run: ProbeRun, reader: PatchReader, name: str
) -> tuple[dict, Tensor] | None:
    """Return image and classes, and maps by condition and layer, uint8[3, L + 1, H, W], for a wrong class `name`.

    The image has the largest minimum of two counts: the mistaken patches and the anchors that could correct them. None
    if no image has such patches; a `UserError` if `probes knockout` has not been run for this class.
    """
    plan = options_of_run(run)
    if name not in plan.classes:
        raise UserError(
            f"{run.path} has no knockout of {name!r}; run `probes knockout` with --classes {name!r} first"
        )
    tensors = read_tensors(run.path / "knockout.safetensors")
    if f"{name}/patches" not in tensors:
        return None
    usable = torch.minimum(tensors[f"{name}/patches"], tensors[f"{name}/anchors"])
    image = tensors[f"{name}/image"][usable.argmax()].item()
    sample = run.dataset()[image]
    classes = run.metrics["classes"]
    target = torch.from_numpy(sample["target"])[None]
    truth = true_classes(target, len(classes), reader.mllm)
    predicted = reader.predict(reader.mllm.preprocess([sample["image"]]))
    (case,) = find_cases(
        predicted,
        truth,
        torch.tensor([image]),
        classes.index(name),
        run.layers.index(plan.block_by),
        plan.min_patches,
    )
    blocked = [case.blocked.get(condition) for condition in MAP_CONDITIONS]
    maps = [predict_maps(reader, sample, run.layers, tokens, plan.layers) for tokens in blocked]
    entry = {
        "class": name,
        "correct_class": classes[case.correct_class],
        "image": image,
        "name": sample["name"],
    }
    return entry | {"how": describe(plan)}, torch.stack(maps)


def run(options: MapsOptions) -> None:
    """Run `probes maps`."""
    run = open_run(options.probes, options.trust)
    out = options.folder
    if run.task_name != SEGMENTATION and options.classes:
        raise UserError(
            f"{run.path} has probes of the task {run.task_name}, but --classes is about knockouts of classes; "
            "leave it out"
        )
    dataset = run.dataset()
    for image in options.image:
        check_image(image, len(dataset))
    made_from = {
        "runs": [run.fingerprint],
        "image": options.image,
        "classes": options.classes,
    }

    def images_of(results):
        return results | {"image": [entry["index"] for entry in results["images"]]}

    with exclusive_run_lock(out, "maps.json"):
        check_replaceable(out / "maps.json", made_from, options.overwrite, images_of)
        knockouts = []
        tensors = {}
        for i in tqdm(options.image, desc="maps"):
            predicted = run.predict_sites(dataset[i]["image"], run.sites)
            tensors[f"image/{i}"] = torch.from_numpy(predicted)
        reader = PatchReader(run) if options.classes else None
        for name in options.classes:
            if result := predict_knockout_maps(run, reader, name):
                knockouts.append(result[0])
                tensors[f"knockout/{name}"] = result[1]
        results = {
            "image_attention": run.mask,
            "runs": [run.fingerprint],
            "sites": run.sites,
            "layers": run.layers,
            "classes": options.classes,
            "images": [{"index": i, "name": dataset.names[i]} for i in options.image],
            "knockout": knockouts,
        }
        write_files({out / "maps.safetensors": tensors, out / "maps.json": results})
    print(f"{out / 'maps.safetensors'}: images: {len(options.image)}, knockouts: {len(knockouts)}")
