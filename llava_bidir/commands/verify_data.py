"""`llava-bidir verify-data`: encode every record and open every image of a training config before using GPU time.

`--show` prints what the model is fed with, without loading weights. Shapes: N sequence.
"""

import json
import os
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import LlamaConfig

from llava_bidir.common.errors import UserError
from llava_bidir.common.loader_workers import worker_options
from llava_bidir.common.usage_errors import ArgumentParser
from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import IGNORE_INDEX, IMAGE, usable_turns
from llava_bidir.data.image_folder import BadImage, ImageFolder, read_image
from llava_bidir.data.instruction_dataset import LATE_IMAGES, has_first_answer, read_annotations
from llava_bidir.model.build import EXTRA_TOKENS, check_image_attention
from llava_bidir.model.modeling_llava_bidir import build_mask
from llava_bidir.training.cli import build_data_cli

# Kinds of findings, and what training does with such records.
KINDS = {
    "broken": "the record cannot be used: `fit` stops",
    "image": "the image cannot be used: `fit` stops",
    "truncated": "answers are cut off at data.max_length",
    "not_shown": f"an image without {IMAGE}, or {IMAGE} without an image: trained as text",
    "image_in_answer": f"{IMAGE} in an answer: the image is shown there, too, as in LLaVA",
    "special_token": "an answer with the text of a special token: trained as that token, as in LLaVA",
}
LISTED = 20  # findings of a kind in the text; the JSON has all


@dataclass
class RecordFindings(Dataset):
    """Findings by record: a list of {"index", "id", "kind", "detail"}.

    Args:
        records: From :func:`llava_bidir.data.instruction_dataset.read_annotations`.
        images: Folder of the records' images.
        collate: Encodes the records in training.
        image_attention: Mask of the training.
        is_validation: The records are questions, whose first answers are compared.
    """

    records: datasets.Dataset
    images: ImageFolder
    collate: Collate
    image_attention: str = "causal"
    is_validation: bool = False

    def __post_init__(self):
        added = self.collate.processor.tokenizer.added_tokens_decoder.values()
        # those of ours are hidden from the tokenizer where they are text
        self.special = {token.content for token in added if token.special} - {*EXTRA_TOKENS}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        record = self.records[index]
        try:
            found = self.check(record)
        except UserError as error:
            found = {"image" if isinstance(error, BadImage) else "broken": str(error)}
        about = {"index": index, "id": record["id"]}
        return [about | {"kind": kind, "detail": detail} for kind, detail in found.items()]

    def check(self, record: dict) -> dict[str, str]:
        """Return what is wrong with a record by kind; raise a UserError where `fit` would."""
        turns = record["conversations"]
        if record["problem"]:
            raise UserError(record["problem"])
        if self.is_validation and not has_first_answer(turns):
            raise UserError("there is no first answer to compare with")
        if record.get(LATE_IMAGES.get(self.image_attention)):
            raise UserError(f"tokens before an image see the answer: {self.image_attention}")
        shown = record["shown"] > 0
        ids, labels = self.collate.encode_untruncated(turns, shown)
        image = read_image(self.images.file(record["image"])) if shown else None
        self.collate.pixels([record | {"image": image}], [ids])
        answers = "\n".join(turn["value"] for turn in usable_turns(turns)[1::2])
        special = sorted(token for token in self.special if token in answers)
        cut = sum(label != IGNORE_INDEX for label in labels[self.collate.max_length :])
        unshown = [] if shown else [record["image"]] + [IMAGE] * record["placeholders"]
        found = {
            "truncated": f"{cut} of {len(ids)} tokens" if cut else "",
            "not_shown": " ".join(filter(None, unshown)),
            "image_in_answer": IMAGE if shown and IMAGE in answers else "",
            "special_token": " ".join(special),
        }
        return {kind: detail for kind, detail in found.items() if detail}


def format_findings(file: dict[str, Any]) -> str:
    """Return the number of findings of each kind in a file, and the first of them."""
    lines = [f"{file['path']}: {file['records']:,} records, {len(file['findings']):,} findings"]
    for kind, meaning in KINDS.items():
        found = [finding for finding in file["findings"] if finding["kind"] == kind]
        lines += [f"  {len(found):,} {kind}: {meaning}"] if found else []
        lines += [f"    record {x['index']} ({x['id']!r}): {x['detail']}" for x in found[:LISTED]]
        lines += ["    ...; --json lists all"] if found[LISTED:] else []
    return "\n".join(lines)


