"""Solve linear probes of classes at the optimum of their loss (`optimum.py`).

If the states of all training images fit into memory, the first pass keeps them, and each site is solved by one
process, on a CPU by one thread. If they do not fit, each pass keeps a few pixels of every image in the same memory
and sums the exact losses and gradients of the probes; between two passes each site takes a step
(`optimum_by_passes.py`).

    RUN/checkpoints/SITE.safetensors      a solved site
    RUN/checkpoints/passes.safetensors    all sites after a pass, if there are several

Legend: S sites, R strengths that are solved, B images, T tokens, d width, K classes, F folds, n pixels of a sample.
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
from probes.ops.quadrature import join_masks

from .closed_form import Moments, SiteSpace
from .distributed import all_gather_objects, all_reduce, broadcast, gather_images, rank, rank_count
from .optimum import (
    LOOSE_NODES,
    TIGHT_NODES,
    Path,
    PixelProblem,
    SiteProblem,
    solve_path,
    solve_site,
)
from .optimum_by_passes import (
    PassRefinement,
    PassSums,
    SampledPixels,
    bytes_of_probes,
    null_gradient,
)
from .pixel_sample import STORED, AxisRange, ChannelRange, Pixels, choose_pixels
from .solver import SolvedSite, Solver, tensors_of

PASSES = "passes.safetensors"
LEAST = 4  # images of each fold in memory, however little there is
MEASURED = 8  # images whose states say how the first pass stores those of all


class OptimumSolver(Solver):
    """Linear probes of classes at the optimum of the loss; see :class:`Solver`.

    Args:
        passes: Most passes over the training split.
        sample_images: Training images whose memory is used; None for as many as fit into a quarter of the available
            memory.
        shared: Arguments of `Solver`.
    """

    instrument = "optimum"
    nodes = TIGHT_NODES

    def __init__(self, passes: int = 10, sample_images: int | None = None, **shared: Any):
        super().__init__(**shared)

    def mask_preparer(self) -> MaskPreparer:
        """Return what prepares training masks for the loss."""
        return MaskPreparer(self.mllm.geometry, self.channels, self.nodes)

    # ------------------------------------------------------------------------------------------------ first pass
    def prepare(self) -> list[list[int]]:
        """Choose what is kept, and the folds; return this process's images of the first pass, in batches."""
        training = self.trainer.datamodule.splits["training"]
        self.images = len(training)
        self.sample_images = self._sample_size()
        self.fold_of = assign_folds(self.images, self.hparams.folds, training.groups)
        self.whole = self.sample_images == self.images
        self.kept: list[Any] = []  # of this pass, batch by batch
        self.refinements: dict[str, PassRefinement] = {}  # of the sites that this process solves
        self.saved_passes = broadcast(self.resuming and (self.checkpoints / PASSES).is_file(), 0)
        if self.saved_passes:
            return []
        if not self.whole:
            self._measure_channels()
        return self.share(range(self.images))

    def _sample_size(self) -> int:
        """Return the number of images whose states fit into memory, the same in all processes."""
        wanted = self.hparams.sample_images
        tokens = self.mllm.grid[0] * self.mllm.grid[1]
        per_image = (
            tokens
            * self.mllm.model.dtype.itemsize
            * sum(self.mllm.widths[site] for site in self.sites)
        )
        fit = (
            int(available_memory() / 4 / per_image)
            * rank_count()
            // max(1, self.trainer.num_devices)
        )
        # tokens of a site in float32, with logits and copies, on the device
        largest = 12 * tokens * max(self.mllm.widths[site] for site in self.sites)
        free = (
            torch.cuda.mem_get_info(self.device)[0]
            if self.device.type == "cuda"
            else available_memory()
        )
        fit = max(min(fit, int(free / 4 / largest)), LEAST * self.hparams.folds)
        return broadcast(min(self.images, fit if wanted is None else wanted), 0)

    def memory(self) -> str:
        """Return whether the states of all images fit, and the memory that the run takes."""
        tokens = self.mllm.grid[0] * self.mllm.grid[1]
        widths = [self.mllm.widths[site] for site in self.sites]
        kept = self.sample_images * tokens * self.mllm.model.dtype.itemsize * sum(widths)
        if self.whole:
            return (
                f"the states of all {self.images:,} images are kept: {kept / 1e9:.3g} GB, one pass"
            )
        probes = sum(bytes_of_probes(width, self.channels, self.hparams.folds) for width in widths)
        return (
            f"the memory of {self.sample_images:,} of {self.images:,} images is spent on pixels of all of them: "
            f"{kept / 1e9:.3g} GB, and {probes / 1e9:.3g} GB of probes at most"
        )

    def add(self, batch: dict[str, Any]) -> None:
        """Keep the states and masks of a batch in memory, or some of its pixels and its moments."""
        if self.whole:
            loose = self.mask_preparer()._replace(nodes=LOOSE_NODES)(batch["target"]).to("cpu")
            states = {site: x.cpu() for site, x in batch["states"].items()}
            self.kept.append((batch["index"].cpu(), states, loose, batch["masks"].to("cpu")))
            return
        self._keep_pixels(batch)
        labels = batch["masks"].soft.flatten(2).mT.flatten(0, 1).double()
        for site, x in batch["states"].items():
            self.moments[site].update(x.flatten(0, 1), labels, 0)

    def solve(self) -> dict[str, SolvedSite]:
        """Solve the sites, after the first pass or in further ones."""
        solved = self._solve_in_memory() if self.whole else self._solve_by_passes()
        return {site: broadcast(solved.get(site), self._owner(site)) for site in self.sites}

    def _owner(self, site: str) -> int:
        """Return the process that solves a site."""
        return self.sites.index(site) % rank_count()

    # ------------------------------------------------------------------------------------------------ in memory
    def _gather(self) -> None:
        """Bring the states of each site to its owner, and the masks to all processes, in the order of the images."""
        index, states, *masks = zip(*self.kept, strict=True)
        self.kept = []
        parts = all_gather_objects((torch.cat(index), *map(join_masks, masks)))
        images = [len(index) for index, _, _ in parts]
        order = torch.cat([index for index, _, _ in parts]).argsort()
        self.loose, self.tight = (
            join_masks([part[i] for part in parts])[order.tolist()] for i in (1, 2)
        )
        self.sample_states: dict[str, Tensor] = {}
        for site in self.sites:
            mine = torch.cat([batch.pop(site) for batch in states])
            gathered = gather_images(mine, images, self._owner(site), self.device)
            if gathered is not None:
                self.sample_states[site] = gathered[order]

    def _solve_in_memory(self) -> dict[str, SolvedSite]:
        """Solve the sites of this process, several at a time; a site that a killed run has solved is read."""
        self._gather()
        file = "{}.safetensors".format
        saved = broadcast(
            [
                site
                for site in self.sites
                if self.resuming and (self.checkpoints / file(site)).is_file()
            ],
            0,
        )
        solved = {site: SolvedSite(**self.load(file(site))) for site in saved}
        mine = [site for site in self.sample_states if site not in saved]
        for site, found in _in_workers(self._solve_site, mine, self.device):
            solved[site] = self._to_site(found)
            self.save(file(site), vars(solved[site]))
            del self.sample_states[site]
        return solved

    def _solve_site(self, site: str) -> dict[str, Any]:
        states, loose, tight = (
            x.to(self.device) for x in (self.sample_states[site], self.loose, self.tight)
        )
        problem = SiteProblem(states, loose, tight, self.fold_of)
        path, refinement = solve_site(problem, self.hparams.strengths)
        refinement.solve_in_memory()
        return {
            "strengths": path.strengths,
            "loss": path.loss,
            "chosen": path.chosen,
            "solved": path.solved,
            "space": problem.space,
            "points": refinement.kept[0],
            "certificates": refinement.certificates,
        }

    def _to_site(self, found: dict[str, Any]) -> SolvedSite:
        """Return the probes of a site that this process solves: those that its certificates are about."""
        space = found["space"]
        points = found["points"]
        return SolvedSite(
            strengths=torch.tensor(found["strengths"], dtype=torch.float64),
            loss=torch.tensor(found["loss"], dtype=torch.float64),
            chosen=torch.tensor(found["chosen"]),
            solved=torch.tensor(found["solved"]),
            mean=space.mean.cpu(),
            scale=space.scale.cpu(),
            weights=space.to_states(points[..., :-1]).float().cpu(),
            bias=points[..., -1].float().cpu(),
            certificates=torch.tensor(found["certificates"], dtype=torch.float64).view(-1, 2),
        )

    # ------------------------------------------------------------------------------------------------ samples
    def _measure_channels(self) -> None:
        """Set how the first pass stores states, from the same few images in all processes."""
        count = min(MEASURED, self.images)
        images = [i * self.images // count for i in range(count)]
        size = self.trainer.datamodule.rank_batch_size
        batches = [images[start : start + size] for start in range(0, count, size)]
        parts = [batch["states"] for batch in self.read(batches)]
        self.ranges = {
            site: ChannelRange.of(torch.cat([part[site] for part in parts])) for site in self.sites
        }
        self.moments = {
            site: Moments.zeros(r.mean, 1, self.channels) for site, r in self.ranges.items()
        }

    def _keep_pixels(self, batch: dict[str, Any]) -> None:
        """Keep some pixels of each image of a batch, others in each pass."""
        total = (
            self.sample_images
            * self.mllm.grid[0]
            * self.mllm.grid[1]
            * self.mllm.model.dtype.itemsize
        )
        total *= 2 if self.passes else 1  # of half a byte
        parts = []
        for slot, (image, target) in enumerate(
            zip(batch["index"].tolist(), batch["target"], strict=True)
        ):
            # where pixels are fewer than images: others in each pass
            place = (image + self.passes) % self.images
            count = (place + 1) * total // self.images - place * total // self.images
            seed = self.hparams.seed + 1_000_003 * (image + self.images * self.passes)
            view = self.mllm.geometry.view(tuple(target.shape))
            found = choose_pixels(target.cpu(), count, seed, tuple(self.mllm.grid), view)
            tokens, shares, labels, labelled = found
            tokens = tokens + slot * self.mllm.grid[0] * self.mllm.grid[1]
            weights = torch.full(
                (len(labels),), labelled / max(1, len(labels)), dtype=torch.float64
            )
            parts.append((tokens, shares, labels, weights, torch.full((len(labels),), image)))
        pixels = Pixels(*map(torch.cat, zip(*parts, strict=True)))
        at_pixels = {site: pixels.interpolate(x) for site, x in batch["states"].items()}
        states = {
            site: self.ranges[site].store(x).view(torch.uint8).cpu()
            for site, x in at_pixels.items()
        }
        self.kept.append((pixels.labels, pixels.weights, pixels.images, states))

    def _gather_pixels(self) -> None:
        """Bring the sample of each site to its owner, in the order of the images."""
        labels, weights, images, states = zip(*self.kept, strict=True)
        self.kept = []
        parts = all_gather_objects(tuple(map(torch.cat, (labels, weights, images))))
        counts = [len(part[0]) for part in parts]
        labels, weights, images = map(torch.cat, zip(*parts, strict=True))
        order = images.argsort(stable=True)
        self.pixels = labels[order], weights[order], self.fold_of[images[order]]
        self.sample_states = {}
        for site in self.sites:
            mine = torch.cat([batch.pop(site) for batch in states])
            gathered = gather_images(mine, counts, self._owner(site), self.device)
            if gathered is not None:
                self.sample_states[site] = gathered[order]

    # ------------------------------------------------------------------------------------------------ passes
    def _solve_by_passes(self) -> dict[str, SolvedSite]:
        """Solve the sites of this process by steps between passes."""
        if self.saved_passes:
            self._resume_passes()
        else:
            sums = {site: self._sum_moments(site) for site in self.sites}
            self._gather_pixels()
            self.spaces = {site: sums[site][0] for site in self.sample_states}
            found = dict(_in_workers(self._solve_sample, list(self.sample_states), self.device))
            if self.hparams.passes == 1:
                return {
                    site: self._to_site(self._of_sample(*parts)) for site, parts in found.items()
                }
            for site, (axes, path) in found.items():
                self.refinements[site] = self._start(axes.space, sums[site][1], path)
            axes = {site: found[site][0] if site in found else None for site in self.sites}
            self.ranges = {site: broadcast(axes[site], self._owner(site)) for site in self.sites}
            self._save_passes()
        while not self._converged() and self.passes < self.hparams.passes:
            self._refine()
            self._save_passes()
        return {
            site: self._to_site(refinement.found()) for site, refinement in self.refinements.items()
        }

    def _sum_moments(self, site: str) -> tuple[SiteSpace, Tensor] | None:
        """Return the coordinates of a site and the gradient at w = 0; None on processes that do not solve it."""
        moments = self.moments.pop(site)
        for total in moments.sums().values():
            all_reduce(total)
        if rank() != self._owner(site):
            return None
        space = SiteSpace.of_moments(moments)
        return space, null_gradient(space, moments)

    def _solve_sample(self, site: str) -> tuple[AxisRange, Path]:
        """Solve a site on the sample of the first pass."""
        space = self.spaces[site]
        stored = self.sample_states[site].view(STORED)
        inputs = space.coordinates(self.ranges[site].restore(stored.to(self.device)))
        labels, weights, folds = (x.to(self.device) for x in self.pixels)
        problem = PixelProblem(space, inputs, labels, weights, folds, self.hparams.folds)
        return AxisRange.of(space, inputs), solve_path(problem, self.hparams.strengths)

    @staticmethod
    def _of_sample(axes: AxisRange, path: Path) -> dict[str, Any]:
        """Return the probes of a sample, which have no certificates: no pass has seen them."""
        return {
            **path.path._asdict(),
            "space": axes.space,
            "points": path.points,
            "certificates": [],
        }

    def _start(self, space: SiteSpace, null: Tensor, path: Path) -> PassRefinement:
        """Return the refinement of what was found on the sample."""
        chosen = path.path.solved.index(path.path.chosen)
        points = torch.cat([path.folds, path.points[chosen][None]])
        return PassRefinement(
            space, null, path.path.strengths[path.path.chosen], points, self.hparams.strengths
        )

    def _refine(self) -> None:
        """Take the exact losses and gradients of a pass over the split, and move the probes."""
        sums = {
            site: PassSums(*broadcast(self._probes(site), self._owner(site))) for site in self.sites
        }
        pixels = torch.zeros(self.hparams.folds, dtype=torch.float64, device=self.device)
        for batch in self.read(self.share(range(self.images))):
            self._keep_pixels(batch)
            folds = self.fold_of[batch["index"].cpu()]
            pixels.index_add_(0, folds.to(self.device), batch["masks"].pixels)
            for site, of_site in sums.items():
                of_site.add(batch["states"][site], batch["masks"], folds.tolist())
        self.passes += 1
        all_reduce(pixels)
        for site, of_site in sums.items():
            for total in of_site.totals():
                all_reduce(total)
            if site in self.refinements:
                refinement = self.refinements[site]
                refinement.accept(*of_site.means(refinement.space, pixels))
        self._gather_pixels()
        self.refinements |= dict(_in_workers(self._step, list(self.refinements), self.device))

    def _probes(self, site: str) -> tuple[Tensor, Tensor, list[int | None], int] | None:
        """Return the arguments of `PassSums`; None on processes that do not solve the site."""
        refinement = self.refinements.get(site)
        return refinement and refinement.probes()

    def _step(self, site: str) -> PassRefinement:
        refinement = self.refinements[site]
        _, weights, folds = (x.to(self.device) for x in self.pixels)
        inputs = self.ranges[site].restore(self.sample_states[site].to(self.device))
        refinement.step(SampledPixels(inputs, weights.float(), folds))
        return refinement

    def _converged(self) -> bool:
        """Return whether the probes of all sites have a certificate."""
        return all(sum(all_gather_objects([x.converged for x in self.refinements.values()]), []))

    def _save_passes(self) -> None:
        """Save all sites in one file, so that they are of the same pass."""
        tensors = {"passes": torch.tensor(self.passes)}
        for site in self.sites:
            tensors[f"{site}/deviation"] = self.ranges[site].deviation
            state = self.refinements[site].state() if site in self.refinements else None
            state = broadcast(state, self._owner(site))
            tensors |= {f"{site}/{name}": x for name, x in state.items()} if rank() == 0 else {}
        if rank() == 0:
            self.save(PASSES, tensors)

    def _resume_passes(self) -> None:
        """Read what a run that was killed in a later pass has saved."""
        tensors = self.load(PASSES)
        self.passes = int(tensors["passes"])
        self.ranges = {}
        for site in self.sites:
            state = {name: x.to(self.device) for name, x in tensors_of(site, tensors).items()}
            deviation = state.pop("deviation")
            refinement = PassRefinement.of_state(state, self.hparams.strengths)
            self.ranges[site] = AxisRange(refinement.space, deviation)
            if rank() == self._owner(site):
                self.refinements[site] = refinement

    # ------------------------------------------------------------------------------------------------ results
    def path_results(self, counted: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the content of metrics.json["path"] and of path.safetensors."""
        path, tensors = super().path_results(counted)
        return {"passes": self.passes, "sample_images": self.sample_images} | path, tensors


def _in_workers(
    work: Callable[[str], Any], sites: list[str], device: torch.device
) -> Iterable[tuple[str, Any]]:
    """Yield each site with the result of its work, on a CPU as many at a time as torch has threads.

    Each worker has one thread, so that the bits of a site do not depend on their number. They are processes, which
    share the memory of this one: threads would wait for Python's lock and be as slow as one. DataLoader ends them with
    this process, however it ends.
    """
    threads = (
        torch.get_num_threads() if sites and device.type == "cpu" and sys.platform == "linux" else 1
    )
    # one site alone, too, which has as many threads here: they would round differently
    processes = (
        {"num_workers": min(threads, len(sites)), "multiprocessing_context": "fork"}
        if threads > 1
        else {}
    )
    results = DataLoader(
        _Results(work, sites), batch_size=None, collate_fn=lambda result: result, **processes
    )
    yield from zip(
        sites, tqdm(results, "solving sites", disable=rank() > 0, mininterval=5), strict=True
    )


class _Results(Dataset):
    """The result of some work for each site, done when it is asked for."""

    def __init__(self, work: Callable[[str], Any], sites: list[str]):
        self.work = work
        self.sites = sites

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, index: int) -> Any:
        return self.work(self.sites[index])
