"""`llava-bidir verify-data`: encode every record and open every image of a training config before using GPU time.

`--show` prints what the model is fed with, without loading weights. Shapes: N sequence.
"""

import json
import os
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, groupby
from operator import attrgetter, itemgetter

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import LlamaConfig

from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import checksums
from llava_bidir.common.processes import worker_options
from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import IGNORE_INDEX, IMAGE_PLACEHOLDER
from llava_bidir.data.datamodule import InstructionData
from llava_bidir.data.dataset import Conversation, Instructions, answers, refers_to_image
from llava_bidir.model.build import EXTRA_TOKENS
from llava_bidir.model.modeling_llava_bidir import build_mask
from llava_bidir.training.cli import build_data_cli
from llava_bidir.training.estimate import GB, PartOfModel, count_parameters


def main(argv: list[str]) -> None:
    """Run `llava-bidir verify-data`; the exit status is 1 if there are findings."""
    parser = ArgumentParser(
        prog="llava-bidir verify-data",
        description=__doc__.partition("\n")[0],
        epilog="All other options are those of `llava-bidir fit`.",
        allow_abbrev=False,
    )
    about_show = "print tokens, labels and attention mask of these records instead"
    parser.add_argument("--show", type=int, nargs="+", default=[], metavar="I", help=about_show)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args, config = parser.parse_known_args(argv[1:])
    cli = build_data_cli(config, parser.prog)
    data = cli.datamodule
    data.collate.image_attention = cli.model.hparams.image_attention
    records = Instructions(data.annotations, data.images)
    if args.show:
        print_records(records, args.show, data.collate, as_json=args.json)
        return
    with torch.device("meta"):
        cli.model.build(with_weights=False)
    parts = count_parameters(cli.model)
    files = verify(data, records)
    if args.json:
        described = {
            "files": [asdict(file) for file in files],
            "parts": [asdict(part) for part in parts],
        }
        print(json.dumps(described))
    else:
        print("\n".join([*map(format_findings, files), *map(format_part, parts)]))
    if any(file.findings for file in files):
        raise SystemExit(1)


@dataclass(frozen=True)
class ShownRecord:
    """What the model is fed of a record.

    Args:
        id: Of the record.
        template: Of its text.
        input_ids: Tokens [N].
        labels: Labels [N].
        image_spans: [start, end] of each image.
        text: With one token for each image.
    """

    id: str
    template: str
    input_ids: list[int]
    labels: list[int]
    image_spans: list[tuple[int, int]]
    text: str


@dataclass(frozen=True)
class Finding:
    """What is wrong with a record; :func:`find` has the kinds."""

    index: int
    id: str
    kind: str
    detail: str


@dataclass(frozen=True)
class VerifiedFile:
    """A file of records, and what is wrong with them."""

    path: str
    records: int
    findings: list[Finding]


def print_records(
    records: Instructions, indices: Sequence[int], collate: Collate, as_json: bool
) -> None:
    """Print what the model is fed of some records.

    Raises:
        UserError: There is no such record.
    """
    for index in indices:
        if not 0 <= index < len(records):
            last = len(records) - 1
            raise UserError(f"--show {index}: {records.annotations} has records 0..{last}")
        shown = show_record(records[index], collate)
        if as_json:
            print(json.dumps(asdict(shown)))
        else:
            print(format_record(shown, collate))


def show_record(sample: Conversation, collate: Collate) -> ShownRecord:
    """Return what the model is fed of a sample."""
    ids, labels = collate.truncated(sample)
    image_id = collate.processor.image_token_id
    places = [i for i, token in enumerate(ids) if token == image_id]
    starts = places[:: collate.image_tokens]
    kept = [token for i, token in enumerate(ids) if token != image_id or i in starts]
    return ShownRecord(
        id=sample["id"],
        template=collate.template,
        input_ids=ids,
        labels=labels,
        image_spans=[(start, start + collate.image_tokens) for start in starts],
        text=collate.processor.tokenizer.decode(kept),
    )


def format_record(shown: ShownRecord, collate: Collate) -> str:
    r"""Return a record with supervised tokens in brackets, and the mask by segments."""
    tokenizer = collate.processor.tokenizer
    is_image = torch.tensor([shown.input_ids]) == collate.processor.image_token_id
    lines = [f"{shown.id}  ({shown.template}, {len(shown.input_ids)} tokens)"]
    is_trained = [label != IGNORE_INDEX for label in shown.labels]
    tokens = zip(is_image[0].tolist(), is_trained, shown.input_ids, strict=True)
    for (image, trained), segment in groupby(tokens, key=itemgetter(0, 1)):
        ids = [token for *_, token in segment]
        text = tokenizer.decode(ids)
        if image:
            text = f"<{len(ids)} image tokens>"
        if trained:
            lines.append(f"  trained [{text}]")
        else:
            lines.append(f"          {text}")
    llm_config = LlamaConfig(attn_implementation="sdpa")  # the mask depends on the backend only
    mask = build_mask(collate.image_attention, llm_config, is_image)[0, 0]
    lines += ["", "  attention: # all, \\ causal, . none, ? some (rows attend to columns)"]
    segments, lengths = is_image[0].unique_consecutive(return_counts=True)
    for image, rows in zip(segments, mask.split(lengths.tolist()), strict=True):
        name = "text"
        if image:
            name = "image"
        cells = " ".join(map(_cell, rows.split(lengths.tolist(), dim=1)))
        lines.append(f"  {name:>5} {len(rows):>4}  {cells}")
    return "\n".join(lines)


