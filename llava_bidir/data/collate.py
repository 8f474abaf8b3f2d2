"""Samples to a batch: conversations encoded, images turned to pixels, padded on the right."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaProcessor

from llava_bidir.common.errors import UserError

from .conversation import IGNORE_INDEX, encode


def pad(rows: list[list[int]], value: int, side: str = "right") -> Tensor:
    """long[B, N] of rows of unequal length, filled with `value` on one side."""
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([row + f if side == "right" else f + row for row, f in zip(rows, fill, strict=True)])


@dataclass
class Collate:
    """Samples of :class:`.instructions.Instructions` to what the model is fed.

    Args:
        processor: From :func:`llava_bidir.model.build.build_processor`.
        image_tokens: T, image tokens of one image.
        template: "plain" or "vicuna_v1".
        max_length: Longer sequences are cut there, image tokens counted. Source: LLaVA llava_arch.py:273.
    """

    processor: LlavaProcessor
    image_tokens: int
    template: str
    max_length: int = 2048

    def encode(self, sample: dict) -> tuple[list[int], list[int]]:
        """Ids and labels of one sample, cut at `max_length`.

        Raises:
            UserError: Names the sample that cannot be encoded.
        """
        try:
            ids, labels = self.encode_whole(sample["conversations"], sample["image"] is not None)
        except ValueError as error:
            raise UserError(f"record {sample['id']!r}: {error}") from None
        return ids[: self.max_length], labels[: self.max_length]

    def encode_whole(self, turns: list[dict], has_image: bool) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation, not cut.

        Raises:
            UserError: It cannot be encoded, or would be cut within its image.
        """
        tokenizer, image_id = self.processor.tokenizer, self.processor.image_token_id
        ids, labels = encode(turns, tokenizer, self.template, self.image_tokens if has_image else None, image_id)
        if image_id in ids[self.max_length :]:
            raise UserError(
                f"its image ends behind data.max_length {self.max_length}; raise it, or shorten the text before the "
                "image"
            )
        return ids, labels

    def __call__(self, samples: list[dict]) -> dict[str, Any]:
        """A batch for the training step.

        Returns:
            ids: list of B record ids; input_ids, labels, attention_mask: long[B, N], padded on the right;
            pixel_values: f[images, 3, H, W], None without images; predicts: long[n], the positions at which some
            sample of the batch predicts a supervised token, so that logits are computed nowhere else; supervised:
            their number over all samples; lengths: tokens of each sample, without padding.
        """
        encoded = [self.encode(sample) for sample in samples]
        rows = [ids for ids, _ in encoded]
        labels = pad([labels for _, labels in encoded], IGNORE_INDEX)
        supervised = labels[:, 1:] != IGNORE_INDEX
        return {
            "ids": [sample["id"] for sample in samples],
            "input_ids": pad(rows, self.processor.tokenizer.pad_token_id),
            "labels": labels,
            "attention_mask": pad([[1] * len(row) for row in rows], 0),
            "pixel_values": self.pixels(samples, rows),
            "predicts": supervised.any(0).nonzero().flatten(),
            "supervised": int(supervised.sum()),
            "lengths": [len(row) for row in rows],
        }

    def pixels(self, samples: list[dict], rows: list[list[int]]) -> Tensor | None:
        """The images of a batch, each as often as its encoded row shows it: several turns may show the same one."""
        image_id = self.processor.image_token_id
        shown = [
            sample["image"]
            for sample, ids in zip(samples, rows, strict=True)
            for _ in range(ids.count(image_id) // self.image_tokens)
        ]
        return self.processor.image_processor(shown, return_tensors="pt")["pixel_values"] if shown else None

    def prompts(self, samples: list[dict]) -> dict[str, Tensor]:
        """The first question of each sample up to its answer, padded on the left, as `generate` wants it."""
        questions = [{**sample, "conversations": sample["conversations"][:1]} for sample in samples]
        rows = [self.encode(question)[0] for question in questions]
        batch = {
            "input_ids": pad(rows, self.processor.tokenizer.pad_token_id, "left"),
            "attention_mask": pad([[1] * len(row) for row in rows], 0, "left"),
        }
        pixels = self.pixels(questions, rows)
        return batch if pixels is None else {**batch, "pixel_values": pixels}
