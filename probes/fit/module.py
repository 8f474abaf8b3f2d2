"""LightningModule that trains probes at every site of a frozen MLLM on the same forward.

The probes are independent problems: their losses are summed, gradients are not clipped across probes, and each probe
keeps the weights of its own best epoch. Source: App. A.2.

Legend: S sites, B images, T image tokens on a grid h x w, d width, K classes.
"""

import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import sha256
from llava_bidir.common.identity import Identity, check_same_identity, run_identity
from llava_bidir.common.processes import all_gather, decide_on_first
from llava_bidir.common.runs import RESUME_ADVICE, optimizer_steps
from probes.config import ModelOptions
from probes.data.batches import MaskPreparer, ProbeBatch
from probes.data.samplers import PAD_INDEX
from probes.heads import Probe, factory_of
from probes.models.module_sources import source_identity
from probes.runs.write import RunRecord, save_run
from probes.score.estimate import dataset_scores
from probes.score.image_metrics import TaskMetric
from probes.site_probes import SiteProbes, load_probes, save_predictions
from probes.tasks import Task

from .published_head import PROBE, is_published, read_published
from .schedule import rate_factor

VALIDATIONS = ("best", "history", "validated_at")  # kept in checkpoints
OF_PROBE = ("head", "feature_norm", "dropout", "init_std")  # options
NODES = 3  # per cell and axis of the loss's quadrature, see probes/ops/README.md


