"""Trains a probe at every site of a frozen MLLM, all on the same forward, under one or several recipes.

The probes are independent problems: their losses are summed without clipping across them, and each keeps the weights of
its own best epoch. Source: App. A.2.

Shapes: S sites, B images, T image tokens on a grid h x w, d width, K classes.
"""

from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn

from llava_bidir.common.checkpoint_io import check_resume_compatible
from llava_bidir.common.errors import UserError
from probes.data.batches import group_by_mask_size
from probes.data.samplers import PAD_INDEX
from probes.evaluation.bootstrap import dataset_scores
from probes.evaluation.feature_statistics import StateStatistics
from probes.evaluation.metrics import IGNORE_INDEX, Counts, SegmentationMetric, patch_labels
from probes.models import frozen_mllm as mllms
from probes.ops.cross_entropy import subsample, upsampled_cross_entropy

from .distributed import all_gather
from .heads import FEATURE_NORMS, HEADS, Probe
from .probe_variants import LABELS, ProbeVariant, all_recipes, probe_name
from .write_run import save_run


class ProbeModule(LightningModule):
    """A frozen MLLM and, for each recipe, a probe at each of its sites.

    Args:
        mllm: Checkpoint directory or hub id.
        num_classes: K; the command line links it from the data.
        image_attention: Runs the model under another mask than it was trained with.
        untrained: Parts whose weights are drawn anew, for controls: adapter, llm.
        image_resize: How images become squares: squash (resized) or pad (LLaVA's own), see probes/ops/geometry.py.
        dtype: What the model runs in: auto (as its checkpoint is stored), bfloat16, float16 or float32. Probes are
            in float32 in any case.
        sites: Those to probe; None for all.
        head: linear (the paper), or another, see probes/training/heads.py.
        feature_norm: none (the paper), batchnorm or layernorm before the head.
        labels: "true", or "shuffled" for the control that trains on the masks of other images.
        learning_rate: Of AdamW; it falls as a polynomial of degree 0.9 to zero.
        betas: AdamW's.
        weight_decay: AdamW's.
        label_stride: s > 1 trains on each s-th pixel row and column of the masks, for a fraction of the loss's cost;
            scores are of all pixels.
        recipes: Further ones by name, each with what differs of head, feature_norm, labels, learning_rate and seed; see
            `probe_variants.py`. They leave the probes of the main one as they are.
        seed: Of the probes' and the control's weights; the command line links it from seed_everything.
    """

    def __init__(
        self,
        mllm: str,
        num_classes: int = 150,
        image_attention: str | None = None,
        untrained: list[str] | None = None,
        image_resize: str = "squash",
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
        sites: list[str] | None = None,
        head: Literal[*HEADS] = "linear",
        feature_norm: Literal[*FEATURE_NORMS] = "none",
        labels: Literal[*LABELS] = "true",
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        label_stride: int = 1,
        recipes: dict[str, dict[str, Any]] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.recipes = all_recipes(ProbeVariant(head, feature_norm, learning_rate, labels, seed), recipes or {})
        self.strict_loading = False  # checkpoints hold the probes; the MLLM is where it was loaded from
        self.mllm = None
        self.validated_at: list[int] = []  # optimizer steps
        self.epochs: list[int | float] = []  # the same in epochs, a fraction where it is within one
        self.history: dict[str, list[float]] = {}  # by probe, see `probe_name`
        self.best: dict[str, dict[str, Tensor]] = {}

    def configure_model(self) -> None:
        if self.mllm is not None:
            return
        args, data = self.hparams, self.trainer.datamodule
        self.mllm = mllms.load(
            args.mllm,
            args.image_attention,
            dtype=args.dtype,
            device="cpu",
            image_resize=args.image_resize,
            untrained=args.untrained or (),
            seed=args.seed,
        )
        self.sites = self.mllm.check_sites(args.sites)
        self.heads = nn.ModuleDict({probe_name(r, site): self._new_head(r, site) for r, site in self._probes()})
        images = len(data.splits["validation"])
        counts = [len(self.sites), images, args.num_classes, self.mllm.geometry]
        # Only the main recipe is counted token by token, and by pairs of classes.
        self.metrics = nn.ModuleList(
            SegmentationMetric(*counts, by_token=name is None, confusion=name is None) for name in self.recipes
        )
        self.statistics = StateStatistics({site: self.mllm.widths[site] for site in self.sites}, images)

    def _probes(self) -> list[tuple[str | None, str]]:
        """(recipe, site) of each probe."""
        return [(recipe, site) for recipe in self.recipes for site in self.sites]

    def _new_head(self, recipe: str | None, site: str) -> Probe:
        """A probe drawn from a generator of its own, so that it begins alike whatever other probes there are."""
        how = self.recipes[recipe]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(how.seed * 1_000_003 + self.mllm.sites.index(site))
            return Probe(self.mllm.widths[site], self.hparams.num_classes, self.mllm.grid, how.feature_norm, how.head)

    def states(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """f[B, T, d] by site, in the model's own dtype."""
        return batch["states"] if "states" in batch else self.mllm.states(batch["pixels"], self.sites)

    def logits(self, states: dict[str, Tensor], recipe: str | None) -> Tensor:
        """Logits of a recipe's probes on the token grid, f[S, B, K, h, w], in fp32 whatever the states are in."""
        logits = torch.stack([self.heads[probe_name(recipe, site)](states[site].float()) for site in self.sites])
        return logits.transpose(-1, -2).unflatten(-1, self.mllm.grid)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        states, target, total = self.states(batch), batch["target"], 0.0
        if (
            len(target) == 1 and batch["index"][0] == PAD_INDEX
        ):  # this rank has no image, and statistics must not see one
            states, target = {site: x[:0] for site, x in states.items()}, target[:0]
        # One recipe at a time, and its gradient at once: then what one keeps for the backward is gone before the next
        # one starts (at 7B, all sites, 64 images: 20 GB of states in fp32), and none touches another's rounding.
        targets = {kind: LABELS[kind](target) for kind in {how.labels for how in self.recipes.values()}}
        for name, recipe in self.recipes.items():
            losses = self.losses(self.logits(states, name), targets[recipe.labels])
            group = "" if name is None else f"recipes/{name}/"
            for site, loss in zip(self.sites, losses.detach(), strict=True):
                self.log(f"{group}train_loss/{site}", loss, batch_size=len(batch["index"]))
            total = total + linearised(losses.sum(), self._parameters_of(name))
        return total

    def _parameters_of(self, recipe: str | None) -> list[nn.Parameter]:
        return [p for site in self.sites for p in self.heads[probe_name(recipe, site)].parameters()]

    def losses(self, logits: Tensor, target: Tensor | list[Tensor]) -> Tensor:
        """Mean cross-entropy over the labelled pixels of the batch, at the masks' own resolution, f[S].

        Of the global batch: with several ranks, a rank's share is such that DDP's average over ranks is that mean.
        """
        view, stride = self.mllm.geometry.view, self.hparams.label_stride
        labelled = ((subsample(t, stride) != IGNORE_INDEX).sum() for t in target)
        valid = all_gather(sum(labelled, logits.new_zeros((), dtype=torch.long))).double().mean().clamp(min=1)
        losses = [
            upsampled_cross_entropy(
                logits[:, images], t, IGNORE_INDEX, view=view(t.shape[-2:]), label_stride=stride, reduction="sum"
            )
            for images, t in group_by_mask_size(target)
            if len(t)
        ]
        return sum(losses, logits[:, :0].sum((1, 2, 3, 4))) / valid  # without images 0, whose gradient is 0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Counts the batch's images; returns the main recipe's logits f[S, B, K, h, w] for callbacks."""
        return self._score(self.states(batch), batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """As :meth:`validation_step`, and takes the statistics of the states."""
        states = self.states(batch)
        for images, target in group_by_mask_size(batch["target"]):
            view = self.mllm.geometry.view(tuple(target.shape[-2:]))
            labels = patch_labels(target, self.hparams.num_classes, self.mllm.grid, view=view)
            self.statistics.update({site: x[images] for site, x in states.items()}, labels, batch["index"][images])
        return self._score(states, batch)

    def _score(self, states: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        groups = group_by_mask_size(batch["target"])
        for name, metric in reversed(list(zip(self.recipes, self.metrics, strict=True))):
            logits = self.logits(states, name)
            for images, target in groups:
                metric.update(logits[:, images], target, batch["index"][images])
        return logits  # of the main recipe, which comes last

    def on_validation_epoch_end(self) -> None:
        """Scores every probe and keeps the weights of those that were never better."""
        fitting = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if fitting:
            step, steps_per_epoch = self.trainer.global_step, self.trainer.datamodule.steps_per_epoch
            self.validated_at.append(step)
            self.epochs.append(step / steps_per_epoch if step % steps_per_epoch else step // steps_per_epoch)
        for name in self.recipes:
            score, group = dataset_scores(self._counts(name)), "" if name is None else f"recipes/{name}/"
            for i, site in enumerate(self.sites):
                self.log(f"{group}miou/{site}", score.miou[i].item())
                self.log(f"{group}pacc/{site}", score.pacc[i].item())
                if fitting:
                    self._keep_if_best(probe_name(name, site), score.miou[i].item())

    def _keep_if_best(self, probe: str, miou: float) -> None:
        if miou > max(self.history.setdefault(probe, []), default=-1.0):
            self.best[probe] = {k: v.detach().cpu().clone() for k, v in self.heads[probe].state_dict().items()}
        self.history[probe].append(miou)

    def on_test_start(self) -> None:
        """The last pass goes with each probe's best epoch."""
        for probe, weights in self.best.items():
            self.heads[probe].load_state_dict(weights)

    def on_test_epoch_end(self) -> None:
        counts, states = {name: self._counts(name) for name in self.recipes}, self.statistics.compute()
        self.statistics.reset()
        if self.trainer.is_global_zero:
            save_run(self, self.trainer.datamodule, counts, states, self.trainer.default_root_dir)

    def _counts(self, recipe: str | None) -> Counts:
        metric = self.metrics[list(self.recipes).index(recipe)]
        counts = metric.compute()
        metric.reset()
        return counts

    def configure_optimizers(self) -> dict[str, Any]:
        args = self.hparams
        groups = [
            {"params": self._parameters_of(name), "lr": recipe.learning_rate}
            | ({} if len(self.recipes) == 1 else {"name": name or "main"})  # in the log of learning rates
            for name, recipe in self.recipes.items()
        ]
        optimizer = torch.optim.AdamW(groups, betas=tuple(args.betas), weight_decay=args.weight_decay, fused=True)
        steps = self.trainer.datamodule.steps_per_epoch * self.trainer.max_epochs
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("heads.")}
        checkpoint["data"] = self.trainer.datamodule.settings()
        checkpoint["best"], checkpoint["history"] = self.best, self.history
        checkpoint["validated_at"], checkpoint["epochs"] = self.validated_at, self.epochs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """
        Raises:
            UserError: It is of a run with other settings.
        """
        if self._trainer is not None and self.trainer.training:
            check_resume_compatible(checkpoint["hyper_parameters"], self.hparams, "model")
            check_resume_compatible(checkpoint["data"], self.trainer.datamodule.settings(), "data")
        saved = set(checkpoint["state_dict"])
        ours = saved if self.mllm is None else {f"heads.{key}" for key in self.heads.state_dict()}
        if saved != ours:
            raise UserError(
                f"the checkpoint and this run differ in {len(saved ^ ours)} tensors, {min(saved ^ ours)} for one; give "
                "the model.sites, model.recipes and heads that it was trained with"
            )
        self.best, self.history = checkpoint["best"], checkpoint["history"]
        self.validated_at, self.epochs = checkpoint["validated_at"], checkpoint["epochs"]


def linearised(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """A scalar with the gradient of `loss` by the parameters, of whose graph it keeps nothing: sum of p * dloss/dp."""
    gradients = torch.autograd.grad(loss, parameters)
    return sum((p * gradient).sum() for p, gradient in zip(parameters, gradients, strict=True))
