"""Collate samples into a batch: encode conversations, convert images to pixels, pad on the right."""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaProcessor

from llava_bidir.common.errors import UserError, error_context

from .conversation import IGNORE_INDEX, encode


def pad(rows: list[list[int]], value: int, side: str = "right") -> Tensor:
    """Return rows of unequal length as long[B, N], padded with `value` on one side."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def predicting_positions(labels: Tensor) -> Tensor:
    """Return the positions before supervised tokens, long[n], in the labels flattened from [B, N]."""
    supervised = labels != IGNORE_INDEX
    supervised[:, 0] = False
    return supervised.flatten().nonzero().flatten() - 1


class Batch(TypedDict):
    """A batch for the training step.

    - ids: record ids.
    - input_ids, labels, attention_mask: long[B, N], padded on the right.
    - pixel_values: f[images, 3, H, W]; one black image if none is shown.
    - image_positions: long[images * T], positions of image tokens in the flattened rows.
    - predicts: long[n], positions in the flattened rows that predict a supervised token; only these need logits.
    - supervised: number of supervised tokens.
    - lengths: tokens per sample without padding.
    """

    ids: list[str]
    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    image_positions: Tensor
    predicts: Tensor
    supervised: int
    lengths: list[int]


@dataclass
class Collate:
    """Convert samples of :class:`.dataset.Instructions` to model inputs.

    Args:
        processor: From :func:`llava_bidir.model.build.build_processor`.
        image_tokens: T, image tokens per image.
        template: "plain", "vicuna_v1" or "chat", see :func:`.conversation.encode`.
        max_length: Longer sequences are truncated, image tokens included. Source: LLaVA llava_arch.py:273.
        image_attention: Mask of the model.
    """

    processor: LlavaProcessor
    image_tokens: int
    template: str
    max_length: int = 2048
    image_attention: str = "causal"

    def encode(self, sample: dict) -> tuple[list[int], list[int]]:
        """Return token ids and labels of a sample, which are not truncated yet.

        Raises:
            UserError: The sample cannot be encoded, truncation would remove image tokens, or tokens could see the
                answer that they predict, through an image after it; names the sample.
        """
        image_id = self.processor.image_token_id
        image_tokens = None
        if sample["image"] is not None:
            image_tokens = self.image_tokens
        with error_context(f"record {sample['id']!r}"):
            ids, labels = encode(
                sample["conversations"],
                tokenizer=self.processor.tokenizer,
                template=self.template,
                image_tokens=image_tokens,
                image_token_id=image_id,
            )
            end_of_images = 0
            if image_id in ids:
                end_of_images = len(ids) - ids[::-1].index(image_id)
            if end_of_images > self.max_length:
                raise UserError(
                    f"its image ends after token {self.max_length}, the limit by data.max_length or by the LLM's "
                    "positions; increase it, or shorten the text before the image"
                )
            is_answered = any(label != IGNORE_INDEX for label in labels[:end_of_images])
            if is_answered and self.image_attention != "causal":
                raise UserError(
                    f"an image follows an answer. Under model.image_attention {self.image_attention}, tokens that "
                    "predict the answer could see it; remove the record, or split it before the image"
                )
        return ids, labels

    def truncated(self, sample: dict) -> tuple[list[int], list[int]]:
        """Return token ids and labels of a sample up to `max_length`; errors are those of :meth:`encode`."""
        ids, labels = self.encode(sample)
        return ids[: self.max_length], labels[: self.max_length]

    def __call__(self, samples: list[dict]) -> Batch:
        """Return a batch for the training step."""
        encoded = [self.truncated(sample) for sample in samples]
        rows = [ids for ids, _ in encoded]
        image_id = self.processor.image_token_id
        input_ids = pad(rows, self.processor.tokenizer.pad_token_id)
        labels = pad([labels for _, labels in encoded], IGNORE_INDEX)
        predicts = predicting_positions(labels)
        return {
            "ids": [sample["id"] for sample in samples],
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": pad([[1] * len(row) for row in rows], 0),
            "pixel_values": self.pixels(samples, rows),
            "image_positions": (input_ids == image_id).flatten().nonzero().flatten(),
            "predicts": predicts,
            "supervised": len(predicts),
            "lengths": [len(row) for row in rows],
        }

    def pixels(self, samples: list[dict], rows: list[list[int]]) -> Tensor:
        """Return the pixels of a batch's images, f[images, 3, H, W]; several turns may show the same image.

        Without an image, it is a black one: each rank runs encoder and adapter. Source: LLaVA train.py:735.
        """
        processor = self.processor.image_processor
        pixels = []
        for sample, ids in zip(samples, rows, strict=True):
            count = ids.count(self.processor.image_token_id) // self.image_tokens
            if count:
                processed = processor(sample["image"], return_tensors="pt")
                pixels += [processed["pixel_values"]] * count
        black = torch.zeros(1, 3, processor.crop_size["height"], processor.crop_size["width"])
        return torch.cat(pixels or [black])

    def prompts(self, samples: list[dict]) -> dict[str, Tensor]:
        """Return the prompt with each sample's first question, or its image, padded on the left for `generate`."""
        unanswered = {"from": "gpt", "value": ""}
        questions = []
        rows = []
        for sample in samples:
            question = {**sample, "conversations": [sample["conversations"][0], unanswered]}
            ids, labels = self.encode(question)
            # plain trains the end of an empty caption
            prompt = [x for x, label in zip(ids, labels, strict=True) if label == IGNORE_INDEX]
            questions.append(question)
            rows.append(prompt)
        return {
            "input_ids": pad(rows, self.processor.tokenizer.pad_token_id, "left"),
            "attention_mask": pad([[1] * len(row) for row in rows], 0, "left"),
            "pixel_values": self.pixels(questions, rows),
        }
