"""`llava-bidir inspect`: what the model is really fed, read off a training config without loading weights.

Shapes: N sequence.
"""

import argparse
import json
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.errors import UserError
from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import IGNORE_INDEX
from llava_bidir.data.instruction_dataset import Instructions
from llava_bidir.model.modeling_llava_bidir import build_mask
from llava_bidir.training.cli import build_data_cli


def inspect_sample(sample: dict, collate: Collate) -> dict[str, Any]:
    """One record as token ids and labels, images expanded: {"id", "template", "input_ids", "labels", "image_spans",
    "text"}; image_spans are [start, end) positions, in text each image is one `<image>`."""
    ids, labels = collate.encode(sample)
    tokenizer, image_id = collate.processor.tokenizer, collate.processor.image_token_id
    spans = [[run[0], run[-1] + 1] for run in _runs([i for i, token in enumerate(ids) if token == image_id])]
    spans = [[i, i + collate.image_tokens] for start, end in spans for i in range(start, end, collate.image_tokens)]
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


def _runs(positions: list[int]) -> list[list[int]]:
    """Consecutive positions, grouped."""
    numbered = groupby(enumerate(positions), key=lambda pair: pair[1] - pair[0])
    return [[position for _, position in group] for _, group in numbered]


def readable(facts: dict[str, Any], collate: Collate, config) -> str:
    """The same for people: what is trained in brackets, and the attention mask by stretches of text and image."""
    lines = [f"{facts['id']}  ({facts['template']}, {len(facts['input_ids'])} tokens)"]
    decode, image_id = collate.processor.tokenizer.decode, collate.processor.image_token_id
    tokens = list(zip(facts["input_ids"], facts["labels"], strict=True))
    for (is_image, trained), group in groupby(tokens, key=lambda x: (x[0] == image_id, x[1] != IGNORE_INDEX)):
        ids = [token for token, _ in group]
        text = f"<{len(ids)} image tokens>" if is_image else decode(ids)
        lines.append(f"  trained [{text}]" if trained else f"          {text}")
    is_image = torch.tensor([facts["input_ids"]]) == image_id
    mask = build_mask(config["image_attention"], _any_llm(), is_image)[0, 0]
    return "\n".join([*lines, "", *draw_mask(mask, is_image[0])])


def draw_mask(mask: Tensor, is_image: Tensor) -> list[str]:
    """bool[N, N] by stretches: # sees all of it, \\ causally, . nothing, ? otherwise; rows are queries."""
    stretches = [list(group) for _, group in groupby(range(len(is_image)), key=lambda i: bool(is_image[i]))]
    lines = ["  attention: # all, \\ causal, . none (rows look at columns)"]
    for rows in stretches:
        cells = []
        for columns in stretches:
            part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            causal = part.shape[0] == part.shape[1] and torch.equal(part, torch.ones_like(part).tril())
            cells.append("#" if part.all() else "." if not part.any() else "\\" if causal else "?")
        kind = "image" if is_image[rows[0]] else "text"
        lines.append(f"  {kind:>5} {len(rows):>4}  {' '.join(cells)}")
    return lines


def _any_llm():
    """A config that says which backend draws the mask."""
    from transformers import LlamaConfig

    config = LlamaConfig()
    config._attn_implementation = "sdpa"
    return config


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="llava-bidir inspect",
        description="What the model is really fed: tokens, labels and mask of records. All other options are those of "
        "`llava-bidir fit` (-c CONFIG ..., --data.annotations ..., ...).",
    )
    parser.add_argument("--index", type=int, nargs="+", default=[0], metavar="I", help="records to show (0)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args, config = parser.parse_known_args(argv[1:])
    cli = build_data_cli(config)
    source = cli.datamodule
    data = Instructions(source.annotations, source.images, source.follow_links)
    for index in args.index:
        if not 0 <= index < len(data):
            raise UserError(f"record {index} is out of range; {cli.datamodule.annotations} has 0..{len(data) - 1}")
        facts = inspect_sample(data[index], cli.datamodule.collate)
        print(json.dumps(facts) if args.json else readable(facts, cli.datamodule.collate, cli.model.hparams))