def show_record(record: dict, collate: Collate) -> dict[str, Any]:
    """Return a record as {"id", "template", "input_ids", "labels", "image_spans": [[start, end]], "text"}."""
    ids, labels = collate.encode(record | {"image": record["image"] if record["shown"] else None})
    image_id = collate.processor.image_token_id
    starts = [i for i, token in enumerate(ids) if token == image_id][:: collate.image_tokens]
    spans = [[start, start + collate.image_tokens] for start in starts]
    inside = {i for start, end in spans for i in range(start + 1, end)}
    shown = {"id": record["id"], "template": collate.template, "input_ids": ids, "labels": labels}
    text = collate.processor.tokenizer.decode([x for i, x in enumerate(ids) if i not in inside])
    return shown | {"image_spans": spans, "text": text}


def format_record(shown: dict[str, Any], collate: Collate, image_attention: str) -> str:
    r"""Return a record of :func:`show_record` with supervised tokens in brackets, and the mask by segments."""
    lines = [f"{shown['id']}  ({shown['template']}, {len(shown['input_ids'])} tokens)"]
    is_image = torch.tensor([shown["input_ids"]]) == collate.processor.image_token_id
    tokens = zip(shown["input_ids"], shown["labels"], is_image[0].tolist(), strict=True)
    for (image, trained), group in groupby(tokens, key=lambda x: (x[2], x[1] != IGNORE_INDEX)):
        ids = [token for token, *_ in group]
        text = f"<{len(ids)} image tokens>" if image else collate.processor.tokenizer.decode(ids)
        lines.append(f"  trained [{text}]" if trained else f"          {text}")
    llm_config = LlamaConfig(attn_implementation="sdpa")  # the mask depends on the backend only
    mask = build_mask(image_attention, llm_config, is_image)[0, 0]
    lines += ["", "  attention: # all, \\ causal, . none, ? some (rows attend to columns)"]
    lengths = is_image[0].unique_consecutive(return_counts=True)[1].tolist()
    for i, rows in enumerate(mask.split(lengths)):
        kind = "image" if bool(is_image[0, 0]) == (i % 2 == 0) else "text"
        cells = " ".join(map(_cell, rows.split(lengths, dim=1)))
        lines.append(f"  {kind:>5} {len(rows):>4}  {cells}")
    return "\n".join(lines)


def _cell(part: torch.Tensor) -> str:
    """Return the character of a part bool[R, C] of a mask."""
    patterns = {"#": torch.ones_like(part), ".": torch.zeros_like(part)}
    patterns["\\"] = patterns["#"].tril()
    return next((name for name, x in patterns.items() if torch.equal(part, x)), "?")


def main(argv: list[str]) -> None:
    """Run `llava-bidir verify-data`; the exit status is 1 if there are findings."""
    parser = ArgumentParser(prog="llava-bidir verify-data")
    parser.add_argument("--show", type=int, nargs="+", default=[])
    parser.add_argument("--json", action="store_true")
    args, config = parser.parse_known_args(argv[1:])
    cli = build_data_cli(config, parser.prog)
    data = cli.datamodule
    mask = cli.model.hparams.image_attention
    check_image_attention(mask)
    records = read_annotations(data.annotations)
    for index in args.show:
        if not 0 <= index < len(records):
            raise UserError(f"--show {index}: {data.annotations} has records 0..{len(records) - 1}")
        shown = show_record(records[index], data.collate)
        print(json.dumps(shown) if args.json else format_record(shown, data.collate, mask))
    if args.show:
        return
    images = ImageFolder(data.images, data.follow_links)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers run in parallel already
    files = []
    for path, *about in ((data.annotations, mask), (data.val_annotations, "causal", True)):
        if path:
            dataset = RecordFindings(read_annotations(path), images, data.collate, *about)
            options = {"batch_size": 256, "collate_fn": list, **worker_options(data.num_workers)}
            batches = tqdm(DataLoader(dataset, **options))
            findings = [finding for batch in batches for record in batch for finding in record]
            files.append({"path": str(path), "records": len(dataset), "findings": findings})
    print(json.dumps({"files": files}) if args.json else "\n".join(map(format_findings, files)))
    if any(file["findings"] for file in files):
        raise SystemExit(1)
