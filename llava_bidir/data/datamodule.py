"""LightningDataModule for LLaVA conversations."""

import math
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, StackDataset, Subset
from transformers import LlavaProcessor

from llava_bidir.common.cli import Count, Index
from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import checksums, describe_digest, file_sizes
from llava_bidir.common.processes import usable_cores, worker_options

from .batch_samplers import BatchSampler, StepLoader, grouped_batches, random_batches
from .collate import Collate, predicting_positions
from .conversation import IGNORE_INDEX
from .dataset import Instructions, answers, read_annotations


class InstructionData(LightningDataModule):
    """Training and validation conversations.

    Args:
        annotations: LLaVA JSON file.
        images: Folder that image paths in the annotations are relative to.
        val_annotations: LLaVA JSON file for validation: questions with short answers, or captions that are not
            trained on, with template plain.
        template: "plain" (stage 1), "vicuna_v1" (stage 2), or "chat", the chat template of the LLM's tokenizer.
        batch_size: Samples per global batch over all devices.
        micro_batch_size: Samples per device and forward. Gradient accumulation follows from both sizes.
        group_by_length: Use batches of one modality and similar length (LLaVA's stage 2) instead of random ones.
        max_length: Maximum number of tokens per sequence, image tokens included; not more than `max_positions`.
        num_workers: Data loader processes per device, at most one per core.
        seed: Decides the order of samples.
        processor: Tokenizer and image processor; linked from the model by the command line.
        image_tokens: T, image tokens per image; linked from the model by the command line.
        max_positions: Positions of the LLM; linked from the model by the command line.
    """

    sets_on_trainer = ("accumulate_grad_batches",)

    def __init__(
        self,
        annotations: str,
        images: str,
        val_annotations: str | None = None,
        template: Literal["plain", "vicuna_v1", "chat"] = "vicuna_v1",
        batch_size: Count = 128,
        micro_batch_size: Count = 16,
        group_by_length: bool = False,
        max_length: Count = 2048,
        num_workers: Index = 4,
        seed: int = 0,
        processor: LlavaProcessor | None = None,
        image_tokens: int = 576,
        max_positions: int = sys.maxsize,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["processor", "max_positions"])
        self.annotations = annotations
        self.images = images
        self.val_annotations = val_annotations
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.group_by_length = group_by_length
        self.seed = seed
        self.num_workers = min(num_workers, usable_cores())
        self.has_weights = False
        self.collate = Collate(
            processor=processor,
            image_tokens=image_tokens,
            template=template,
            max_length=min(max_length, max_positions),
        )
        self.trained_micro_batches = 0

    def follow_model(self, image_attention: str, loss_average: Literal["llava", "tokens"]) -> None:
        """Take from the model what batches depend on; a training calls it before its first batch.

        Args:
            image_attention: Mask, under which no token may see the answer that it predicts.
            loss_average: With "tokens", batches have a weight.
        """
        self.collate.image_attention = image_attention
        self.has_weights = loss_average == "tokens"

    def prepare_data(self) -> None:
        """Convert the annotations once per node, before the other ranks need them."""
        read_annotations(self.annotations)
        if self.val_annotations:
            read_annotations(self.val_annotations)

    def setup(self, stage: str) -> None:
        """Open the datasets and set the gradient accumulation."""
        if self.val_annotations:
            self._open_validation()
        elif stage != "fit":
            raise UserError(
                "data.val_annotations is not set, so there are no questions to validate with"
            )
        if stage == "fit":
            self._open_training()

    def _open_validation(self) -> None:
        self.val = Instructions(self.val_annotations, self.images)
        for number, record in enumerate(self.val.records):
            if not any(answers(record)[:1]):
                raise UserError(
                    f"{self.val_annotations}: record {number} has no first answer to compare with"
                )

    def _open_training(self) -> None:
        trainer = self.trainer
        self.train = Instructions(self.annotations, self.images)
        self.train.check_trainable(self.collate)
        draw = random_batches
        if self.group_by_length:
            draw = grouped_batches
        self.sampler = BatchSampler(
            lengths=self.train.lengths(),
            global_batch_size=self.batch_size,
            batch_size=self.micro_batch_size,
            draw=draw,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            seed=self.seed,
        )
        step_samples = self.micro_batch_size * trainer.world_size
        trainer.accumulate_grad_batches = self.batch_size // step_samples
        trainer.log_every_n_steps = min(trainer.log_every_n_steps, self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimizer steps per epoch."""
        return len(self.sampler) // self.trainer.accumulate_grad_batches

    def train_dataloader(self) -> DataLoader:
        """Return the training loader, which starts after the micro-batches that a resumed run has trained."""
        self.sampler.start = self.trained_micro_batches % len(self.sampler)
        self.trained_micro_batches = 0
        batches = {"batch_sampler": self.sampler, "collate_fn": self.collate}
        if not self.has_weights:
            return self._loader(self.train, **batches)
        step_batches = self.trainer.accumulate_grad_batches
        strategy = self.trainer.strategy
        prefetch_factor = None
        if self.num_workers:  # which load the next step during the current one
            prefetch_factor = max(2, math.ceil(step_batches / self.num_workers))
        return self._loader(
            self.train,
            StepLoader,
            **batches,
            step_batches=step_batches,
            mean_over_ranks=lambda x: strategy.reduce(x.to(strategy.root_device), reduce_op="mean"),
            prefetch_factor=prefetch_factor,
        )

    def val_dataloader(self) -> DataLoader | list:
        """Return a loader with this rank's share of the validation samples.

        Each sample is on one rank, so that sums over ranks are exact. All ranks get the same number of samples, since
        under ZeRO-3 they run each forward together; sample 0 pads the shorter shares and is not counted.
        """
        if not self.val_annotations:
            return []
        ranks = self.trainer.world_size
        count = len(self.val)
        indices = [*range(self.trainer.global_rank, count, ranks)]
        padding = math.ceil(count / ranks) - len(indices)
        is_counted = [True] * len(indices) + [False] * padding
        return self._loader(
            StackDataset(Subset(self.val, indices + [0] * padding), is_counted),
            batch_size=self.micro_batch_size,
            collate_fn=self.collate_questions,
        )

    test_dataloader = val_dataloader

    def collate_questions(self, samples: list[tuple[dict, bool]]) -> dict:
        """Return a validation batch: the training batch, its images, prompts with the first questions, and both texts.

        A padding sample at the end has no labels and no text, so `answers` can be shorter than the batch.
        """
        records = [sample for sample, _ in samples]
        count = sum(is_counted for _, is_counted in samples)
        batch = self.collate(records)
        batch["labels"][count:] = IGNORE_INDEX
        predicts = predicting_positions(batch["labels"])
        batch |= {"predicts": predicts, "supervised": len(predicts)}
        first_turns = [record["conversations"][:2] for record in records[:count]]
        return {
            **batch,
            "images": [record["image"] for record in records],
            "prompts": self.collate.prompts(records),
            "questions": [question["value"] for question, _ in first_turns],
            "answers": [answer["value"] for _, answer in first_turns],
        }

    def _loader(self, dataset, loader=DataLoader, **kwargs) -> DataLoader:
        return loader(
            dataset,
            **worker_options(self.num_workers),
            pin_memory=torch.cuda.is_available(),
            **kwargs,
        )

    def identity(self) -> dict[str, Any]:
        """Return what the data is: annotations by content, images by relative path and size."""
        identity = {}
        images = set()
        for key in ("annotations", "val_annotations"):
            if path := getattr(self, key):
                records = read_annotations(path)
                file = Path(path)
                digest = checksums(root=file.parent, names=[file.name])[file.name]
                identity[key] = f"{len(records):,} records, sha256 {digest}"
                images |= {*records.unique("image")}
        names = sorted(images - {""})
        sizes = file_sizes(self.images, names)
        identity["images"] = describe_digest([names, sizes], count=len(names))
        return identity

    def state_dict(self) -> dict:
        """Return the position in the epoch, from which a resumed run continues."""
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return {"trained_micro_batches": progress.current.processed}

    def load_state_dict(self, state: dict) -> None:
        """Restore the position in the epoch."""
        self.trained_micro_batches = state["trained_micro_batches"]
