"""Probes that are solved instead of trained for some epochs: passes over the training images, then scores.

`trainer.test` scores the probes on the validation split, as it does after `fit`. Before its first batch, `Solver`
solves them: `prepare` says which images a process reads, `add` takes each batch of the first pass, and `solve` returns
the probes. `optimum_solver.py` does so for classes, `least_squares_solver.py` for values.

Legend: S sites, R strengths that were solved, N images of a dataset, B of a batch, T tokens, d width, K channels of a
probe.
"""

import json
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from llava_bidir.common.atomic_io import atomic_write, write_tensors
from llava_bidir.common.errors import error_context
from llava_bidir.common.identity import check_same_identity
from llava_bidir.common.progress import LogProgress
from llava_bidir.common.run_folder import RESUME_ADVICE, StartOfRun
from probes.data.batches import MaskPreparer, group_by_mask_size
from probes.evaluation.image_metrics import TaskMetric
from probes.evaluation.resampling import dataset_scores
from probes.ops.cross_entropy import TIGHT_NODES, loss_and_gradient
from probes.ops.geometry import Geometry
from probes.ops.pixel_counts import count
from probes.ops.quadrature import PreparedMasks
from probes.tasks import SEGMENTATION, TASKS

from .closed_form import full_precision
from .distributed import rank, rank_count
from .optimum import Certificate
from .site_probes import SiteProbes

COUNTED = ("intersection", "predicted")  # counts of a probe, per image and class
SCORE_BYTES = 2**30  # of logits at a time when the path is scored; a batch of 64 at 7B has 19 GB


