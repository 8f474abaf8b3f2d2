"""Solve linear probes of classes at the optimum of their loss (`optimum.py`).

The first pass keeps the states of a sample of training images in memory: all of them if they fit. Each site is then
solved by one process, on a CPU by one thread. If the sample is not the complete split, further passes over all training
images give the exact loss and gradient of the probes of the chosen strength and its neighbours, and nothing else.

    RUN/checkpoints/SITE.safetensors      a solved site
    RUN/checkpoints/points.safetensors    all sites after a later pass

Legend: S sites, R strengths that are solved, B images, T tokens, d width, K classes, N training images.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from probes.data.available_memory import available_memory
from probes.data.batches import MaskPreparer
from probes.data.samplers import assign_folds
from probes.evaluation.image_metrics import TaskSums
from probes.evaluation.metrics import Counts
from probes.ops.quadrature import PreparedMasks, join_masks

from .distributed import all_gather_objects, all_reduce, broadcast, gather_images, rank, rank_count
from .optimum import LOOSE_NODES, PROXIMAL, TIGHT_NODES, Refinement, SitePath, SiteProblem, loss_sums, solve_site
from .solver import SolvedSite, Solver, tensors_of

POINTS = "points.safetensors"
LEAST = 4  # images of each fold in memory, however little there is


class OptimumSolver(Solver):
    """Linear probes of classes at the optimum of the loss; see :class:`Solver`.

    Args:
        passes: Most passes over the training split.
        sample_images: Training images whose states are kept in memory; None for as many as fit into a quarter of the
            available memory.
        shared: Arguments of `Solver`.
    """

    instrument, nodes = "optimum", TIGHT_NODES

    def __init__(self, passes: int = 8, sample_images: int | None = None, **shared: Any):
        super().__init__(**shared)

    def mask_preparer(self) -> MaskPreparer:
        """Return what prepares training masks for the loss."""
        return MaskPreparer(self.mllm.geometry, self.channels, self.nodes)

    # ------------------------------------------------------------------------------------------------ sample
    def prepare(self) -> list[list[int]]:
        """Choose the sample and its folds; return this process's images of it, in batches."""
        training = self.trainer.datamodule.splits["training"]
        count, images = self._sample_size(len(training)), len(training)
        self.sample = [i * images // count for i in range(count)]
        groups = training.groups and [training.groups[i] for i in self.sample]
        self.fold_of = assign_folds(count, self.hparams.folds, groups)
        self.whole = count == images
        self.kept: list[tuple[Tensor, dict[str, Tensor], PreparedMasks, PreparedMasks]] = []
        return self.share(self.sample)

    def _sample_size(self, images: int) -> int:
        """Return the number of images whose states are kept, the same in all processes."""
        wanted, tokens = self.hparams.sample_images, self.mllm.grid[0] * self.mllm.grid[1]
        per_image = tokens * self.mllm.model.dtype.itemsize * sum(self.mllm.widths[site] for site in self.sites)
        fit = int(available_memory() / 4 / per_image) * rank_count() // max(1, self.trainer.num_devices)
        # tokens of a site in float32, with logits and copies, on the device
        largest = 12 * tokens * max(self.mllm.widths[site] for site in self.sites)
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else available_memory()
        fit = max(min(fit, int(free / 4 / largest)), LEAST * self.hparams.folds)
        return broadcast(min(images, fit if wanted is None else wanted), 0)

    def add(self, batch: dict[str, Any]) -> None:
        """Keep the states and masks of a batch in memory."""
        loose = self.mask_preparer()._replace(nodes=LOOSE_NODES)(batch["target"]).to("cpu")
        states = {site: x.cpu() for site, x in batch["states"].items()}
        self.kept.append((batch["index"].cpu(), states, loose, batch["masks"].to("cpu")))

    def _gather(self) -> None:
        """Bring the states of each site to its owner, and the masks to all processes, in the order of the images."""
        index, states, *masks = zip(*self.kept, strict=True)
        self.kept = []
        parts = all_gather_objects((torch.cat(index), *map(join_masks, masks)))
        images = [len(index) for index, _, _ in parts]
        order = torch.cat([index for index, _, _ in parts]).argsort()
        self.loose, self.tight = (join_masks([part[i] for part in parts])[order.tolist()] for i in (1, 2))
        self.sample_states: dict[str, Tensor] = {}
        for site in self.sites:
            mine = torch.cat([batch.pop(site) for batch in states])
            gathered = gather_images(mine, images, self._owner(site), self.device)
            if gathered is not None:
                self.sample_states[site] = gathered[order]

    def _owner(self, site: str) -> int:
        """Return the process that solves a site."""
        return self.sites.index(site) % rank_count()

    # ------------------------------------------------------------------------------------------------ sites
    def solve(self) -> dict[str, SolvedSite]:
        """Solve the sites on the sample; if it is not the complete split, refine them in passes over the split."""
        self._gather()
        self.paths: dict[str, SitePath] = {}
        self.refinements: dict[str, Refinement] = {}  # of the sites that this process solves
        solved = self._solve_sites()
        if not self.whole:
            self._resume_refinement()
            while not self._converged() and self.passes < self.hparams.passes:
                self._refine()
                self._save_refinement()
            solved = {site: self._to_site(site) for site in self.refinements}
        return {site: broadcast(solved.get(site), self._owner(site)) for site in self.sites}

    def _solve_sites(self) -> dict[str, SolvedSite]:
        """Solve the sites of this process, several at a time; a site that a killed run has solved is read.

        If all images are in memory, return the probes. Else they are in `refinements`.
        """
        file, saved = "{}.safetensors".format, self.resuming and self.whole
        saved = broadcast([site for site in self.sites if saved and (self.checkpoints / file(site)).is_file()], 0)
        solved = {site: SolvedSite(**self.load(file(site))) for site in saved}
        mine = [site for site in self.sample_states if site not in saved]
        for site, (path, refinement) in _in_workers(self._solve_site, mine, self.device):
            self.paths[site], self.refinements[site] = path, refinement
            if self.whole:
                solved[site] = self._to_site(site)
                self.save(file(site), vars(solved[site]))
                del self.sample_states[site], self.refinements[site]
        return solved

    def _solve_site(self, site: str) -> tuple[SitePath, Refinement]:
        problem = SiteProblem(*self._inputs(site), self.fold_of)
        path, refinement = solve_site(problem, self.hparams.strengths)
        if self.whole:
            refinement.solve_in_memory()
        else:
            refinement.proximal.fill_(PROXIMAL)
        problem.release()
        return path, refinement

    def _inputs(self, site: str) -> tuple[Tensor, PreparedMasks, PreparedMasks]:
        """Return the states and masks of the sample on the device."""
        return tuple(x.to(self.device) for x in (self.sample_states[site], self.loose, self.tight))

    def _to_site(self, site: str) -> SolvedSite:
        """Return the probes of a site that this process solves: those that its certificates are about."""
        refinement, path = self.refinements[site], self.paths[site]
        space, points = refinement.problem.space, refinement.kept[0]
        return SolvedSite(
            strengths=torch.tensor(path.strengths, dtype=torch.float64),
            loss=torch.tensor(path.loss, dtype=torch.float64),
            chosen=torch.tensor(path.chosen),
            solved=torch.tensor(path.solved),
            mean=space.mean.cpu(),
            scale=space.scale.cpu(),
            weights=space.to_states(points[..., :-1]).float().cpu(),
            bias=points[..., -1].float().cpu(),
            certificates=torch.tensor(refinement.certificates, dtype=torch.float64).view(-1, 2),
        )

    # ------------------------------------------------------------------------------------------------ later passes
    def _refine(self) -> None:
        """Take the exact losses and gradients of a pass over the split, and move the probes."""
        linear = {site: broadcast(self._linear(site), self._owner(site)) for site in self.sites}
        sums = {site: [x.new_zeros(len(x)), torch.zeros_like(x)] for site, (_, x) in linear.items()}
        pixels = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in self.read(self.share(range(len(self.trainer.datamodule.splits["training"])))):
            pixels += batch["masks"].pixels.sum()
            for site, (mean, points) in linear.items():
                x = batch["states"][site].float() - mean.float()
                tokens = torch.cat([x, torch.ones_like(x[..., :1])], -1)
                for total, part in zip(sums[site], loss_sums(tokens, batch["masks"], points), strict=True):
                    total += part
        all_reduce(pixels)
        for site in self.sites:
            value, gradient = (all_reduce(total) / pixels for total in sums.pop(site))
            if site in self.refinements:
                refinement = self.refinements[site]
                space, ridge = refinement.problem.space, refinement.problem.ridge(refinement.strengths)
                gradient = torch.cat([space.from_gradient(gradient[..., :-1]), gradient[..., -1:]], -1)
                penalty = ridge * refinement.points
                value = value + (penalty * refinement.points).sum((1, 2)) / 2
                refinement.accept(value, gradient + penalty)
        self.refinements |= dict(_in_workers(self._step, list(self.refinements), self.device))
        self.passes += 1

    def _linear(self, site: str) -> tuple[Tensor, Tensor] | None:
        """Return the mean f64[d], and the probes f64[R, K, d + 1] of x - mean and 1; None on other processes."""
        if site not in self.refinements:
            return None
        points, space = self.refinements[site].points, self.refinements[site].problem.space
        return space.mean, torch.cat([space.to_states(points[..., :-1]), points[..., -1:]], -1)

    def _step(self, site: str) -> Refinement:
        refinement = self.refinements[site]
        refinement.problem.load(*self._inputs(site))
        refinement.step()
        refinement.problem.release()
        return refinement

    def _converged(self) -> bool:
        """Return whether the probes of all sites have a certificate."""
        return all(sum(all_gather_objects([x.converged for x in self.refinements.values()]), []))

    def _save_refinement(self) -> None:
        """Save the refinement of all sites in one file, so that they are of the same pass."""
        tensors = {"passes": torch.tensor(self.passes)}
        for site in self.sites:
            state = self.refinements[site].state() if site in self.refinements else None
            state = broadcast(state, self._owner(site))
            tensors |= {f"{site}/{name}": x for name, x in state.items()} if rank() == 0 else {}
        if rank() == 0:
            self.save(POINTS, tensors)

    def _resume_refinement(self) -> None:
        """Read what a run that was killed in a later pass has saved."""
        if not broadcast(self.resuming and (self.checkpoints / POINTS).is_file(), 0):
            return
        tensors = self.load(POINTS)
        self.passes = int(tensors["passes"])
        for site, refinement in self.refinements.items():
            refinement.set_state({name: x.to(self.device) for name, x in tensors_of(site, tensors).items()})

    # ------------------------------------------------------------------------------------------------ results
    def path_results(self, counts: Counts | TaskSums) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the content of metrics.json["path"] and of path.safetensors."""
        path, tensors = super().path_results(counts)
        return {"passes": self.passes, "sample_images": len(self.sample)} | path, tensors


def _in_workers(work: Callable[[str], Any], sites: list[str], device: torch.device) -> Iterable[tuple[str, Any]]:
    """Yield each site with the result of its work, on a CPU as many at a time as torch has threads.

    Each worker has one thread, so that the bits of a site do not depend on their number. They are processes, which
    share the memory of this one: threads would wait for Python's lock and be as slow as one. DataLoader ends them with
    this process, however it ends.
    """
    threads = torch.get_num_threads() if sites and device.type == "cpu" and sys.platform == "linux" else 1
    # one site alone, too, which has as many threads here: they would round differently
    processes = {"num_workers": min(threads, len(sites)), "multiprocessing_context": "fork"} if threads > 1 else {}
    results = DataLoader(_Results(work, sites), batch_size=None, collate_fn=lambda result: result, **processes)
    yield from zip(sites, tqdm(results, "solving sites", disable=rank() > 0, mininterval=5), strict=True)


class _Results(Dataset):
    """The result of some work for each site, done when it is asked for."""

    def __init__(self, work: Callable[[str], Any], sites: list[str]):
        self.work, self.sites = work, sites

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, index: int) -> Any:
        return self.work(self.sites[index])
