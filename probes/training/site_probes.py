"""Probes at every site of a frozen MLLM: loading, states, logits, and the scores on the validation split.

`module.py` trains the probes by gradient descent, `solver.py` solves them.

Legend: S sites, N images of a dataset, B images of a batch, T image tokens on a grid h x w, d width, K channels of a
probe: of segmentation, classes.
"""

from typing import Any

import torch
from lightning import LightningModule
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from llava_bidir.common.identity import Identity, run_identity
from llava_bidir.common.rank_zero import rank_zero_result
from probes.data.batches import MaskPreparer, group_by_mask_size
from probes.evaluation.image_metrics import TaskMetric
from probes.models.load import load
from probes.models.matched_updates import MATCH_IMAGES
from probes.tasks import SEGMENTATION, TASKS, Task

from .heads import Probe
from .write_run import save_run


class SiteProbes(LightningModule):
    """A frozen MLLM and a probe at each of its sites.

    A subclass saves the hyperparameters `mllm`, `num_classes`, `image_attention`, `untrained`, `match`, `draw`,
    `image_px`, `image_resize`, `dtype`, `prefix`, `sites` and `seed`.

    Args:
        head: Name of the probes' head, see heads.py.
        feature_norm: Normalisation of the states before the head.
    """

    nodes = 3  # per cell and axis of the loss's quadrature, see probes/ops/README.md

    def __init__(self, head: str = "linear", feature_norm: str = "none"):
        super().__init__()
        self.head = head
        self.feature_norm = feature_norm
        self.mllm = None
        self.task: Task | None = None
        self.identity: Identity | None = None
        self.validated_at: list[int] = []  # optimizer steps
        self.epochs: list[int | float] = []  # the same in epochs; fractional within an epoch
        self.history: dict[str, list[float]] = {}  # main score by site

    def models(self) -> dict[str, str]:
        """Return the paths of the models that the run is made from, by setting."""
        return {"mllm": self.hparams.mllm}

    def setup(self, stage: str) -> None:
        """Compute the identity of a run that is not started by the command line."""
        if stage in ("fit", "test") and self.identity is None:

            def compute():
                return run_identity(self.trainer, self, self.trainer.datamodule)

            self.identity = rank_zero_result(self.trainer, compute)

    def configure_model(self) -> None:
        """Build everything on the CPU: generators of a CPU cannot draw on the GPU that is Lightning's default here."""
        with torch.device("cpu"):
            self.build()

    def build(self) -> None:
        """Load the MLLM and build probes and metrics."""
        if self.mllm is not None:
            return
        args = self.hparams
        data = self.trainer.datamodule
        matched = self.hparams.match == "update"
        match_images = ()
        if matched:
            match_images = evenly_spaced_images(data.splits["training"], MATCH_IMAGES)
        self.mllm = load(
            args.mllm,
            args.image_attention,
            dtype=args.dtype,
            device=self.trainer.strategy.root_device if matched else "cpu",
            image_px=args.image_px,
            image_resize=args.image_resize,
            prefix=args.prefix,
            untrained=args.untrained or (),
            match=args.match,
            draw=args.draw,
            match_images=match_images,
            seed=args.seed,
        )
        self.sites = self.mllm.check_sites(args.sites)
        self.task = TASKS[data.task]
        # layers of the encoder last: the other sites keep their numbers, with or without them
        self._numbered_sites = list(dict.fromkeys([*self.mllm.sites, *self.sites]))
        self.heads = nn.ModuleDict({site: self._build_probe(site) for site in self.sites})
        self.metric = TaskMetric(self.task, len(data.splits["validation"]), self.mllm.geometry)

    @property
    def channels(self) -> int:
        """Outputs of a probe for each token."""
        return self.task.channels or self.hparams.num_classes

    def _build_probe(self, site: str) -> Probe:
        """Return a probe whose initialisation does not depend on the other probes of the run."""
        with torch.random.fork_rng(devices=[]):
            number = self._numbered_sites.index(site)
            torch.manual_seed(self.hparams.seed * 1_000_003 + number)
            return Probe(
                self.mllm.widths[site], self.channels, self.mllm.grid, self.feature_norm, self.head
            )

    def mask_preparer(self) -> MaskPreparer | None:
        """Return what prepares training masks for the loss; None if the probes are not trained on masks of classes."""
        if self.task.name != SEGMENTATION:
            return None
        return MaskPreparer(self.mllm.geometry, self.channels, self.nodes)

    def states(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the states f[B, T, d] by site, in the dtype of the model."""
        return (
            batch["states"] if "states" in batch else self.mllm.states(batch["pixels"], self.sites)
        )

    def logits(self, states: dict[str, Tensor]) -> Tensor:
        """Return the logits of the probes on the token grid, f32[S, B, K, h, w]."""
        logits = torch.stack([self.heads[site](states[site].float()) for site in self.sites])
        return logits.transpose(-1, -2).unflatten(-1, self.mllm.grid)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Count the images of the batch; return the logits f[S, B, K, h, w] for callbacks."""
        return self._score(self.states(batch), batch)

    test_step = validation_step

    def _score(self, states: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        logits = self.logits(states)
        for images, target in group_by_mask_size(batch["target"]):
            self.metric.update(logits[:, images], target, batch["index"][images])
        return logits

    def on_test_epoch_end(self) -> None:
        """Write the files of the run."""
        counted = self._compute()
        path = self.path_results(counted)
        if self.trainer.is_global_zero:
            save_run(self, self.trainer.datamodule, counted, path, self.trainer.default_root_dir)

    def probe_settings(self) -> dict[str, Any]:
        """Return how the probes were made, for metrics.json."""
        raise NotImplementedError

    def path_results(self, counted: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the content of metrics.json["path"] and of path.safetensors; empty if there is no path.

        Args:
            counted: What the task counts of the probes of the run.
        """
        return {}, {}

    def _compute(self) -> dict[str, Tensor]:
        """Return what the task counts of each image, by name, on the CPU."""
        counted = self.metric.compute()
        self.metric.reset()
        return {name: x.cpu() for name, x in counted.items()}


def evenly_spaced_images(dataset: Dataset, count: int) -> list[Image.Image]:
    """Return at most `count` images of a dataset, at equal distances from the first on."""
    count = min(count, len(dataset))
    return [dataset[i * len(dataset) // count]["image"] for i in range(count)]
