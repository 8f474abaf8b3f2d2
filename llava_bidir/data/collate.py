"""Collate samples into a batch: encode conversations, convert images to pixels, pad on the right."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaProcessor

from llava_bidir.common.errors import UserError

from .conversation import IGNORE_INDEX, encode
from .packing import pack_samples


def pad(rows: list[list[int]], value: int, side: str = "right") -> Tensor:
    """Return rows of unequal length as long[B, N], padded with `value` on one side."""
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([row + f if side == "right" else f + row for row, f in zip(rows, fill, strict=True)])


def predicting_positions(labels: Tensor) -> Tensor:
    """Return the positions before supervised tokens, long[n], in the labels flattened from [B, N]."""
    supervised = labels != IGNORE_INDEX
    supervised[:, 0] = False
    return supervised.flatten().nonzero().flatten() - 1


@dataclass
class Collate:
    """Convert samples of :class:`.instruction_dataset.Instructions` to model inputs.

    A row holds one sample, or several with `pack_tokens`. Packed samples do not attend to each other, and positions
    restart with each. Two samples of 3 and 2 tokens in one row, and one of 4 tokens::

        tokens        a a a b b      samples  [[3, 2],
        tokens        c c c c .                [4, 1]]     <- padding counts as a sample
        position_ids  0 1 2 0 1
                      0 1 2 3 0

    Args:
        processor: From :func:`llava_bidir.model.build.build_processor`.
        image_tokens: T, image tokens per image.
        template: "plain" or "vicuna_v1", see :func:`.conversation.encode`.
        max_length: Longer sequences are truncated, image tokens included. Source: LLaVA llava_arch.py:273.
        pack_tokens: Maximum tokens per row of packed samples; None for one sample per row.
    """

    processor: LlavaProcessor
    image_tokens: int
    template: str
    max_length: int = 2048
    pack_tokens: int | None = None

    def encode(self, sample: dict) -> tuple[list[int], list[int]]:
        """Return token ids and labels of a sample, truncated to `max_length`.

        Raises:
            UserError: The sample cannot be encoded; names it.
        """
        try:
            ids, labels = self.encode_untruncated(sample["conversations"], sample["image"] is not None)
        except UserError as error:
            raise UserError(f"record {sample['id']!r}: {error}") from None
        return ids[: self.max_length], labels[: self.max_length]

    def encode_untruncated(self, turns: list[dict], has_image: bool) -> tuple[list[int], list[int]]:
        """Return token ids and labels of a conversation without truncation.

        Raises:
            UserError: The conversation cannot be encoded, or truncation would remove image tokens.
        """
        tokenizer, image_id = self.processor.tokenizer, self.processor.image_token_id
        ids, labels = encode(turns, tokenizer, self.template, self.image_tokens if has_image else None, image_id)
        if image_id in ids[self.max_length :]:
            raise UserError(
                f"its image ends after data.max_length {self.max_length}; increase it, or shorten the text before the "
                "image"
            )
        return ids, labels

    def __call__(self, samples: list[dict]) -> dict[str, Any]:
        """Return a batch for the training step.

        Returns:
            - ids: record ids.
            - input_ids, labels, attention_mask: long[B, N], padded on the right.
            - position_ids: long[B, N], None if rows hold one sample each.
            - samples: lengths of the samples of each row, which add up to N; None if rows hold one sample each.
            - pixel_values: f[images, 3, H, W] in the order of the rows, None without images.
            - image_positions: long[images * T], positions of image tokens in the flattened rows.
            - predicts: long[n], positions in the flattened rows that predict a supervised token; only these need
              logits.
            - supervised: number of supervised tokens.
            - lengths: tokens per sample without padding.
            - text_only: number of samples that show no image.
        """
        encoded = [self.encode(sample) for sample in samples]
        lengths = [len(ids) for ids, _ in encoded]
        layout = pack_samples(lengths, self.pack_tokens) if self.pack_tokens else [[i] for i in range(len(samples))]
        rows = [[token for i in row for token in encoded[i][0]] for row in layout]
        # no token predicts the first one of the next sample
        labels = pad(
            [[label for i in row for label in (IGNORE_INDEX, *encoded[i][1][1:])] for row in layout], IGNORE_INDEX
        )
        predicts, in_order = predicting_positions(labels), [i for row in layout for i in row]
        input_ids = pad(rows, self.processor.tokenizer.pad_token_id)
        return {
            "ids": [sample["id"] for sample in samples],
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": pad([[1] * len(row) for row in rows], 0),
            **self._boundaries([[lengths[i] for i in row] for row in layout]),
            "pixel_values": self.pixels([samples[i] for i in in_order], [encoded[i][0] for i in in_order]),
            "image_positions": (input_ids == self.processor.image_token_id).flatten().nonzero().flatten(),
            "predicts": predicts,
            "supervised": len(predicts),
            "lengths": lengths,
            "text_only": sum(self.processor.image_token_id not in ids for ids, _ in encoded),
        }

    def _boundaries(self, rows: list[list[int]]) -> dict[str, Any]:
        """Return `samples` and `position_ids` from the lengths of the samples in each row."""
        if not self.pack_tokens:
            return {"samples": None, "position_ids": None}
        width = max(map(sum, rows))
        samples = [row + [width - sum(row)] * (sum(row) < width) for row in rows]
        positions = [torch.cat([torch.arange(length) for length in row]) for row in samples]
        return {"samples": samples, "position_ids": torch.stack(positions)}

    def pixels(self, samples: list[dict], rows: list[list[int]]) -> Tensor | None:
        """Return the pixels of a batch's images, f[images, 3, H, W]; several turns may show the same image."""
        image_id = self.processor.image_token_id
        images = [
            sample["image"]
            for sample, ids in zip(samples, rows, strict=True)
            for _ in range(ids.count(image_id) // self.image_tokens)
        ]
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"] if images else None

    def prompts(self, samples: list[dict]) -> dict[str, Tensor]:
        """Return the prompt with each sample's first question, padded on the left for `generate`."""
        questions = [{**sample, "conversations": sample["conversations"][:1]} for sample in samples]
        rows = [self.encode(question)[0] for question in questions]
        batch = {
            "input_ids": pad(rows, self.processor.tokenizer.pad_token_id, "left"),
            "attention_mask": pad([[1] * len(row) for row in rows], 0, "left"),
        }
        pixels = self.pixels(questions, rows)
        return batch if pixels is None else {**batch, "pixel_values": pixels}
