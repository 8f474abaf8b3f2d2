"""`llava-bidir verify-data`: encode every record and open every image of a training config before using GPU time.

`--show` prints what the model is fed with, without loading weights. Shapes: N sequence.
"""

import json
import os
from argparse import ArgumentParser
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import LlamaConfig

from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import checksums
from llava_bidir.common.processes import worker_options
from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import IGNORE_INDEX, IMAGE_PLACEHOLDER
from llava_bidir.data.dataset import Instructions, answers, refers_to_image
from llava_bidir.model.build import EXTRA_TOKENS
from llava_bidir.model.modeling_llava_bidir import build_mask
from llava_bidir.training.cli import build_data_cli


def find(
    data: Instructions, collate: Collate, trained: set[int] | None, indices: list[int]
) -> list[dict[str, Any]]:
    """Return the findings of records, {"index", "id", "kind", "detail"} each.

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
    added = collate.processor.tokenizer.added_tokens_decoder.values()
    # ours are text
    special = {token.content for token in added if token.special} - {*EXTRA_TOKENS}
    found = []
    for index in indices:
        record = data.records[index]
        texts = answers(record)
        kinds = {}
        try:
            sample = data[index]
            _, labels = collate.encode(sample)
            if cut := sum(label != IGNORE_INDEX for label in labels[collate.max_length :]):
                kinds["truncated"] = f"{cut} of {len(labels)} tokens"
            if not all(texts or [""]):
                kinds["empty"] = f"{texts.count('')} of {len(texts)} answers"
            if trained_as := [token for token in special if token in "\n".join(texts)]:
                kinds["special_token"] = " ".join(sorted(trained_as))
            if sample["image"] is None and (record["image"] or refers_to_image(record)):
                kinds["not_shown"] = record["image"] or IMAGE_PLACEHOLDER
            if trained is not None and not any(texts[:1]):
                raise UserError("there is no first answer to compare with")
            if index in (trained or ()):
                kinds["in_training"] = record["image"] or "its text"
        except UserError as error:
            kinds = {"broken": str(error.__cause__ or error)}
        about = {"index": index, "id": record["id"]}
        found += [about | {"kind": kind, "detail": detail} for kind, detail in kinds.items()]
    return found


def also_trained(training: Instructions, validation: Instructions) -> set[int]:
    """Return the records of validation whose image, by content, or text without one, is in training, too."""
    names = {*training.records.unique("image"), *validation.records.unique("image")} - {""}
    digests = checksums(validation.images, names)

    def content(record: dict[str, Any]) -> str:
        return digests.get(record["image"]) or json.dumps(record["conversations"])

    contents = set(map(content, training.records))
    return {i for i, record in enumerate(validation.records) if content(record) in contents}


def format_findings(file: dict[str, Any]) -> str:
    """Return the number of findings in a file, and these by kind."""
    found = sorted(file["findings"], key=lambda x: x["kind"])
    lines = [f"{file['path']}: {file['records']:,} records, {len(found):,} findings"]
    lines += [f"  {x['kind']}: record {x['index']} ({x['id']!r}): {x['detail']}" for x in found]
    return "\n".join(lines)


def show_record(sample: dict, collate: Collate) -> dict[str, Any]:
    """Return a sample as {"id", "template", "input_ids", "labels", "image_spans": [[start, end]], "text"}."""
    ids, labels = (row[: collate.max_length] for row in collate.encode(sample))
    image_id = collate.processor.image_token_id
    starts = [i for i, token in enumerate(ids) if token == image_id][:: collate.image_tokens]
    kept = [token for i, token in enumerate(ids) if token != image_id or i in starts]
    return {
        "id": sample["id"],
        "template": collate.template,
        "input_ids": ids,
        "labels": labels,
        "image_spans": [[start, start + collate.image_tokens] for start in starts],
        "text": collate.processor.tokenizer.decode(kept),
    }


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
    segments, lengths = is_image[0].unique_consecutive(return_counts=True)
    for image, rows in zip(segments, mask.split(lengths.tolist()), strict=True):
        cells = " ".join(map(_cell, rows.split(lengths.tolist(), dim=1)))
        lines.append(f"  {'image' if image else 'text':>5} {len(rows):>4}  {cells}")
    return "\n".join(lines)


def _cell(part: torch.Tensor) -> str:
    """Return the character of a part bool[R, C] of a mask."""
    if part.all() or not part.any():
        return "#" if part.any() else "."
    return "\\" if torch.equal(part, torch.ones_like(part).tril()) else "?"


def main(argv: list[str]) -> None:
    """Run `llava-bidir verify-data`; the exit status is 1 if there are findings."""
    parser = ArgumentParser(
        prog="llava-bidir verify-data",
        description=__doc__.partition("\n")[0],
        epilog="All other options are those of `llava-bidir fit`.",
        allow_abbrev=False,
    )
    shown = "print tokens, labels and attention mask of these records instead"
    parser.add_argument("--show", type=int, nargs="+", default=[], metavar="I", help=shown)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args, config = parser.parse_known_args(argv[1:])
    cli = build_data_cli(config, parser.prog)
    data = cli.datamodule
    mask = cli.model.hparams.image_attention
    data.collate.image_attention = mask
    records = Instructions(data.annotations, data.images)
    for index in args.show:
        if not 0 <= index < len(records):
            raise UserError(f"--show {index}: {data.annotations} has records 0..{len(records) - 1}")
        shown = show_record(records[index], data.collate)
        print(json.dumps(shown) if args.json else format_record(shown, data.collate, mask))
    if args.show:
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers run in parallel already
    splits = [(records, None)]
    if data.val_annotations:
        questions = Instructions(data.val_annotations, data.images)
        splits.append((questions, also_trained(records, questions)))
    files = []
    for split, trained in splits:
        batches = DataLoader(
            range(len(split)),
            batch_size=256,
            collate_fn=partial(find, split, data.collate, trained),
            **worker_options(data.num_workers),
        )
        findings = list(chain.from_iterable(tqdm(batches)))
        files.append({"path": str(split.annotations), "records": len(split), "findings": findings})
    print(json.dumps({"files": files}) if args.json else "\n".join(map(format_findings, files)))
    if any(file["findings"] for file in files):
        raise SystemExit(1)
