"""`probes explore`: a page on which a person walks through images, layers and knockouts. (explorer.html.j2)

OUT/explorer.html    everything; needs no network and no other file

Readings are many: for an image of 576 patches 576 x 34 sites x 6 bytes of classes, and more of words, under each
condition of each run. So each (run, image, condition) is a block of bytes of its own, deflated, in base64, which the
page unpacks when it is looked at. In a block, one byte a patch and without gaps, lie

    truth         [T]           class, 255 where unlabelled
    blocked       [T]           1 where hidden from the others
    classes       [k, S, T]     the most probable first
    their share   [k, S, T]     probability in 1/255
    words         [P, m, W, T]  index into the page's table of words, P bytes, the lowest first
    their share   [m, W, T]

Shapes: T patches, S sites, W of them with words, k classes, m words.
"""

import argparse
import base64
import io
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.analyses.logit_lens import ImageReadout, PatchReadout, RunReadout, explore
from probes.data.palette import palette_of
from probes.report.templates import render
from probes.results.probe_run import ProbeRun

PICTURE_PX = 448  # the longer side of an image on the page
UNLABELLED = 255
LARGE_MB = 50  # a page beyond it takes seconds to open; Chromium opens 50 MB in about one


def block(truth: Tensor, reading: PatchReadout, index: Tensor, planes: int) -> bytes:
    """The bytes of one reading, laid out as above, not yet deflated.

    Args:
        truth: long[T], -1 where unlabelled.
        reading: What is read under one condition.
        index: long[V], token id -> index into the table of words.
        planes: P.
    """
    words = index[reading.words]
    parts = [
        torch.where(truth < 0, UNLABELLED, truth),
        reading.blocked,
        reading.classes,
        (255 * reading.class_probabilities).round(),
        *(words >> 8 * plane & 255 for plane in range(planes)),
        (255 * reading.word_probabilities).round(),
    ]
    return b"".join(part.to(torch.uint8).numpy().tobytes() for part in parts)


def page_data(explored: list[RunReadout]) -> tuple[dict[str, Any], dict[str, str]]:
    """What the page is told at once, and its blocks by "RUN-IMAGE-CONDITION" (counted from 0)."""
    first = explored[0].run
    dataset = first.dataset()
    table, indices = _word_table(explored)
    planes = max(1, (len(table) - 1).bit_length() + 7 >> 3)
    blocks = {}
    for r, of_run in enumerate(explored):
        for i, seen in enumerate(of_run.images):
            for c, reading in enumerate(seen.readings.values()):
                raw = block(seen.truth, reading, indices[r], planes)
                blocks[f"{r}-{i}-{c}"] = base64.b64encode(zlib.compress(raw, 9)).decode()
    data = {
        "classes": first.metrics["classes"],
        "palette": palette_of(dataset).tolist(),
        "words": table,
        "planes": planes,
        "images": [_picture(dataset[seen.image]) | {"index": seen.image} for seen in explored[0].images],
        "runs": [_run_facts(of_run, label) for of_run, label in zip(explored, labels(explored), strict=True)],
    }
    return data, blocks


def _run_facts(explored: RunReadout, label: str) -> dict[str, Any]:
    run, example = explored.run, next(iter(explored.images[0].readings.values()))
    return {
        "label": label,
        "grid": run.metrics["grid"],
        "sites": explored.sites,
        "word_sites": explored.word_sites,
        "top": [len(example.classes), len(example.words)],
        "seen": [
            {"box": seen.box, "conditions": [describe(c, seen, run.metrics["classes"]) for c in seen.readings]}
            for seen in explored.images
        ],
    }


def describe(condition: str, seen: ImageReadout, classes: list[str]) -> dict[str, str]:
    """A condition's name, and in words what is hidden under it."""
    if condition == "none":
        return {"name": "none", "label": "nothing hidden"}
    wrong, correct = (f"“{classes[k]}”" for k in (seen.case.wrong_class, seen.case.correct_class))
    label = {
        "incorrect": f"{wrong} hidden (wrong)",
        "correct": f"{correct} hidden (right)",
        "random_incorrect": f"as many as {wrong}, at random",
        "random_correct": f"as many as {correct}, at random",
    }[condition]
    why = f"Patches wrongly called {wrong} at the adapter: {seen.case.patches}; most of them are {correct}."
    return {"name": condition, "label": label, "why": why}


def labels(explored: list[RunReadout]) -> list[str]:
    """What each run is called: its mask, and what else it takes to tell it from the others."""
    plain = [
        of_run.run.metrics["image_attention"] + (", untrained" if of_run.run.metrics["untrained"] else "")
        for of_run in explored
    ]
    return [f"{name}, {x.run.path}" if plain.count(name) > 1 else name for name, x in zip(plain, explored, strict=True)]


def _word_table(explored: list[RunReadout]) -> tuple[list[str], list[Tensor]]:
    """All words, the most frequent first so that most indices are small; and by run long[V], token id -> index."""
    count = Counter()
    for of_run in explored:
        for seen in of_run.images:
            for reading in seen.readings.values():
                ids, times = reading.words.unique(return_counts=True)
                for i, n in zip(ids.tolist(), times.tolist(), strict=True):
                    count[of_run.vocabulary[i]] += n
    table = sorted(count, key=lambda word: (-count[word], word))
    place = {word: i for i, word in enumerate(table)}
    indices = [torch.zeros(max(of_run.vocabulary, default=0) + 1, dtype=torch.long) for of_run in explored]
    for index, of_run in zip(indices, explored, strict=True):
        for token, word in of_run.vocabulary.items():
            index[token] = place[word]
    return table, indices


def _picture(sample: dict) -> dict[str, Any]:
    """An image of a dataset as a small JPEG."""
    image: Image.Image = sample["image"].convert("RGB")
    size = image.size
    image.thumbnail((PICTURE_PX, PICTURE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"name": sample["name"], "source": source, "width": size[0], "height": size[1]}


def write_page(explored: list[RunReadout], out: str | Path) -> Path:
    """Writes OUT/explorer.html and returns its path; a reader sees the whole file or none."""
    out = Path(out)
    data, blocks = page_data(explored)
    runs = [of_run.run for of_run in explored]
    write_files({out / "explorer.html": render("explorer/explorer.html.j2", data=data, blocks=blocks, runs=runs)})
    return out / "explorer.html"


def run(args: argparse.Namespace) -> None:
    """`probes explore`."""
    runs = [ProbeRun(path) for path in args.runs]
    for run in runs[1:]:
        runs[0].check_same_images(run, "; explore them apart")
    how = {
        "conditions": args.conditions,
        "classes": args.classes,
        "top_classes": args.top_classes,
        "top_words": args.top_words,
        "word_sites": args.word_sites,
        "seed": args.seed,
    }
    with exclusive_run_lock(Path(args.out), "explorer.html"):
        path = write_page([explore(run, args.images, **how) for run in runs], args.out)
    size_mb = path.stat().st_size / 1e6
    print(f"{path}: {len(args.images)} images, {size_mb:.1f} MB")
    if size_mb > LARGE_MB:
        print("That is a lot to send: --word-sites, --top-words, --conditions or fewer images make it smaller.")