class ProbeModule(LightningModule):
    """Probes at every site of a frozen MLLM, trained by AdamW.

    Args:
        num_classes: K; linked from the data by the command line.
        seed: Seed of probes and re-initialised parts; linked from seed_everything by the command line.
        **options: Fields of :class:`probes.config.ModelOptions`, of which `mllm` must be given.

    Raises:
        UserError: There is no such head.
    """

    saves_predictions = False  # to predictions/SITE of the run's folder

    def __init__(self, num_classes: int = 150, seed: int = 0, **options):
        config = ModelOptions(**options)
        super().__init__()
        self.published: dict[str, Tensor] | None = None  # weights of a head that is scored as it is
        self.head_file = config.head
        if is_published(config.head):
            self.published = read_published(config.head)
            config = replace(config, **PROBE)
        self.registered = [factory_of(config.head)]
        settings = {"num_classes": num_classes, "seed": seed, "flip": config.flip or None}
        self.save_hyperparameters(asdict(config) | settings)
        self.probes: SiteProbes | None = None  # until the model is configured
        self.task: Task | None = None
        self.identity: Identity | None = None
        self.validated_at: list[int] = []  # optimizer steps
        self.history: dict[str, list[float]] = {}  # main score by site
        # checkpoints hold the probes only; the MLLM is reloaded from its source
        self.strict_loading = False
        self.best: dict[str, dict[str, Tensor]] = {}

    def models(self) -> dict[str, str | dict[str, str]]:
        """Return the paths of the models that the run is made from, by setting, or what identifies a module."""
        models = {"mllm": source_identity(self.hparams.mllm)}
        if self.published is not None:
            models["head"] = {"": sha256(Path(self.head_file))}
        return models

    def setup(self, stage: str) -> None:
        """Compute the identity of a run that is not started by the command line."""
        if self.identity is None:
            data = self.trainer.datamodule.data
            self.identity = decide_on_first(run_identity, self.trainer, self, data)

    def configure_model(self) -> None:
        """Load the MLLM and build the probes."""
        if self.probes is not None:
            return
        data = self.trainer.datamodule.data
        device = self.trainer.strategy.root_device
        args = self.hparams
        probes = load_probes(
            args, data=data, device=device, **{name: args[name] for name in OF_PROBE}
        )
        geometry = probes.mllm.geometry
        if args.flip and geometry.covered_px != geometry.image_px:
            raise UserError(
                f"model.flip: patches cover {geometry.covered_px} of {geometry.image_px} px, so that those of a "
                "mirrored image are elsewhere; leave it out"
            )
        if self.published is not None:
            (probe,) = probes.heads.values()
            self._load_published(probe)
        self.probes = probes
        self.task = probes.task
        # as parts of this module, so that Lightning moves, trains and saves them
        self.mllm = probes.mllm
        self.heads = probes.heads
        images = len(data.splits["validation"])
        self.metric = TaskMetric(probes.task, images, probes.mllm.geometry)
        prepare = None
        if self.task.trained_on == "masks":
            samples = self.trainer.datamodule.training_samples(self.mllm)
            nodes = None if args.exact_loss else NODES
            prepare = MaskPreparer(samples.geometry, probes.channels, nodes)
        self.trainer.datamodule.read_for(self.mllm, probes.sites, prepare)

    def _load_published(self, probe: Probe) -> None:
        expected = probe.head.weight.shape
        shape = self.published["head.weight"].shape
        if shape != expected:
            raise UserError(
                f"model.head {self.head_file} predicts {shape[0]} classes, but the data have {expected[0]}; expected "
                "the data set that the head was trained on"
            )
        probe.load_state_dict(self.published)

    def training_step(self, batch: ProbeBatch, batch_idx: int) -> Tensor:
        """Return a loss with the gradients of all probes."""
        states = self.probes.states(batch)
        target = batch[self.task.trained_on]
        # padding must not enter batch statistics
        if len(target) == 1 and batch["index"][0] == PAD_INDEX:
            states = {site: x[:0] for site, x in states.items()}
            target = target[:0]
        logits = self.probes.logits(states)
        geometry = self.trainer.datamodule.training_samples(self.mllm).geometry
        total, count = self.task.training_losses(logits, target, geometry)
        if self.hparams.loss_average == "all_pixels":
            count = count.new_tensor(sum(map(torch.numel, batch["target"][: len(target)])))
        # DDP's average over ranks is the mean over labelled pixels, or images with values, of the global batch
        losses = total / all_gather(count).mean().clamp(min=1e-9)
        for site, loss in zip(self.probes.sites, losses.detach(), strict=True):
            self.log(f"train_loss/{site}", loss, batch_size=len(batch["index"]))
        return losses.sum()

    def validation_step(self, batch: ProbeBatch, batch_idx: int) -> Tensor:
        """Count the images of the batch; return the logits f[S, B, K, h, w]."""
        logits = self.probes.logits(self.probes.states(batch))
        if self.hparams.flip:
            mirrored = self.mllm.states(batch["pixels"].flip(-1), self.probes.sites)
            logits = (logits + self.probes.logits(mirrored).flip(-1)) / 2
        self.metric.update(logits, batch["target"], batch["index"])
        return logits

    def test_step(self, batch: ProbeBatch, batch_idx: int) -> None:
        """Count the images of the batch, and write the predictions of each probe of its best epoch, if asked to."""
        logits = self.validation_step(batch, batch_idx)
        if self.saves_predictions:
            names = self.trainer.datamodule.data.splits["validation"].names
            folder = Path(self.trainer.default_root_dir) / "predictions"
            save_predictions(self.probes, logits=logits, batch=batch, names=names, folder=folder)

    def on_validation_epoch_end(self) -> None:
        """Score every probe, and keep the weights of those with a new best score."""
        fitting = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if fitting:
            self.validated_at.append(self.trainer.global_step)
        scores = dataset_scores(self.task, self.task.sums(self._count_all()))
        for i, site in enumerate(self.probes.sites):
            for score, values in scores.items():
                self.log(f"{score}/{site}", values[i].item())
            if fitting:
                self._keep_if_best(site, scores[self.task.score][i].item())

    def _keep_if_best(self, site: str, score: float) -> None:
        past = self.history.setdefault(site, [])
        # a validation that is NaN neither is the best nor beats one
        is_beaten = any(self.task.sign * (score - earlier) <= 0 for earlier in past)
        if not is_beaten and not math.isnan(score):
            weights = self.heads[site].state_dict()
            self.best[site] = {name: w.detach().cpu().clone() for name, w in weights.items()}
        past.append(score)

    def on_test_start(self) -> None:
        """Load the weights of each probe's best epoch."""
        for site, weights in self.best.items():
            self.heads[site].load_state_dict(weights)

    def on_test_epoch_end(self) -> None:
        """Write the files of the run."""
        counted = self._count_all()
        datamodule = self.trainer.datamodule
        if self.trainer.is_global_zero:
            record = RunRecord(
                settings=self.hparams,
                identity=self.identity,
                probe=self.probe_settings(),
                history=self.history,
                epochs=[datamodule.epochs_of(step) for step in self.validated_at],
            )
            out = self.trainer.default_root_dir
            save_run(self.probes, record=record, data=datamodule.data, counted=counted, out=out)

    def _count_all(self) -> dict[str, Tensor]:
        counted = self.metric.compute()
        self.metric.reset()
        return counted

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW and the decay of its learning rate."""
        args = self.hparams
        steps = optimizer_steps(self.trainer)
        optimizer = torch.optim.AdamW(
            self.heads.parameters(),
            args.learning_rate,
            tuple(args.betas),
            weight_decay=args.weight_decay,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
        if args.schedule:
            factor = partial(
                rate_factor, steps=steps, decay=args.schedule, warmup=args.warmup_steps or 0
            )
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def probe_settings(self) -> dict[str, Any]:
        """Return how the probes were trained, for metrics.json."""
        datamodule = self.trainer.datamodule
        steps = 0
        if self.published is None:
            steps = optimizer_steps(self.trainer)
        kept = ("head", "feature_norm", "learning_rate", "seed")
        return {key: self.hparams[key] for key in kept} | {
            "batch_size": datamodule.data.batch_size,
            "epochs": datamodule.epochs_of(steps),
            "steps": steps,
            "validated_at": self.validated_at,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the probes without the frozen model, and the history of validations."""
        checkpoint["state_dict"] = {
            k: v for k, v in checkpoint["state_dict"].items() if k.startswith("heads.")
        }
        checkpoint["identity"] = self.identity
        checkpoint |= {name: getattr(self, name) for name in VALIDATIONS}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the history of validations.

        Raises:
            UserError: If the checkpoint is from a run with other settings.
        """
        if self._trainer is not None and self.trainer.training:
            check_same_identity(
                checkpoint.get("identity"),
                current=self.identity,
                source="the checkpoint",
                advice=RESUME_ADVICE,
            )
        for name in VALIDATIONS:
            setattr(self, name, checkpoint[name])
