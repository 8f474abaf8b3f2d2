"""Trains a probe at every site of a frozen MLLM, all on the same forward.

The probes are independent problems: their losses are summed without clipping across them, and each keeps the weights of
its own best epoch. Source: App. A.2.

Shapes: S sites, B images, T image tokens on a grid h x w, d width, K classes.
"""

from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn

from . import mllm as mllms
from .heads import LinearProbe
from .loss import strided, upsampled_cross_entropy
from .metrics import IGNORE_INDEX, Counts, SegmentationMetric
from .results import save_run
from .statistics import dataset_scores


class ProbeModule(LightningModule):
    """A frozen MLLM and a linear probe at each of its sites.

    Args:
        mllm: Checkpoint directory or hub id.
        num_classes: K; the command line links it from the data.
        image_attention: Runs the model under another mask than it was trained with.
        untrained: Parts whose weights are drawn anew, for controls: adapter, llm.
        image_aspect: How images become squares: square (resized) or pad (LLaVA's own), see probes/geometry.py.
        mllm_dtype: What the model runs in: auto (as its checkpoint is stored), bfloat16, float16 or float32. Probes are
            in float32 in any case.
        sites: Those to probe; None for all.
        feature_norm: none (the paper), batchnorm or layernorm before the linear layer.
        learning_rate: Of AdamW; it falls as a polynomial of degree 0.9 to zero.
        betas: AdamW's.
        weight_decay: AdamW's.
        label_stride: s > 1 trains on each s-th pixel row and column of the masks, for a fraction of the loss's cost;
            scores are of all pixels.
        seed: Of the control's weights; the command line links it from seed_everything.
    """

    def __init__(
        self,
        mllm: str,
        num_classes: int = 150,
        image_attention: str | None = None,
        untrained: list[str] | None = None,
        image_aspect: str = "square",
        mllm_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
        sites: list[str] | None = None,
        feature_norm: str = "none",
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        label_stride: int = 1,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.strict_loading = False  # checkpoints hold the probes; the MLLM is where it was loaded from
        self.mllm = None
        self.history: dict[str, list[float]] = {}
        self.best: dict[str, dict[str, Tensor]] = {}

    def configure_model(self) -> None:
        if self.mllm is not None:
            return
        args = self.hparams
        self.mllm = mllms.load(
            args.mllm,
            args.image_attention,
            dtype=args.mllm_dtype,
            device="cpu",
            image_aspect=args.image_aspect,
            untrained=args.untrained or (),
            seed=args.seed,
        )
        self.sites = self.mllm._known(args.sites)
        self.heads = nn.ModuleDict({site: self._new_head(site) for site in self.sites})
        images = len(self.trainer.datamodule.splits["validation"])
        self.metric = SegmentationMetric(len(self.sites), images, args.num_classes, self.mllm.geometry, confusion=True)

    def _new_head(self, site: str) -> LinearProbe:
        """A probe drawn from a generator of its own, so that a site begins alike whatever other sites there are."""
        args = self.hparams
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed * 1_000_003 + self.mllm.sites.index(site))
            return LinearProbe(self.mllm.widths[site], args.num_classes, args.feature_norm)

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """Logits of all probes on the token grid, f[S, B, K, h, w], in fp32 whatever the states are in."""
        states = batch["states"] if "states" in batch else self.mllm.states(batch["pixels"], self.sites)
        logits = torch.stack([self.heads[site](states[site].float()) for site in self.sites])
        return logits.transpose(-1, -2).unflatten(-1, self.mllm.grid)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.losses(self.logits(batch), batch["target"])
        for site, loss in zip(self.sites, losses.detach(), strict=True):
            self.log(f"train_loss/{site}", loss, batch_size=len(batch["index"]))
        return losses.sum()

    def losses(self, logits: Tensor, target: Tensor | list[Tensor]) -> Tensor:
        """Mean cross-entropy over the labelled pixels of the batch, at the masks' own resolution, f[S].

        Of the global batch: with several ranks, a rank's share is such that DDP's average over ranks is that mean.
        """
        view, stride = self.mllm.geometry.view, self.hparams.label_stride
        valid = _mean_over_ranks(sum((strided(t, stride) != IGNORE_INDEX).sum() for t in target)).clamp(min=1)
        losses = [
            upsampled_cross_entropy(
                logits[:, images], t, IGNORE_INDEX, view=view(t.shape[-2:]), label_stride=stride, reduction="sum"
            )
            for images, t in by_size(target)
        ]
        return sum(losses) / valid

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Counts the batch's images; returns their logits f[S, B, K, h, w] for callbacks."""
        logits = self.logits(batch)
        for images, target in by_size(batch["target"]):
            self.metric.update(logits[:, images], target, batch["index"][images])
        return logits

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Scores every site and keeps the weights of those that were never better."""
        score = dataset_scores(self._counts())
        for i, site in enumerate(self.sites):
            miou = score.miou[i].item()
            self.log(f"miou/{site}", miou)
            self.log(f"pacc/{site}", score.pacc[i].item())
            if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
                continue
            if miou > max(self.history.setdefault(site, []), default=-1.0):
                self.best[site] = {k: v.detach().cpu().clone() for k, v in self.heads[site].state_dict().items()}
            self.history[site].append(miou)

    def on_test_start(self) -> None:
        """The last pass goes with each probe's best epoch."""
        for site, weights in self.best.items():
            self.heads[site].load_state_dict(weights)

    def on_test_epoch_end(self) -> None:
        counts = self._counts()
        if self.trainer.is_global_zero:
            save_run(self, self.trainer.datamodule, counts, self.trainer.default_root_dir)

    def _counts(self) -> Counts:
        counts = self.metric.compute()
        self.metric.reset()
        return counts

    def configure_optimizers(self) -> dict[str, Any]:
        args = self.hparams
        optimizer = torch.optim.AdamW(
            self.heads.parameters(), args.learning_rate, tuple(args.betas), weight_decay=args.weight_decay, fused=True
        )
        steps = self.trainer.datamodule.steps_per_epoch * self.trainer.max_epochs
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("heads.")}
        checkpoint["best"], checkpoint["history"] = self.best, self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best, self.history = checkpoint["best"], checkpoint["history"]


def _mean_over_ranks(count: Tensor) -> Tensor:
    """As many pixels as a rank has on average."""
    if not torch.distributed.is_initialized():
        return count
    total = count.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def by_size(target: Tensor | list[Tensor]) -> list[tuple[Any, Tensor]]:
    """Groups a batch's masks by size: (which images, uint8[n, H, W]); one group where all are alike."""
    if isinstance(target, Tensor):
        return [(slice(None), target)]
    sizes = {}
    for i, mask in enumerate(target):
        sizes.setdefault(mask.shape, []).append(i)
    return [(images, torch.stack([target[i] for i in images])) for images in sizes.values()]
