"""`llava-bidir verify-data`: check every record and image of a training config before using GPU time.

Tokenising is slow, so records that cannot exceed `data.max_length` by a bound on their tokens are not tokenised. Only
image headers are read, unless `--decode` is set.
"""

import functools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava_bidir.common.atomic_io import check_suffix, read_json, write_files
from llava_bidir.common.errors import UserError
from llava_bidir.common.loader_workers import usable_cores, worker_options
from llava_bidir.common.usage_errors import ArgumentParser, natural
from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import IGNORE_INDEX, token_upper_bound
from llava_bidir.data.image_folder import BadImage, ImageFolder, read_header, read_image
from llava_bidir.data.instruction_dataset import (
    LATE_IMAGES,
    fingerprint,
    has_first_answer,
    image_names,
    keys_like_image,
    read_annotations,
)
from llava_bidir.data.json_stream import LOST
from llava_bidir.data.shared_images import describe_shared, shared_images
from llava_bidir.training.cli import build_data_cli

# Kinds of findings, and what training does with such records.
KINDS = {
    "broken": "the record cannot be trained on: `fit` stops",
    "missing": "the image does not exist: `fit` stops",
    "corrupt": "the image cannot be read or is too large: `fit` stops",
    "outside": "a symlink leads out of data.images: `fit` stops, unless data.follow_links is true",
    "renamed": "the image format differs from the suffix: read by its content, the first frame of an animation",
    "too_long": "truncated to data.max_length",
    "unsupervised": "no token to train on: the sample does not count",
    "unanswered": "no first answer to compare with: `fit` and `validate` stop",
    "unread_image": "the image is under a key that is not read: trained as text",
    "placeholder_without_image": "there is no image: `<image>` is trained as ordinary text",
    "image_without_placeholder": "no `<image>` in the text: the image is not shown",
    "lost_characters": "the text has U+FFFD, or half of a surrogate pair, where a character was lost: trained as such",
    "image_in_answer": "`<image>` in an answer: the image is shown there, too, as in LLaVA",
    "image_after_answer": "the answer is seen by tokens that predict it: `fit` stops under this mask",
}
# What is worth knowing, but no fault: it does not change the exit status.
NOTES = {
    "rotated": "EXIF orientation: trained as stored, as in LLaVA, while viewers show it turned",
}
RECORDS_PER_BATCH = 256
EXAMPLES = 3  # printed findings per kind; the JSON contains all


class RecordFindings(Dataset):
    """Findings and notes per record: a list of {"index", "id", "kind", "detail"}.

    Args:
        records: From :func:`llava_bidir.data.instruction_dataset.read_annotations`.
        images: Folder of the records' images.
        collate: Encodes the records in training.
        decode: Decode images instead of reading their headers.
        image_attention: Mask of the training.
        is_validation: The records are questions, whose first answers are compared.
    """

    def __init__(
        self,
        records: datasets.Dataset,
        images: ImageFolder,
        collate: Collate,
        decode: bool = False,
        image_attention: str = "causal",
        is_validation: bool = False,
    ):
        self.is_validation = is_validation
        self.records = records
        self.images = images
        self.collate = collate
        self.decode = decode
        self.late_images = LATE_IMAGES.get(image_attention)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        record = self.records[index]
        findings = self.check(record)
        return [
            {
                "index": index,
                "id": record["id"],
                "kind": kind,
                "detail": detail,
            }
            for kind, detail in findings
        ]

    def check(self, record: dict) -> list[tuple[str, str]]:
        """Return (kind, detail) of each finding about a record."""
        if record["problem"]:
            return [("broken", record["problem"])]
        if self.is_validation and not has_first_answer(record["conversations"]):
            return [("unanswered", f"{record['answers']} answers that are not empty")]
        findings = self.check_tokens(record) + check_placeholders(record)
        lost = sum(turn["value"].count(LOST) for turn in record["conversations"])
        if lost:
            findings.append(("lost_characters", f"{lost} characters"))
        if self.late_images and record[self.late_images]:
            findings.append(("image_after_answer", f"{record[self.late_images]} answers"))
        if record["shown"]:  # training reads no other image
            findings += check_image(self.images, record["image"], self.decode)
        return findings

    def check_tokens(self, record: dict) -> list[tuple[str, str]]:
        """Return findings about the number of tokens and of supervised tokens."""
        collate = self.collate
        turns = record["conversations"]
        tokenizer = self.collate.processor.tokenizer
        has_image = record["shown"] > 0
        # `plain` supervises at least a newline
        is_supervised = collate.template == "plain" or record["answers"] > 0
        findings = []
        try:
            bound = token_upper_bound(
                turns, tokenizer, collate.template, collate.image_tokens if has_image else None
            )
            if bound > collate.max_length:
                ids, labels = collate.encode_untruncated(turns, has_image)
                if len(ids) > collate.max_length:
                    findings.append(("too_long", f"{len(ids)} tokens"))
                is_supervised = any(
                    label != IGNORE_INDEX for label in labels[1 : collate.max_length]
                )
        except UserError as error:
            return [("broken", str(error))]
        if not is_supervised:
            findings.append(("unsupervised", f"{record['answers']} answers that are not empty"))
        return findings


def check_placeholders(record: dict) -> list[tuple[str, str]]:
    """Return findings about images and `<image>` in the text that do not belong to each other."""
    if record["in_answers"]:
        return [("image_in_answer", f"{record['in_answers']} answers")]
    if record["shown"]:
        return []
    if record["image"]:
        return [
            (
                "image_without_placeholder",
                f"{record['image']!r}; {record['placeholders']} in another spelling",
            )
        ]
    unread = keys_like_image(record)
    if unread:
        return [
            ("unread_image", f"key {', '.join(map(repr, unread))}; expected 'image' with one path")
        ]
    if record["placeholders"]:
        return [("placeholder_without_image", f"{record['placeholders']} turns")]
    return []


