"""`llava-bidir inspect`: show the model inputs of a training config without loading weights.

Shapes: N sequence.
"""

import json
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from llava_bidir.common.errors import UserError
from llava_bidir.common.usage_errors import ArgumentParser
from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import IGNORE_INDEX
from llava_bidir.data.instruction_dataset import Instructions
from llava_bidir.model.build import check_image_attention
from llava_bidir.model.modeling_llava_bidir import build_mask
from llava_bidir.training.cli import build_data_cli


def inspect_sample(sample: dict, collate: Collate) -> dict[str, Any]:
    """Return a record as token ids and labels with expanded images.

    Returns:
        {"id", "template", "input_ids", "labels", "image_spans", "text"}; image_spans are [start, end) positions, and
        text has one `<image>` per image.
    """
    ids, labels = collate.encode(sample)
    tokenizer = collate.processor.tokenizer
    image_id = collate.processor.image_token_id
    positions = [i for i, token in enumerate(ids) if token == image_id]
    spans = [[i, i + collate.image_tokens] for i in positions[:: collate.image_tokens]]
    inside = {i for start, end in spans for i in range(start + 1, end)}
    text = tokenizer.decode([token for i, token in enumerate(ids) if i not in inside])
    return {
        "id": sample["id"],
        "template": collate.template,
        "input_ids": ids,
        "labels": labels,
        "image_spans": spans,
        "text": text,
    }


def format_sample(sample: dict[str, Any], collate: Collate, image_attention: str) -> str:
    """Return the result of :func:`inspect_sample` as text, supervised tokens in brackets, with the attention mask."""
    lines = [f"{sample['id']}  ({sample['template']}, {len(sample['input_ids'])} tokens)"]
    decode = collate.processor.tokenizer.decode
    image_id = collate.processor.image_token_id
    tokens = list(zip(sample["input_ids"], sample["labels"], strict=True))
    for (is_image, supervised), group in groupby(
        tokens, key=lambda x: (x[0] == image_id, x[1] != IGNORE_INDEX)
    ):
        ids = [token for token, _ in group]
        text = f"<{len(ids)} image tokens>" if is_image else decode(ids)
        lines.append(f"  trained [{text}]" if supervised else f"          {text}")
    is_image = torch.tensor([sample["input_ids"]]) == image_id
    llm_config = LlamaConfig()
    llm_config._attn_implementation = "sdpa"  # the mask depends on the backend only
    mask = build_mask(image_attention, llm_config, is_image)[0, 0]
    return "\n".join([*lines, "", *draw_mask(mask, is_image[0])])


def draw_mask(mask: Tensor, is_image: Tensor) -> list[str]:
    r"""Return the mask bool[N, N] as text by segments of text and image: # all, \ causal, . none, ? other."""
    segments = [
        list(group) for _, group in groupby(range(len(is_image)), key=lambda i: bool(is_image[i]))
    ]
    lines = ["  attention: # all, \\ causal, . none, ? some (rows attend to columns)"]
    for rows in segments:
        cells = []
        for columns in segments:
            cells.append(_cell(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]))
        kind = "image" if is_image[rows[0]] else "text"
        lines.append(f"  {kind:>5} {len(rows):>4}  {' '.join(cells)}")
    return lines


def _cell(part: Tensor) -> str:
    """Return the character of a part bool[R, C] of a mask."""
    if part.all():
        return "#"
    if not part.any():
        return "."
    if part.shape[0] == part.shape[1] and torch.equal(part, torch.ones_like(part).tril()):
        return "\\"
    return "?"


def main(argv: list[str]) -> None:
    """Run `llava-bidir inspect`."""
    parser = ArgumentParser(
        prog="llava-bidir inspect",
        description="Show the tokens, labels and attention mask of records. All other options are those of "
        "`llava-bidir fit` (-c CONFIG ..., --data.annotations ..., ...).",
    )
    parser.add_argument(
        "--index",
        type=int,
        nargs="+",
        default=[0],
        metavar="I",
        help="indices of the records",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    args, config = parser.parse_known_args(argv[1:])
    cli = build_data_cli(config, parser.prog)
    data = cli.datamodule
    attention = cli.model.hparams.image_attention
    check_image_attention(attention)
    records = Instructions(data.annotations, data.images, data.follow_links)
    for index in args.index:
        if not 0 <= index < len(records):
            raise UserError(
                f"record {index} is out of range; {data.annotations} has records 0..{len(records) - 1}"
            )
        sample = inspect_sample(records[index], data.collate)
        print(json.dumps(sample) if args.json else format_sample(sample, data.collate, attention))
