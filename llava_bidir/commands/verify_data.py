"""`llava-bidir verify-data`: every record and every image of a training config, before GPU time is spent on them.

Tokenising is what would take long, so a bound decides where it can: a text has at most as many tokens as bytes, and
what fits into `data.max_length` by that needs no tokenizer. Of images only the header is read, unless told otherwise.
"""

import argparse
import functools
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava_bidir.common.errors import UserError
from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import IGNORE_INDEX, IMAGE, check_turns, most_tokens
from llava_bidir.data.image_folder import BadImage, ImageFolder, read_format, read_image
from llava_bidir.data.instruction_dataset import RULES, fingerprint, read_annotations
from llava_bidir.training.cli import build_data_cli

# What is reported, and what training does with it.
KINDS = {
    "broken": "cannot be trained on: `fit` stops",
    "missing": "the image is not there: `fit` stops",
    "corrupt": "the image cannot be read, or not within bounds: `fit` stops",
    "outside": "a symlink leads out of data.images: `fit` stops, unless data.follow_links is true",
    "renamed": "the image is of another format than its name says: read as what it is, of an animation the first frame",
    "too_long": "cut at data.max_length",
    "unsupervised": "no token to train on: counts for nothing",
    "several_images": "one `<image>` a turn is kept, at its front, and each shows the record's one image",
    "image_not_shown": "it has an image but no `<image>`: trained on its text",
    "tag_without_image": "it has `<image>` but no image: trained as text",
}
RECORDS_AT_ONCE = 256
SAVE_EVERY_S = 5.0
SHOWN = 3  # findings of a kind that are printed; the JSON has all


class Checks(Dataset):
    """Findings of records: [{"index", "id", "kind", "detail"}, ...] of a batch of indices.

    Args:
        records: From :func:`.data.instructions.read_annotations`.
        images: What the records' image paths start from.
        collate: What encodes the records in training.
        decode: Decode images instead of reading their headers.
    """

    def __init__(self, records: datasets.Dataset, images: ImageFolder, collate: Collate, decode: bool = False):
        self.records, self.images, self.collate, self.decode = records, images, collate, decode

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        columns = self.records[indices[0] : indices[-1] + 1]  # they follow one another
        findings = []
        for index, *values in zip(indices, *columns.values(), strict=True):
            record = dict(zip(columns, values, strict=True))
            for kind, detail in self.check(record):
                findings.append({"index": index, "id": record["id"], "kind": kind, "detail": detail})
        return findings

    def check(self, record: dict) -> list[tuple[str, str]]:
        """(kind, detail) of each finding about one row of the annotations."""
        if record["problem"]:
            return [("broken", record["problem"])]
        findings = check_tags(record) + self.check_tokens(record)
        if record["image"]:
            findings += check_image(self.images, record["image"], self.decode)
        return findings

    def check_tokens(self, record: dict) -> list[tuple[str, str]]:
        collate, turns, tokenizer = self.collate, record["conversations"], self.collate.processor.tokenizer
        has_image = record["shown"] > 0
        trains, findings = collate.template == "plain" or record["answers"] > 0, []  # `plain` trains a newline at least
        try:
            bound = most_tokens(turns, tokenizer, collate.template, collate.image_tokens if has_image else None)
            if bound > collate.max_length:
                ids, labels = collate.encode_whole(turns, has_image)
                if len(ids) > bound:
                    raise RuntimeError(f"record {record['id']!r}: {len(ids)} tokens, but no more than {bound} expected")
                if len(ids) > collate.max_length:
                    findings.append(("too_long", f"{len(ids)} tokens"))
                trains = any(label != IGNORE_INDEX for label in labels[1 : collate.max_length])
        except ValueError as error:
            return [("broken", str(error))]
        return findings if trains else [*findings, ("unsupervised", f"{record['answers']} answers that are not empty")]


def check_tags(record: dict) -> list[tuple[str, str]]:
    """Whether image and `<image>` go together one to one."""
    tags = sum(turn["value"].count(IMAGE) for turn in check_turns(record["conversations"]))
    if record["image"] and tags == 0:
        return [("image_not_shown", record["image"])]
    if record["image"] and tags > 1:
        return [("several_images", f"{tags} {IMAGE} in {record['shown']} turns")]
    return [("tag_without_image", f"{tags} {IMAGE}")] if tags and not record["image"] else []


def check_image(images: ImageFolder, name: str, decode: bool) -> list[tuple[str, str]]:
    """What is wrong with an image file; `decode` also finds one that is cut off."""
    try:
        path = images.file(name)
        found = read_format(path)
        if decode:
            read_image(path)
    except BadImage as error:
        return [(error.kind, str(error))]
    named = _format_of_suffix(path.suffix.lower())
    if named not in (None, found) and (named, found) != ("JPEG", "MPO"):  # MPO: a JPEG with further pictures behind it
        return [("renamed", f"{path}: {found}, not {named}")]
    return []


@functools.cache
def _format_of_suffix(suffix: str) -> str | None:
    return Image.registered_extensions().get(suffix)