def check_image(images: ImageFolder, name: str, decode: bool) -> list[tuple[str, str]]:
    """Return the findings about an image file; `decode` also detects truncated files."""
    try:
        path = images.file(name)
        actual, tag = read_header(path)
        if decode:
            read_image(path)
    except BadImage as error:
        return [(error.kind, str(error))]
    found = [] if tag == 1 else [("rotated", f"{path}: orientation {tag}")]
    expected = _format_of_suffix(path.suffix.lower())
    # MPO: a JPEG with further images
    if expected not in (None, actual) and (expected, actual) != ("JPEG", "MPO"):
        found.append(("renamed", f"{path}: {actual}, not {expected}"))
    return found


@functools.cache
def _format_of_suffix(suffix: str) -> str | None:
    return Image.registered_extensions().get(suffix)


def find_problems(dataset: RecordFindings, workers: int) -> list[dict[str, Any]]:
    """Return the findings about all records, checked in `workers` processes; 0 checks in this process."""
    loader = DataLoader(
        dataset,
        batch_size=RECORDS_PER_BATCH,
        collate_fn=list,
        **worker_options(workers),
    )
    with tqdm(total=len(dataset), unit=" records") as bar:
        findings = []
        for batch in loader:
            findings += [finding for record in batch for finding in record]
            bar.update(len(batch))
    return findings


def format_result(result: dict) -> str:
    """Return the number of findings per kind and the first of each kind as text."""
    lines = [f"{result['file']['path']}: {result['records']:,} records"]
    for kind, meaning in (KINDS | NOTES).items():
        if not result["counts"][kind]:
            continue
        lines.append(f"  {result['counts'][kind]:>9,} {kind}: {meaning}")
        examples = [finding for finding in result["findings"] if finding["kind"] == kind][:EXAMPLES]
        lines += [
            f"            record {f['index']} (id {f['id']!r}): {f['detail']}" for f in examples
        ]
    if result["unread"]:
        keys = ", ".join(f"{key} ({count:,})" for key, count in result["unread"].items())
        lines.append(f"  keys that are not read: {keys}")
    return "\n".join(lines if has_faults(result) else [*lines, "  no findings"])


def has_faults(result: dict) -> bool:
    """Return whether a file has findings; notes are none."""
    return any(result["counts"][kind] for kind in KINDS)


def unread_keys(records: datasets.Dataset) -> dict[str, int]:
    """Return the number of records by key that is not read, most frequent first."""
    counts: Counter[str] = Counter()
    for value in records.data.column("unread").value_counts().to_pylist():
        for key in value["values"].splitlines():
            counts[key] += value["counts"]
    return dict(counts.most_common())


def describe_file(file: Path, records: datasets.Dataset, findings: list[dict]) -> dict[str, Any]:
    """Return what was found in a file of annotations, an entry of "files" in the JSON."""
    kinds = Counter(finding["kind"] for finding in findings)
    return {
        "file": fingerprint(file),
        "records": len(records),
        "counts": {kind: kinds[kind] for kind in KINDS | NOTES},
        "unread": unread_keys(records),
        "findings": findings,
    }


def check_json(file: Path) -> None:
    """Raise unless `--json` is the name of a JSON file that does not exist, or of earlier findings.

    Raises:
        UserError: It is another file, for example the annotations.
    """
    check_suffix(file, ".json")
    if not file.exists():
        return
    try:
        found = read_json(file)
    except UserError:
        found = {}
    if "files" not in found:
        raise UserError(f"--json {file} exists and holds no findings; choose another file")


def main(argv: list[str]) -> None:
    """Run `llava-bidir verify-data`.

    Raises:
        SystemExit: With status 1 if there are findings.
    """
    parser = ArgumentParser(
        prog="llava-bidir verify-data",
        description="Check every record and image header of data.annotations and data.val_annotations. The exit status "
        "is 1 if there are findings. All other options are those of `llava-bidir fit` (-c CONFIG ..., "
        "--data.annotations ..., ...).",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the findings to this file",
    )
    parser.add_argument(
        "--workers",
        type=natural,
        default=usable_cores(),
        help="number of processes",
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode every image, which also detects truncated files",
    )
    args, config = parser.parse_known_args(argv[1:])
    if args.json:
        check_json(args.json)
    cli = build_data_cli(config, parser.prog)
    data = cli.datamodule
    images = ImageFolder(data.images, data.follow_links)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers run in parallel already
    results = []
    shown: list[set[str]] = []
    masks = {"annotations": cli.model.hparams.image_attention, "val_annotations": "causal"}
    for key, mask in masks.items():
        annotations = getattr(data, key)
        if not annotations:
            continue
        records = read_annotations(annotations)
        is_validation = key == "val_annotations"
        dataset = RecordFindings(records, images, data.collate, args.decode, mask, is_validation)
        findings = find_problems(dataset, args.workers)
        results.append(describe_file(Path(annotations), records, findings))
        print(format_result(results[-1]))
        shown.append(image_names(records))
    shared = shared_images(*shown, images.path) if len(shown) == 2 else {}
    if shared:
        print(describe_shared(shared, len(shown[1])))
    if args.json:
        write_files({args.json: {"files": results, "images_of_both": shared}})
        print(args.json)
    if any(map(has_faults, results)):
        raise SystemExit(1)
