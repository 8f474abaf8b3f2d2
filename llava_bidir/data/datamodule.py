"""The data of a training run: LLaVA JSON and images in, batches out."""

import math
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaProcessor

from .batch_samplers import BatchSampler
from .collate import Collate
from .conversation import IGNORE_INDEX, check_turns
from .instruction_dataset import Instructions, read_annotations
from .token_weighted_loader import StepLoader


class InstructionData(LightningDataModule):
    """Training and validation conversations.

    Args:
        annotations: LLaVA JSON file.
        images: Folder that its image paths start from.
        val_annotations: LLaVA JSON of questions with short answers, asked at validation.
        template: "plain" (stage 1) or "vicuna_v1" (stage 2).
        batch_size: Samples of a global batch over all devices: the number a recipe states.
        micro_batch_size: Samples that one device holds at a time. Accumulation follows from the two.
        group_by_length: Batches of one modality and similar length (LLaVA's stage 2) instead of random ones.
        max_length: Tokens of a sequence, image tokens included.
        num_workers: Processes on each device that open images.
        follow_links: Also read images that symlinks within `images` lead to elsewhere, because you laid it out so.
        seed: Decides the order of samples.
        processor: The command line links it from the model.
        image_tokens: T, image tokens of one image; the command line links it from the model.
    """

    def __init__(
        self,
        annotations: str,
        images: str,
        val_annotations: str | None = None,
        template: str = "vicuna_v1",
        batch_size: int = 128,
        micro_batch_size: int = 16,
        group_by_length: bool = False,
        max_length: int = 2048,
        num_workers: int = 4,
        follow_links: bool = False,
        seed: int = 0,
        processor: LlavaProcessor | None = None,
        image_tokens: int = 576,
    ):
        super().__init__()
        self.annotations, self.images, self.val_annotations = annotations, images, val_annotations
        self.follow_links = follow_links
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.group_by_length, self.num_workers, self.seed = group_by_length, num_workers, seed
        self.collate = Collate(processor, image_tokens, template, max_length)
        self.trained_micro_batches = 0

    def prepare_data(self) -> None:
        for path in filter(None, (self.annotations, self.val_annotations)):
            read_annotations(path)  # once a node, before the other ranks need it

    def setup(self, stage: str) -> None:
        if self.val_annotations:
            self.val = Instructions(self.val_annotations, self.images, self.follow_links)
            self.val.check_answers()
        if stage == "fit":
            self.train = Instructions(self.annotations, self.images, self.follow_links)
            rank_zero_info(self.train.summary(self.collate.image_tokens, self.collate.max_length))
            self.sampler = BatchSampler(
                self.train.lengths(),
                self.batch_size,
                self.micro_batch_size,
                grouped=self.group_by_length,
                rank=self.trainer.global_rank,
                world_size=self.trainer.world_size,
                seed=self.seed,
            )
            self.trainer.accumulate_grad_batches = self.batch_size // (self.micro_batch_size * self.trainer.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the training data."""
        return math.ceil(len(self.train) / self.batch_size)

    def train_dataloader(self) -> DataLoader:
        self.sampler.skip(self.trained_micro_batches % len(self.sampler))
        self.trained_micro_batches = 0
        batches = {"batch_sampler": self.sampler, "collate_fn": self.collate}
        if self.trainer.lightning_module.hparams.loss_average == "llava":
            return self._loader(self.train, **batches)  # needs no weights: nothing to read ahead, no ranks to ask
        step_batches, strategy = self.trainer.accumulate_grad_batches, self.trainer.strategy
        return self._loader(
            self.train,
            StepLoader,
            **batches,
            step_batches=step_batches,
            mean_over_ranks=lambda x: strategy.reduce(x.to(strategy.root_device), reduce_op="mean"),
            # the workers read the next step while this one is trained
            prefetch_factor=max(2, math.ceil(step_batches / self.num_workers)) if self.num_workers else None,
        )

    def val_dataloader(self) -> DataLoader | list:
        if not self.val_annotations:
            return []
        # Every rank gets its own samples, none twice, so that sums over ranks are exact; and as many as the others, for
        # under ZeRO-3 they run each forward together. Where one is missing, sample 0 fills up and counts for nothing.
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        rounds = math.ceil(len(self.val) / ranks)
        places = [rank + i * ranks for i in range(rounds)]
        mine = [(i, True) if i < len(self.val) else (0, False) for i in places]
        return self._loader(
            _Counted(self.val, mine), batch_size=self.micro_batch_size, collate_fn=self.collate_questions
        )

    test_dataloader = val_dataloader

    def collate_questions(self, samples: list[tuple[dict, bool]]) -> dict:
        """A validation batch: the conversations, the first question of each alone, and what it should be answered.

        A last sample that only fills up has no labels and no answer: `answers` is then shorter than the batch.
        """
        records = [{**sample, "conversations": check_turns(sample["conversations"])} for sample, _ in samples]
        counted = sum(counts for _, counts in samples)
        batch = self.collate(records)
        batch["labels"][counted:] = IGNORE_INDEX
        supervised = batch["labels"][:, 1:] != IGNORE_INDEX
        batch |= {"predicts": supervised.any(0).nonzero().flatten(), "supervised": int(supervised.sum())}
        answers = [record["conversations"][1]["value"] for record in records[:counted]]
        return {**batch, "prompts": self.collate.prompts(records), "answers": answers}

    def _loader(self, dataset, loader=DataLoader, **kwargs) -> DataLoader:
        return loader(dataset, num_workers=self.num_workers, pin_memory=torch.cuda.is_available(), **kwargs)

    def settings(self) -> dict[str, Any]:
        """What decides which samples a step sees, and how they are fed."""
        return {
            "annotations": len(self.train),
            "batch_size": self.batch_size,
            "group_by_length": self.group_by_length,
            "max_length": self.collate.max_length,
            "template": self.collate.template,
            "seed": self.seed,
        }

    def state_dict(self) -> dict:
        """How far the epoch is, so that a resumed run goes on with the next batch instead of the first."""
        return {"trained_micro_batches": self.trainer.fit_loop.epoch_loop.batch_progress.current.processed}

    def load_state_dict(self, state: dict) -> None:
        self.trained_micro_batches = state["trained_micro_batches"]


class _Counted(Dataset):
    """Samples by index, each with whether it counts."""

    def __init__(self, samples: Instructions, chosen: list[tuple[int, bool]]):
        self.samples, self.chosen = samples, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[dict, bool]:
        place, counts = self.chosen[index]
        return self.samples[place], counts
