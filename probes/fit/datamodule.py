"""LightningDataModule of probes that are trained: images in random order, and states that are kept in memory."""

import math

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from llava_bidir.common.processes import rank, rank_count
from probes.config import DataOptions
from probes.data.batches import CachedFeatures, MaskPreparer, PreprocessedDataset
from probes.data.probe_data import ProbeData
from probes.data.random_crops import RandomCrops
from probes.data.samplers import TrainingBatches
from probes.data.windows import TrainingSamples, training_samples
from probes.models.frozen_mllm import FrozenMLLM


class ProbeDataModule(LightningDataModule):
    """Images and targets of a run that trains.

    Args:
        root: Folder of the dataset.
        seed: As of :class:`.ProbeData`; linked from seed_everything by the command line.
        **options: Other fields of :class:`probes.config.DataOptions`.
    """

    _is_read = False  # every image
    trained_batches = 0  # of the epoch, before a resume
    _samples: TrainingSamples | None = None  # until the model is loaded

    def __init__(self, root: str, seed: int = 0, **options):
        super().__init__()
        self.options = DataOptions(root=root, **options)
        self.data = ProbeData(self.options, seed)
        self.save_hyperparameters(self.data.hparams, logger=False)

    @property
    def num_classes(self) -> int:
        """Number of classes, which the command line gives to the model."""
        return self.data.num_classes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, one a batch, at most `trainer.limit_train_batches`, at least one."""
        samples = self._samples or self.data.splits["training"]
        batches = math.ceil(len(samples) / self.data.batch_size)
        limit = self.trainer.limit_train_batches  # a number, or a share
        limited = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return max(1, limited)

    def epochs_of(self, steps: int) -> int | float:
        """Return the number of epochs that have so many optimizer steps, an integer if they are complete."""
        epochs = steps / self.steps_per_epoch
        return int(epochs) if epochs.is_integer() else epochs

    def setup(self, stage: str) -> None:
        """Read every image before training."""
        if stage == "fit" or not self._is_read:
            self._is_read = True
            self._cached: dict[str, CachedFeatures] = {}
            self.trainer.log_every_n_steps = min(
                self.trainer.log_every_n_steps, self.steps_per_epoch
            )
            self.data.verify(self.trainer.progress_bar_callback is not None)

    def train_dataloader(self) -> DataLoader:
        """Return the loader of one training epoch; after a resume, of the batches not trained yet."""
        source = self._source("training")
        batches = TrainingBatches(
            images=len(source),
            batch_size=self.data.batch_size,
            rank=rank(),
            world_size=rank_count(),
            seed=self.data.seed,
            are_random=self.options.random_scale is not None,
        )
        batches.skip(self.trained_batches % self.steps_per_epoch)
        self.trained_batches = 0
        return self.data.loader(source, batches)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of the validation images."""
        return self.data.validation_loader(self._source("validation"))

    test_dataloader = val_dataloader

    def read_for(self, mllm: FrozenMLLM, sites: list[str], prepare: MaskPreparer | None) -> None:
        """Set what images are read for, by the loaders that follow.

        Args:
            mllm: The model that preprocesses them.
            sites: Sites whose states are cached, if they are.
            prepare: Prepares training masks for the loss; None to leave them.
        """
        self._reader = (mllm, sites, prepare)
        self.training_samples(mllm)

    def training_samples(self, mllm: FrozenMLLM) -> TrainingSamples:
        """Return what the model sees of the training photos."""
        if self._samples is None:
            photos = self.data.splits["training"]
            if self.options.random_scale is None:
                self._samples = training_samples(photos, mllm)
            else:
                self._samples = RandomCrops(photos, mllm, self.options, self.data.seed)
        return self._samples

    def _source(self, split: str) -> PreprocessedDataset | CachedFeatures:
        """Return the images of a split as the model takes them, or their states if these are kept."""
        mllm, sites, prepare = self._reader
        if split == "training":
            images = self.training_samples(mllm)
            source = self.data.read_images(images, images.preprocess, prepare)
        else:
            source = self.data.read_images(self.data.splits[split], mllm.preprocess)
        if not self.data.hparams["cache_features"]:
            return source
        if split not in self._cached:
            # the precision of states that are not cached
            with self.trainer.precision_plugin.forward_context():
                self._cached[split] = CachedFeatures(
                    mllm,
                    source,
                    sites,
                    batch_size=self.data.rank_batch_size,
                    workers=self.data.num_workers,
                    copies=self.trainer.num_devices,
                    name=f"{self.data.name} {split}",
                )
        return self._cached[split]

    def state_dict(self) -> dict[str, int]:
        """Return the position in the epoch, at which a resumed run continues."""
        return {
            "trained_batches": self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position in the epoch."""
        self.trained_batches = state["trained_batches"]
