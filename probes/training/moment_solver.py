"""LightningModule of a pass over the training split that sums moments of every site, fold by fold.

What follows from the moments is up to the subclass: `solver.py` for classes, `least_squares_solver.py` for values. A
killed run resumes from the moments that it has saved. The validation split is scored last, along the whole path of
strengths.

Legend: F folds, R strengths, B images, T tokens, d width, K channels of a probe.
"""

import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import Metric
from tqdm import tqdm

from llava_bidir.common.errors import UserError
from probes.data.available_memory import available_memory
from probes.data.batches import group_by_mask_size
from probes.data.samplers import Batches, assign_folds, fold_batches
from probes.evaluation.bootstrap import task_scores
from probes.evaluation.task_metric import TaskMetric

from . import solver_progress
from .closed_form import STRENGTHS
from .distributed import all_reduce, broadcast, rank, rank_count
from .frozen_probes import FrozenProbes
from .moments import Moments, packed_size
from .probe_path import PathMetric, ProbePath
from .state_sample import centre

SAVE_SECONDS = 600  # between two files of moments
SCORE_BYTES = 2**30  # of logits at a time when the path is scored; a batch of 64 at 7B has 19 GB
CLOSED_FORM = "closed_form"


def spread(sites: list[str], count: int) -> list[str]:
    """Return at most `count` of the sites: the first two, and others at equal distances up to the last."""
    first, others = sites[:2], sites[2:]
    wanted = min(max(0, count - 2), len(others))
    return (first + [others[-1 - i * len(others) // wanted] for i in reversed(range(wanted))])[: max(0, count)]


class MomentSolver(FrozenProbes):
    """Linear probes for every strength of regularisation; see :class:`FrozenProbes`.

    Args:
        folds: F, folds of training images for the cross-validation; each has moments of its own.
        strengths: Strengths of the closed form, in (0, 1].
        shrink_to: Target of the shrinkage: "diagonal", or "trace".
        shared: Settings of `ProbeModule`, those that `solve.SHARED` names.
    """

    kind: type[Moments] = Moments

    def __init__(
        self,
        folds: int = 4,
        strengths: tuple[float, ...] = STRENGTHS,
        shrink_to: str = "diagonal",
        **shared: Any,
    ):
        super().__init__(feature_norm="batchnorm")
        self.save_hyperparameters()  # those of subclasses, too
        self.passes = 0  # that are complete
        self.measuring = False  # the time of a pass, without solving
        self.resuming = False  # start from what a killed run has left
        self.fold_of: Tensor | None = None
        self.in_sample: Tensor | None = None  # bool[N], images whose states are kept in memory
        self.seen: Tensor | None = None  # bool[N], images whose moments a killed run has left
        self.added: Tensor | None = None  # bool[N], images whose moments this process has
        self.moments: dict[str, Moments] = {}
        self.paths: dict[str, ProbePath] = {}
        self.path_metrics: dict[str, Metric] = {}

    # ------------------------------------------------------------------------------------------------ pass
    def build(self) -> None:
        """Load the MLLM; set the images of the next pass, fold by fold."""
        super().build()
        data = self.trainer.datamodule
        if self.fold_of is None:
            training = data.splits["training"]
            self.fold_of = assign_folds(len(training), self.hparams.folds, self.hparams.seed, training.groups)
            self._check_memory()
            self.in_sample = self._choose_sample()
            self.seen, self.added = (torch.zeros(len(training), dtype=torch.bool) for _ in range(2))
            if self.resuming:
                self._resume()
        batches = fold_batches(self.fold_of, data.rank_batch_size, rank(), rank_count())
        if self.passes == 0:  # a resumed run still needs the states of the sample
            left = [batch for batch in batches if (~self.seen | self.in_sample)[batch].any()]
            batches = left or batches[:1]  # Lightning skips a pass without batches, and with it what follows the pass
        data.pass_batches = Batches(batches)

    def _check_memory(self) -> None:
        """State the memory of the moments.

        Raises:
            UserError: They do not fit; the message proposes sites that do.
        """
        folds, channels = self.hparams.folds, self.channels
        width = self.mllm.widths
        size = {site: 8 * folds * (packed_size(width[site]) + channels * width[site]) for site in self.sites}
        available = self._available_memory()
        need, share = sum(size.values()), 0.8 * available
        text = f"moments of {len(size)} sites in {folds} folds: {need / 1e9:.3g} GB per process"
        rank_zero_info(text)
        if need > share:
            kept = spread(self.sites, int(share / max(size.values())))
            advice = f"fewer --folds, or fewer sites, e.g. --model.sites '[{', '.join(kept)}]'" if kept else "--folds 2"
            raise UserError(f"{text}, but {available / 1e9:.3g} GB are available; choose {advice}")

    def _available_memory(self) -> int:
        """Return the bytes that are left for moments beside the model and the states of a batch."""
        device, tokens = self.trainer.strategy.root_device, self.mllm.grid[0] * self.mllm.grid[1]
        available = available_memory() // max(1, self.trainer.num_devices)
        if device.type == "cuda":
            elsewhere = [x for x in (*self.mllm.parameters(), *self.mllm.buffers()) if x.device != device]
            available = torch.cuda.mem_get_info(device)[0] - sum(x.nbytes for x in elsewhere)  # which will be there
        per_image = tokens * self.mllm.model.dtype.itemsize * sum(self.mllm.widths[site] for site in self.sites)
        return max(0, available - self.trainer.datamodule.rank_batch_size * per_image)

    def _choose_sample(self) -> Tensor:
        """Return the images whose states are kept, bool[N]."""
        return torch.zeros(len(self.fold_of), dtype=torch.bool)

    @property
    def checkpoints(self) -> Path:
        """Folder of the files from which a killed run goes on."""
        return Path(self.trainer.default_root_dir) / "checkpoints"

    def _resume(self) -> None:
        """Read what a killed run has left: all moments on the first process, what they contain on every one."""
        found = [solver_progress.load(file, self.identity) for file in solver_progress.moment_files(self.checkpoints)]
        for tensors in sorted(found, key=lambda tensors: -tensors["seen"].sum()):
            if not (tensors["seen"] & ~self.seen).any():
                continue  # contained in a larger file, whose process resumed before
            self.seen |= tensors["seen"]
            if rank() == 0:
                device = self.trainer.strategy.root_device
                solver_progress.add_tensors(self.moments, tensors, self.sites, device, self.kind)
                self.added |= tensors["seen"]

    def _save_moments(self) -> None:
        """Save the moments of this process."""
        file = self.checkpoints / f"moments_{rank()}.safetensors"
        solver_progress.save(file, solver_progress.moments_to_tensors(self.moments, self.added), self.identity)
        self.saved_at = time.monotonic()

    def on_predict_start(self) -> None:
        """Prepare the sums before the first pass."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends a run at once, to be resumed; Lightning's waits for a pass
        if self.passes == 0:
            self.saved_at = time.monotonic()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add a batch to the moments."""
        self._add_moments(self.states(batch), batch, self._fold(batch))

    def _fold(self, batch: dict[str, Any]) -> int:
        return int(self.fold_of[batch["index"][0]])

    def _add_moments(self, states: dict[str, Tensor], batch: dict[str, Any], fold: int) -> None:
        """Add a batch of one fold to the moments of every site; images that a killed run has left count for nothing."""
        index = batch["index"].cpu()
        for site, x in states.items():
            if site not in self.moments:
                pivot = x.flatten(0, 1).float().mean(0)
                self.moments[site] = self.kind.zeros(pivot, self.hparams.folds, self.channels)
        self._add_images(states, batch, fold)
        self.added[index[~self.seen[index]]] = True
        if not self.measuring and time.monotonic() - self.saved_at > SAVE_SECONDS:
            self._save_moments()

    def _add_images(self, states: dict[str, Tensor], batch: dict[str, Any], fold: int) -> None:
        raise NotImplementedError

    def loss_options(self, target: Tensor) -> dict[str, Any]:
        """Return `view` and `label_stride` of the loss for targets [B, H, W, ...]."""
        return {"view": self.mllm.geometry.view(tuple(target.shape[1:3])), "label_stride": self.hparams.label_stride}

    @property
    def finished(self) -> bool:
        """No further pass is needed or allowed."""
        return self.passes > 0

    def solving(self, sites: list[str]) -> Iterable[str]:
        """Return the sites with a progress bar; at 7B, the closed forms of a site take minutes on a CPU."""
        return tqdm(sites, desc="solving sites", disable=rank() > 0, mininterval=5)

    def _sum_over_ranks(self, site: str) -> Moments:
        """Return the moments of all processes' images; a process may have had none."""
        width, folds = self.mllm.widths[site], self.hparams.folds
        empty = self.kind.zeros(torch.zeros(width, device=self.device), folds, self.channels)
        moments = self.moments.pop(site, empty)
        moments.shift(broadcast(moments.pivot.clone(), 0))
        for total in moments.sums().values():
            all_reduce(total)
        return moments

    def _set_norm(self, site: str, mean: Tensor, scale: Tensor) -> None:
        """Let the site's probe standardise states by their mean f64[d] and D^-1/2 f64[d]."""
        norm = self.heads[site].norm
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(torch.where(scale > 0, scale.clamp(min=1e-30).pow(-2), 1))

    # ------------------------------------------------------------------------------------------------ results
    def _set_probes(self, path: ProbePath) -> None:
        """Give each site the probe of its best strength on a path."""
        for site in self.sites:
            head, norm, best = self.heads[site].head, self.heads[site].norm, path.best(site)
            head.weight.copy_(path.weights[site][best] * (norm.running_var + norm.eps).sqrt())
            head.bias.copy_(path.bias[site][best])
        weakest = [site for site in self.sites if path.best(site) == 0 and len(path.strengths) > 1]
        if weakest:
            sites = ", ".join(weakest)
            rank_zero_info(f"the weakest strength, {path.strengths[0]:g}, was chosen at {sites}; consider weaker ones")

    def on_test_start(self) -> None:
        """Prepare the scores of the path."""
        images, geometry = len(self.trainer.datamodule.splits["validation"]), self.mllm.geometry
        for name, path in self.paths.items():
            probes = len(path.strengths) * len(self.sites)
            if self.task:
                metric = TaskMetric(self.task, images, geometry)
            else:
                metric = PathMetric(probes, images, self.hparams.num_classes, geometry)
            self.path_metrics[name] = metric.to(self.device)

    def _score(self, states: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        for part in self._parts(len(batch["index"])):
            index = batch["index"][part]
            centred = {site: centre(x[part], self.heads[site].norm.running_mean) for site, x in states.items()}
            for name, path in self.paths.items():
                logits = path.logits(centred, self.mllm.grid)
                for images, masks in group_by_mask_size(batch["target"][part]):
                    self.path_metrics[name].update(logits[:, images], masks, index[images])
        return super()._score(states, batch)

    def _parts(self, images: int) -> list[slice]:
        """Return parts of a batch that have at most `SCORE_BYTES` of logits, or one image each."""
        probes = max(len(path.strengths) for path in self.paths.values()) * len(self.sites)
        per_image = 4 * probes * self.channels * self.mllm.grid[0] * self.mllm.grid[1]
        size = max(1, SCORE_BYTES // per_image)
        return [slice(start, start + size) for start in range(0, images, size)]

    def probe_settings(self) -> dict[str, Any]:
        """Return how the probes were solved, for metrics.json."""
        settings = {key: self.hparams[key] for key in ("seed", "folds", "shrink_to", "label_stride")}
        return {"head": "linear", "feature_norm": "batchnorm", "labels": "true", "solved": self.instrument} | settings

    @property
    def instrument(self) -> str:
        """Name of the path from which the probes are taken."""
        return CLOSED_FORM

    def path_results(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the content of metrics.json["path"] and of path.safetensors."""
        scores = {"passes": self.passes, "sample_images": int(self.in_sample.sum())}
        tensors = {}
        for name, path in self.paths.items():
            results = self.path_metrics[name].compute()
            if self.task:
                scores[name] = path.entries(task_scores(self.task, results.sums), self.sites, "cv_loss")
                tensors[f"{name}/sums"] = results.sums.unflatten(0, (len(path.strengths), len(self.sites))).contiguous()
            else:
                scores[name] = path.to_json(results, self.sites)
                tensors |= path.tensors(results, name, len(self.sites))
        return scores, tensors
