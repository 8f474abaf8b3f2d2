"""`probes maps`: what the probes see in an image, site by site (Figs. 4, 13) and under knockout (Figs. 6, 12).

maps.json            which images, sites, classes
maps.safetensors     "image/I": uint8[S, H, W]; "knockout/CLASS": uint8[3, L + 1, H, W], the conditions none,
                     incorrect, correct by layer 0..L
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf_loading import error_context
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.analyses.knockout.cases import PatchReader, find_cases
from probes.evaluation.metrics import patch_labels
from probes.models.knockout import Knockout
from probes.ops.bilinear import upsampled_argmax
from probes.results.probe_run import ProbeRun, read_tensors

SHOWN = ("none", "incorrect", "correct")


def maps_of_image(reader: PatchReader, sample: dict, sites: list[str], blocked: Tensor | None = None) -> Tensor:
    """The predicted class of each pixel of an image, uint8[S, H, W].

    Args:
        reader: Model and probes.
        sample: With "image" and "target", of whose size the maps are.
        sites: S sites.
        blocked: bool[T], patches that are knocked out.
    """
    pixels = reader.mllm.preprocess([sample["image"]])
    knockout = None if blocked is None else Knockout(blocked[None])
    states = reader.mllm.states(pixels, sites, knockout)
    logits = torch.stack([reader.heads[site](states[site].float())[0] for site in sites])
    logits = logits.transpose(-1, -2).unflatten(-1, reader.mllm.grid)
    size = sample["target"].shape
    return upsampled_argmax(logits, size, reader.mllm.geometry.view(size)).to(torch.uint8).cpu()


def knockout_maps(run: ProbeRun, reader: PatchReader, name: str) -> tuple[dict, Tensor] | None:
    """Maps by condition and layer of an image in which patches are wrongly predicted class `name`.

    It is the one in which both those patches and the patches that are rightly predicted, and so could help them, are
    most: the largest minimum of the two numbers.

    Returns:
        Which image and classes, and uint8[3, L + 1, H, W]; None if no image is wrongly predicted so.

    Raises:
        UserError: `probes knockout` has not been run for this class.
    """
    facts = run.analysis("knockout.json") or {"classes": []}
    with error_context(run.path / "knockout.json"):
        known = [entry["class"] for entry in facts["classes"]]
    if name not in known:
        raise UserError(f"{run.path} has no knockout of {name!r}; run `probes knockout --probes {run.path}` first")
    tensors = read_tensors(run.path / "knockout.safetensors")
    if f"{name}/patches" not in tensors:
        return None
    both = torch.minimum(tensors[f"{name}/patches"], tensors[f"{name}/anchors"])
    image = tensors[f"{name}/image"][both.argmax()].item()
    sample, classes = run.dataset()[image], run.metrics["classes"]
    target, mllm = torch.from_numpy(sample["target"])[None], reader.mllm
    truth = patch_labels(target, len(classes), mllm.grid, view=mllm.geometry.view(target.shape[1:]))
    predicted = reader.predict(reader.mllm.preprocess([sample["image"]]))
    (case,) = find_cases(predicted, truth, torch.tensor([image]), classes.index(name))
    maps = [maps_of_image(reader, sample, run.layers, case.blocked.get(condition)) for condition in SHOWN]
    facts = {"class": name, "correct_class": classes[case.correct_class], "image": image, "name": sample["name"]}
    return facts, torch.stack(maps)


def run(args: argparse.Namespace) -> None:
    """`probes maps`."""
    run = ProbeRun(args.probes)
    dataset, out = run.dataset(), Path(args.out or args.probes)
    wrong = [i for i in args.image if not 0 <= i < len(dataset)]
    if wrong:
        raise UserError(f"image {wrong[0]} is out of range; the split has images 0..{len(dataset) - 1}")
    with exclusive_run_lock(out, "maps.json"):
        facts = write_maps(run, args.image, args.knockout, out)
    print(f"{out / 'maps.safetensors'}: {len(args.image)} images, {len(facts['knockout'])} knockouts")


def write_maps(run: ProbeRun, images: Sequence[int], classes: Sequence[str], out: Path) -> dict:
    """Writes maps of `images`, and of the knockouts of `classes`, into `out` and returns what maps.json holds."""
    dataset, reader = run.dataset(), PatchReader(run)
    tensors = {f"image/{i}": maps_of_image(reader, dataset[i], run.sites) for i in tqdm(images, desc="maps")}
    cut = [knockout_maps(run, reader, name) for name in classes]
    cut = [found for found in cut if found is not None]
    tensors |= {f"knockout/{facts['class']}": maps for facts, maps in cut}
    facts = {
        "image_attention": run.metrics["image_attention"],
        "runs": [run.fingerprint],
        "sites": run.sites,
        "layers": run.layers,
        "images": [{"index": i, "name": dataset.names[i]} for i in images],
        "knockout": [facts for facts, _ in cut],
    }
    write_files({out / "maps.safetensors": tensors, out / "maps.json": facts})
    return facts
