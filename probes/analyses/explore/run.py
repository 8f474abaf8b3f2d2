"""`probes explore`: an interactive page of images, layers and knockouts, rendered from explorer.html.j2.

OUT/explorer.html    the page; needs no network and no other file

The data are large: an image of 576 patches has 576 x 34 sites x 6 bytes of classes per condition and run, plus words.
Each (run, image, condition) is therefore a separate block, deflated and in base64, which the page unpacks on demand. A
block has one byte per value and no padding:

    truth         [T]           class, 255 if unlabelled
    blocked       [T]           1 if no other patch attends to this one
    classes       [k, S, T]     most probable first
    their share   [k, S, T]     probability in 1/255
    words         [P, m, W, T]  index into the page's table of words, in P byte planes, lowest first
    their share   [m, W, T]

Shapes: T patches, S sites, W of them with words, k classes, m words.
"""

import base64
import io
import zlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.analyses.base import check_has_llm
from probes.analyses.templates import render
from probes.data.palette import palette_of
from probes.results.comparable import check_same_images
from probes.results.probe_run import ProbeRun
from probes.results.study import model_name

from . import ExploreOptions
from .readout import ImageReadout, PatchReadout, RunReadout, explore

IMAGE_PX = 448  # longer side of an image on the page
UNLABELLED = 255
LARGE_MB = 50  # size above which the command warns; Chromium opens 50 MB in about one second


def pack_readout(
    truth: Tensor,
    readout: PatchReadout,
    word_index: Tensor,
    planes: int,
) -> bytes:
    """Return the block of one condition in the layout above, before compression.

    `truth` is long[T], -1 if unlabelled; `word_index` long[V], token id -> index into the table of words.
    """
    words = word_index[readout.words]
    parts = [
        torch.where(truth < 0, UNLABELLED, truth),
        readout.blocked,
        readout.classes,
        (255 * readout.class_probabilities).round(),
        *(words >> 8 * plane & 255 for plane in range(planes)),
        (255 * readout.word_probabilities).round(),
    ]
    return b"".join(part.to(torch.uint8).numpy().tobytes() for part in parts)


def page_data(explored: list[RunReadout]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the JSON data of the page, and its blocks by "RUN-IMAGE-CONDITION" (counted from 0)."""
    first = explored[0].run
    dataset = first.dataset()
    table, indices = _word_table(explored)
    planes = max(1, (len(table) - 1).bit_length() + 7 >> 3)
    blocks = {}
    for r, run_readout in enumerate(explored):
        for i, image in enumerate(run_readout.images):
            for c, readout in enumerate(image.readings.values()):
                raw = pack_readout(image.truth, readout, indices[r], planes)
                blocks[f"{r}-{i}-{c}"] = base64.b64encode(zlib.compress(raw, 9)).decode()
    data = {
        "classes": first.metrics["classes"],
        "palette": palette_of(dataset).tolist(),
        "words": table,
        "planes": planes,
        "images": [
            _encode_image(dataset[i.image]) | {"index": i.image} for i in explored[0].images
        ],
        "runs": [_run_data(*pair) for pair in zip(explored, run_labels(explored), strict=True)],
    }
    return data, blocks


def _run_data(explored: RunReadout, label: str) -> dict[str, Any]:
    run = explored.run
    example = next(iter(explored.images[0].readings.values()))
    return {
        "label": label,
        "grid": run.metrics["grid"],
        "sites": explored.sites,
        "word_sites": explored.word_sites,
        "top_counts": [len(example.classes), len(example.words)],
        "images": [
            {
                "grid_box": i.box,
                "conditions": [describe_condition(c, i, explored) for c in i.readings],
            }
            for i in explored.images
        ],
    }


def describe_condition(condition: str, image: ImageReadout, explored: RunReadout) -> dict[str, str]:
    """Return a condition's name, a label that says what is blocked, and a note on the choice of the classes."""
    if condition == "none":
        return {"name": "none", "label": "no blocking"}
    classes = explored.run.metrics["classes"]
    wrong = f"“{classes[image.case.wrong_class]}”"
    correct = f"“{classes[image.case.correct_class]}”"
    label = {
        "incorrect": f"{wrong} blocked (wrong class)",
        "correct": f"{correct} blocked (correct class)",
        "random_incorrect": f"as many random patches as {wrong}",
        "random_correct": f"as many random patches as {correct}",
    }[condition]
    note = f"Patches wrongly predicted as {wrong} at the adapter: {image.case.patches}; most of them are {correct}."
    note += f" As in the run's knockout: {explored.how}." if explored.how else ""
    return {
        "name": condition,
        "label": label,
        "note": note,
    }


def run_labels(explored: list[RunReadout]) -> list[str]:
    """Return a unique label per run: its mask, "untrained" if it is, and its path if two runs have the same label."""
    runs = [run_readout.run for run_readout in explored]
    short = [run.mask + (", untrained" if run.metrics["untrained"] else "") for run in runs]
    return [
        f"{name}, {run.path}" if short.count(name) > 1 else name
        for name, run in zip(short, runs, strict=True)
    ]


def _word_table(explored: list[RunReadout]) -> tuple[list[str], list[Tensor]]:
    """Return all words, most frequent first so that most indices are small, and per run long[V], token id -> index."""
    frequency: Counter[str] = Counter()
    for run in explored:
        for image in run.images:
            for readout in image.readings.values():
                frequency.update(
                    run.vocabulary[token] for token in readout.words.flatten().tolist()
                )
    table = sorted(frequency, key=lambda word: (-frequency[word], word))
    index_of = {word: i for i, word in enumerate(table)}
    indices = [
        torch.zeros(max(run.vocabulary, default=0) + 1, dtype=torch.long) for run in explored
    ]
    for index, run in zip(indices, explored, strict=True):
        for token, word in run.vocabulary.items():
            index[token] = index_of[word]
    return table, indices


def _encode_image(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a sample's image as a small JPEG in a data URL, with its name and original size."""
    image: Image.Image = sample["image"].convert("RGB")
    size = image.size
    image.thumbnail((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {
        "name": sample["name"],
        "source": source,
        "width": size[0],
        "height": size[1],
    }


def write_page(explored: list[RunReadout], out: str | Path) -> Path:
    """Write OUT/explorer.html atomically and return its path."""
    out = Path(out)
    data, blocks = page_data(explored)
    runs = [run_readout.run for run_readout in explored]
    model = ", ".join(dict.fromkeys(model_name(run) for run in runs))
    page = render(
        "analyses/explore/explorer.html.j2",
        data=data,
        blocks=blocks,
        model=model,
        runs=runs,
    )
    write_files({out / "explorer.html": page})
    return out / "explorer.html"


def run(options: ExploreOptions) -> None:
    """Run `probes explore`."""
    runs = [ProbeRun(path) for path in options.runs]
    for run in runs:
        check_has_llm(run, "explore")
    for run in runs[1:]:
        check_same_images(runs[0], run, "; explore them separately")
    shown = asdict(options)
    del shown["runs"], shown["out"]
    with exclusive_run_lock(options.out, "explorer.html"):
        path = write_page([explore(run, **shown) for run in runs], options.out)
    size_mb = path.stat().st_size / 1e6
    print(
        f"{path}: {len(options.images)} image{'s' * (len(options.images) != 1)}, {size_mb:.1f} MB"
    )
    if size_mb > LARGE_MB:
        print(
            "The page is large; reduce it with --word-sites, --top-words, --conditions or fewer --images."
        )