def verify(checks: Checks, key: dict, earlier: dict | None, workers: int, save) -> dict[str, Any]:
    """Checks all records, or those that an earlier, killed run with the same key did not come to.

    Args:
        checks: What to check.
        key: Identifies file and settings.
        earlier: What such a run had saved.
        workers: Processes; 0 checks in this one.
        save: Is given the result so far, now and then.

    Returns:
        {"key", "records", "checked", "seconds", "workers", "records_per_s_per_core", "counts": by kind, "findings"}.
    """
    result = earlier or {"key": key, "records": len(checks), "checked": 0, "seconds": 0.0, "findings": []}
    loader = DataLoader(
        checks,
        batch_size=RECORDS_AT_ONCE,
        sampler=range(result["checked"], len(checks)),
        collate_fn=list,
        num_workers=workers,
    )
    before, start, next_save = result["seconds"], time.perf_counter(), SAVE_EVERY_S
    with tqdm(total=len(checks), initial=result["checked"], unit=" records") as bar:
        for findings in loader:
            result["findings"] += findings
            done = min(RECORDS_AT_ONCE, len(checks) - result["checked"])
            result["checked"] += done
            result["seconds"] = before + time.perf_counter() - start
            bar.update(done)
            if time.perf_counter() - start > next_save:
                saving = time.perf_counter()
                save(_summed(result, workers))
                # with very many findings, saving must not take most of the time
                next_save = time.perf_counter() - start + max(SAVE_EVERY_S, 20 * (time.perf_counter() - saving))
    return _summed(result, workers)


def _summed(result: dict, workers: int) -> dict:
    counts = Counter(finding["kind"] for finding in result["findings"])
    rate = result["checked"] / max(result["seconds"], 1e-9) / max(workers, 1)
    return {
        **{k: v for k, v in result.items() if k != "findings"},
        "workers": workers,
        "records_per_s_per_core": round(rate, 1),
        "counts": {kind: counts[kind] for kind in KINDS},
        "findings": result["findings"],  # last, for it may be long
    }


def readable(result: dict) -> str:
    """The result for people: how many of each kind, and the first of them."""
    seconds, rate = result["seconds"], result["records_per_s_per_core"]
    lines = [
        f"{result['key']['file']['path']}: {result['checked']:,} records in {seconds:.0f} s, {result['workers']} "
        f"processes, {rate:,.0f} records/s per process"
    ]
    for kind, count in result["counts"].items():
        if count:
            lines.append(f"  {count:>9,} {kind}: {KINDS[kind]}")
            of_kind = [finding for finding in result["findings"] if finding["kind"] == kind]
            lines += [f"            record {f['index']} (id {f['id']!r}): {f['detail']}" for f in of_kind[:SHOWN]]
    return "\n".join(lines if len(lines) > 1 else [*lines, "  nothing to report"])


def _save(file: Path, results: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps({"files": results}, indent=1) + "\n")
    partial.replace(file)


def _load(file: Path) -> list[dict]:
    try:
        results = json.loads(file.read_text())["files"]
        if not all(result.keys() >= {"key", "records", "checked", "seconds", "findings"} for result in results):
            raise KeyError
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file} is no result of verify-data; remove it or name another with --json") from None
    return results


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="llava-bidir verify-data",
        description="Checks every record and every image header of data.annotations and data.val_annotations; exit "
        "status 1 if there is anything to report. A killed run goes on where it stopped. All other options are "
        "those of `llava-bidir fit` (-c CONFIG ..., --data.annotations ..., ...).",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the result (OUT/verify-data.json)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (one a core)")
    parser.add_argument("--decode", action="store_true", help="decode every image: also finds files that are cut off")
    args, config = parser.parse_known_args(argv[1:])
    cli = build_data_cli(config)
    data = cli.datamodule
    images = ImageFolder(data.images, data.follow_links)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are parallel already
    file = args.json or Path(cli.trainer.default_root_dir) / "verify-data.json"
    files = [path for path in (data.annotations, data.val_annotations) if path]
    earlier, results = _load(file), []
    if len(earlier) == len(files) and all(r["checked"] == r["records"] for r in earlier):
        earlier = []  # that run was finished: since then, files may have been mended
    for annotations in files:
        records = read_annotations(annotations)
        settings = {"template": data.collate.template, "max_length": data.collate.max_length, "decode": args.decode}
        settings |= {"follow_links": images.follow_links}
        settings |= {"image_tokens": data.collate.image_tokens, "tokenizer": cli.model.hparams.llm, "rules": RULES}
        key = {"file": fingerprint(Path(annotations)), "images": str(images.path.resolve()), **settings}
        results.append(
            verify(
                Checks(records, images, data.collate, args.decode),
                key,
                next((result for result in earlier if result["key"] == key), None),
                args.workers,
                lambda result, done=tuple(results): _save(file, [*done, result]),
            )
        )
        _save(file, results)
        print(readable(results[-1]))
    print(file)
    if any(result["findings"] for result in results):
        raise SystemExit(1)