@dataclass
class SolvedSite:
    """Linear probes of a site.

    Args:
        strengths: f64[n], from strong to weak.
        loss: f64[n], cross-validated loss per pixel at each strength: cross-entropy in nats, or squared error.
        chosen: i64[], index of the chosen strength.
        solved: i64[R], indices of the strengths whose probes follow; the same number at each site.
        mean: f64[d] of the states.
        scale: f64[d], D^-1/2; 0 for constant channels.
        weights: f32[R, K, d], of x - mean.
        bias: f32[R, K].
        certificates: f64[R, 2], fields of `Certificate`; f64[0, 2] for the closed form.
    """

    strengths: Tensor
    loss: Tensor
    chosen: Tensor
    solved: Tensor
    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: Tensor
    certificates: Tensor

    @property
    def row(self) -> int:
        """Index of the chosen strength among those that were solved."""
        return self.solved.tolist().index(int(self.chosen))

    @full_precision()
    def logits(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the logits f32[R, B, K, h, w] of states f[B, T, d], on their device."""
        x = states.float() - self.mean.to(states.device).float()
        logits = (
            torch.einsum("btd,rkd->rbkt", x, self.weights.to(x)) + self.bias.to(x)[:, None, :, None]
        )
        return logits.unflatten(-1, grid)

    def entry(self, site: str, scores: dict[str, list[float]], loss_name: str) -> dict[str, Any]:
        """Return the site's entry of metrics.json["path"]; each list has a value, or null, for each strength.

        Args:
            site: Name of the site.
            scores: R scores by name.
            loss_name: Name of the cross-validated loss.
        """
        strengths = self.strengths.tolist()
        solved = self.solved.tolist()

        def along(values):
            return [dict(zip(solved, values, strict=True)).get(i) for i in range(len(strengths))]

        entry = {"site": site, "strengths": strengths, loss_name: self.loss.tolist()}
        entry |= {
            "chosen": strengths[int(self.chosen)],
            "lowest": strengths[int(self.loss.argmin())],
        }
        entry |= {name: along(values) for name, values in scores.items()}
        if len(self.certificates):
            found = [Certificate(*numbers) for numbers in self.certificates.tolist()]
            entry["certificates"] = along([c._asdict() | {"converged": c.converged} for c in found])
        return entry


class PathMetric(TaskMetric):
    """Counts per image of the classes by some probes, and the summed losses of all probes.

    Args:
        counted: Probes whose predictions are counted, by index; the others are counted elsewhere.
        images, geometry: As for `TaskMetric`.
    """

    def __init__(self, counted: list[int], images: int, geometry: Geometry):
        super().__init__(TASKS[SEGMENTATION], images, geometry, (*COUNTED, "cross_entropy"))
        self.counted = counted

    def update(self, logits: Tensor, target: Tensor, index: Tensor, masks: PreparedMasks) -> None:
        """Add images: `logits` f[P, B, K, h, w], `target` uint8[B, H, W], `index` i64[B], and prepared masks."""
        view = self.geometry.view(tuple(target.shape[-2:]))
        counts = count(logits[self.counted], target, view, by_token=False)
        kept = {name: getattr(counts, name).to(torch.int32) for name in COUNTED}
        loss, _ = loss_and_gradient(logits, masks, needs_grad=False)
        self.add(index, kept | {"cross_entropy": loss[..., None]})


class Solver(SiteProbes):
    """Linear probes at every site, for several strengths of regularisation; see :class:`SiteProbes`.

    Args:
        folds: F, folds of training images for the cross-validation.
        strengths: Strengths to solve, above 0.
        shared: Settings of `ProbeModule`, those that `solve.SHARED` names.
    """

    instrument: str  # name of the probes' path in metrics.json

    def __init__(self, folds: int = 4, strengths: tuple[float, ...] | None = None, **shared: Any):
        super().__init__(feature_norm="batchnorm")
        self.save_hyperparameters()  # those of subclasses, too
        self.passes = 0  # that are complete
        self.resuming = False  # start from the files of a killed run
        self.solved: dict[str, SolvedSite] = {}

    # ------------------------------------------------------------------------------------------------ passes
    def prepare(self) -> list[list[int]]:
        """Return this process's training images of the first pass, in batches."""
        raise NotImplementedError

    def add(self, batch: dict[str, Any]) -> None:
        """Take a batch of the first pass."""
        raise NotImplementedError

    def memory(self) -> str:
        """Return a sentence on the memory of the run, after :meth:`prepare`; empty if there is nothing to say."""
        return ""

    def solve(self) -> dict[str, SolvedSite]:
        """Return the probes of all sites after the first pass, the same in all processes."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Check all images before the model is loaded."""
        super().setup(stage)
        self.trainer.datamodule.verify()

    def on_test_start(self) -> None:
        """Solve the probes, and prepare the scores of their path."""
        # ends the run at once; Lightning would wait for its next batch
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for callback in self.trainer.callbacks:
            if isinstance(callback, StartOfRun):
                callback.on_train_start(self.trainer, self)
        for batch in self.read(self.prepare()):
            self.add(batch)
        self.passes = 1
        self.solved = self.solve()
        self._set_probes()
        self._report_limits()
        images = len(self.trainer.datamodule.splits["validation"])
        geometry = self.mllm.geometry
        metric = TaskMetric(self.task, images, geometry)
        if self.task.name == SEGMENTATION:
            # the chosen probes are counted with the scores of the run
            chosen = self._chosen()
            others = [i for i in range(self.rows * len(self.sites)) if i not in chosen]
            metric = PathMetric(others, images, geometry)
        self.path_metric = metric.to(self.device)

    def share(self, images: Iterable[int]) -> list[list[int]]:
        """Return this process's share of images, in batches."""
        mine = list(images)[rank() :: rank_count()]
        size = self.trainer.datamodule.rank_batch_size
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def read(self, batches: list[list[int]]) -> Iterator[dict[str, Any]]:
        """Yield batches of training images with their "states", on the device."""
        trainer = self.trainer
        loader = self.trainer.datamodule.training_loader(batches)
        logs = [callback for callback in trainer.callbacks if isinstance(callback, LogProgress)]
        hidden = rank() > 0 or trainer.progress_bar_callback is None
        bar = tqdm(loader, f"pass {self.passes + 1}", disable=hidden, mininterval=5)
        for batch in logs[0].track(loader) if logs and rank() == 0 else bar:
            batch = move_data_to_device(batch, self.device)
            with trainer.precision_plugin.forward_context():
                states = self.states(batch)
            yield batch | {"states": states}

    # ------------------------------------------------------------------------------------------------ resuming
    @property
    def checkpoints(self) -> Path:
        """Folder of the files from which a killed run resumes."""
        return Path(self.trainer.default_root_dir) / "checkpoints"

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors to a file in `checkpoints`, with the identity of the run."""
        with atomic_write(self.checkpoints / name) as partial:
            on_cpu = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
            write_tensors(on_cpu, partial, {"identity": json.dumps(self.identity)})

    def load(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file in `checkpoints`.

        Raises:
            UserError: The file is damaged, or belongs to a run of another identity.
        """
        path = self.checkpoints / name
        with error_context(path):
            with safe_open(path, "pt") as file:
                saved = json.loads(file.metadata()["identity"])
            # in memory of torch: products of tensors at the addresses of a mapped file can differ in their last bits
            tensors = {key: x.clone() for key, x in load_file(path).items()}
        check_same_identity(saved, self.identity, str(path), RESUME_ADVICE)
        return tensors

    # ------------------------------------------------------------------------------------------------ results
    def _set_probes(self) -> None:
        """Give each site the probe of its chosen strength."""
        for site, solved in self.solved.items():
            head = self.heads[site].head
            norm = self.heads[site].norm
            row = solved.row
            norm.running_mean.copy_(solved.mean)
            norm.running_var.copy_(
                torch.where(solved.scale > 0, solved.scale.clamp(min=1e-30).pow(-2), 1)
            )
            head.weight.copy_(
                solved.weights[row].to(head.weight) * (norm.running_var + norm.eps).sqrt()
            )
            head.bias.copy_(solved.bias[row])

    @property
    def rows(self) -> int:
        """R, the same at all sites."""
        return len(self.solved[self.sites[0]].solved)

    def _chosen(self) -> list[int]:
        """Return the index of each site's chosen probe among the probes of all strengths, strength by strength."""
        return [self.solved[site].row * len(self.sites) + i for i, site in enumerate(self.sites)]

    def _score(self, states: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        for part in self._parts(len(batch["index"])):
            index = batch["index"][part]
            logits = torch.stack(
                [
                    self.solved[site].logits(states[site][part], self.mllm.grid)
                    for site in self.sites
                ]
            )
            logits = logits.transpose(0, 1).flatten(0, 1)  # [R * S, B, K, h, w]
            for images, target in group_by_mask_size(batch["target"][part]):
                masks = []
                if self.task.name == SEGMENTATION:
                    prepare = MaskPreparer(self.mllm.geometry, self.channels, TIGHT_NODES)
                    masks = [prepare(target)]
                self.path_metric.update(logits[:, images], target, index[images], *masks)
        return super()._score(states, batch)

    def _parts(self, images: int) -> list[slice]:
        """Return parts of a batch that have at most `SCORE_BYTES` of logits, or one image each."""
        probes = sum(len(solved.solved) for solved in self.solved.values())
        size = max(
            1, SCORE_BYTES // (4 * probes * self.channels * self.mllm.grid[0] * self.mllm.grid[1])
        )
        return [slice(start, start + size) for start in range(0, images, size)]

    def probe_settings(self) -> dict[str, Any]:
        """Return how the probes were solved, for metrics.json."""
        settings = {key: self.hparams[key] for key in ("seed", "folds")}
        return {"head": "linear", "feature_norm": "batchnorm", "solved": self.instrument} | settings

    def path_results(self, counted: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the content of metrics.json["path"] and of path.safetensors.

        Args:
            counted: What the task counts of the chosen probes.
        """
        tensors = {name: x.cpu() for name, x in self.path_metric.compute().items()}
        loss_name = "cv_loss"
        if self.task.name == SEGMENTATION:
            loss_name = "cv_cross_entropy"
            for name in COUNTED:
                tensors[name] = self._merge(tensors[name], counted[name]).int()
            tensors["cross_entropy"] = tensors["cross_entropy"].squeeze(-1)
        scores = dataset_scores(self.task, self.task.sums(counted | tensors))
        if self.task.name == SEGMENTATION:
            scores["cross_entropy"] = tensors["cross_entropy"].sum(1) / counted["labelled"].sum()

        def by_site(x):
            return x.unflatten(0, (-1, len(self.sites)))

        sites = []
        for i, (site, solved) in enumerate(self.solved.items()):
            of_site = {name: by_site(x)[:, i].tolist() for name, x in scores.items()}
            sites.append(solved.entry(site, of_site, loss_name))
        path = {"passes": self.passes, self.instrument: {"sites": sites}}
        return path, {
            f"{self.instrument}/{name}": by_site(x).contiguous() for name, x in tensors.items()
        }

    def _merge(self, others: Tensor, chosen: Tensor) -> Tensor:
        """Return counts of all probes [R * S, N, K] from those of the chosen ones [S, N, K] and of all others."""
        merged = others.new_empty(self.rows * len(self.sites), *others.shape[1:])
        merged[self.path_metric.counted], merged[self._chosen()] = others, chosen
        return merged

    def _report_limits(self) -> None:
        """Say at which sites the lowest loss is at the end of the strengths that were tried."""
        for site, solved in self.solved.items():
            strengths = solved.strengths.tolist()
            lowest = int(solved.loss.argmin())
            if len(strengths) > 1 and lowest in (0, len(strengths) - 1):
                end, why = (
                    ("strongest", "the states tell little")
                    if lowest == 0
                    else ("weakest", "more would be used")
                )
                rank_zero_info(
                    f"{site}: the cross-validated loss is lowest at the {end} strength, {strengths[lowest]:g}: {why}; "
                    f"the probe has {strengths[int(solved.chosen)]:g}"
                )


def tensors_of(site: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a site by name, from those of all sites by "SITE/NAME"."""
    return {name.partition("/")[2]: x for name, x in tensors.items() if name.startswith(f"{site}/")}