def _cell(part: torch.Tensor) -> str:
    """Return the character of a part bool[R, C] of a mask."""
    if part.all():
        return "#"
    if not part.any():
        return "."
    if torch.equal(part, torch.ones_like(part).tril()):
        return "\\"
    return "?"


def verify(data: InstructionData, training: Instructions) -> list[VerifiedFile]:
    """Return the findings of each file of records."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers run in parallel already
    splits: list[tuple[Instructions, set[int] | None]] = [(training, None)]
    if data.val_annotations:
        questions = Instructions(data.val_annotations, data.images)
        splits.append((questions, also_trained(training, questions)))
    files = []
    for split, trained in splits:
        batches = DataLoader(
            range(len(split)),
            batch_size=256,
            collate_fn=partial(find, split, data.collate, trained),
            **worker_options(data.num_workers),
        )
        findings = list(chain.from_iterable(tqdm(batches)))
        files.append(VerifiedFile(str(split.annotations), len(split), findings))
    return files


def also_trained(training: Instructions, validation: Instructions) -> set[int]:
    """Return the records of validation whose image, by content, or text without one, is in training, too."""
    names = {*training.records.unique("image"), *validation.records.unique("image")} - {""}
    digests = checksums(validation.images, names)

    def content(record: Conversation) -> str:
        return digests.get(record["image"]) or json.dumps(record["conversations"])

    contents = set(map(content, training.records))
    return {i for i, record in enumerate(validation.records) if content(record) in contents}


def find(
    data: Instructions, collate: Collate, trained: set[int] | None, indices: list[int]
) -> list[Finding]:
    """Return the findings of records.

    The kinds are

    - broken: `fit` stops. In validation, the first answer is compared.
    - truncated: answers, by data.max_length.
    - empty: answers without text, or a record without an answer.
    - special_token: an answer with the text of such a token, which becomes that token.
    - not_shown: an image without `<image>`, or `<image>` without an image, which are trained as text.
    - in_training: the image of a question, or its text without one, is trained on, too.

    Args:
        data: The records.
        collate: Encodes them.
        trained: Of validation, the records that are in training, too; None for training.
        indices: Records to look at.
    """
    added_tokens = collate.processor.tokenizer.added_tokens_decoder.values()
    special_tokens = {token.content for token in added_tokens if token.special}
    findings = []
    for index in indices:
        try:
            details = find_in_record(
                data, index=index, collate=collate, trained=trained, special_tokens=special_tokens
            )
        except UserError as error:
            details = {"broken": str(error.__cause__ or error)}
        record_id = data.records[index]["id"]
        findings += [Finding(index, record_id, kind, text) for kind, text in details.items()]
    return findings


def find_in_record(
    data: Instructions,
    index: int,
    collate: Collate,
    trained: set[int] | None,
    special_tokens: set[str],
) -> dict[str, str]:
    """Return the details of a record's findings by kind; for the arguments see :func:`find`.

    Raises:
        UserError: The record is broken.
    """
    record = data.records[index]
    texts = answers(record)
    sample = data[index]
    _, labels = collate.encode(sample)
    details = {}
    cut = sum(label != IGNORE_INDEX for label in labels[collate.max_length :])
    if cut:
        details["truncated"] = f"{cut} of {len(labels)} tokens"
    if not all(texts or [""]):
        details["empty"] = f"{texts.count('')} of {len(texts)} answers"
    answered = "\n".join(texts)
    trained_as = [token for token in special_tokens - {*EXTRA_TOKENS} if token in answered]
    if trained_as:  # our extra tokens are text
        details["special_token"] = " ".join(sorted(trained_as))
    if sample["image"] is None and (record["image"] or refers_to_image(record)):
        details["not_shown"] = record["image"] or IMAGE_PLACEHOLDER
    if trained is None:
        return details
    if not any(texts[:1]):
        raise UserError("there is no first answer to compare with")
    if index in trained:
        details["in_training"] = record["image"] or "its text"
    return details


def format_part(part: PartOfModel) -> str:
    """Return how much of a part trains, and what the optimizer keeps of it."""
    line = f"{part.part}: {part.parameters / 1e6:,.1f} M parameters, {part.describe()}"
    if part.trains:
        line += f"; AdamW's moments are {part.moments / GB:,.2f} GB, over all GPUs"
    return line


def format_findings(file: VerifiedFile) -> str:
    """Return the number of findings in a file, and these by kind."""
    lines = [f"{file.path}: {file.records:,} records, {len(file.findings):,} findings"]
    for finding in sorted(file.findings, key=attrgetter("kind")):
        record = f"record {finding.index} ({finding.id!r})"
        lines.append(f"  {finding.kind}: {record}: {finding.detail}")
    return "\n".join(lines)
