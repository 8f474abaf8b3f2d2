"""Solve linear probes of classes if the states of all training images do not fit into memory.

Each pass keeps a few pixels of every image in the memory that there is, and sums the exact losses and gradients of the
probes; between two passes each site takes a step (`pass_refinement.py`).

    RUN/checkpoints/passes.safetensors    all sites after a pass

Legend: B images, d width, K classes, F folds, n pixels of a sample.
"""

from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.processes import (
    all_gather_objects,
    all_reduce,
    broadcast,
    rank,
    rank_zero_info,
)
from probes.ops.quadrature import PreparedMasks
from probes.run_config import SolverOptions
from probes.score.strengths import OPTIMUM

from .curvature import SampledPixels
from .held_out import class_pixels, ignore_classes, lone_classes
from .moments import Moments, SiteSpace
from .objective import PixelProblem
from .pass_refinement import (
    PassRefinement,
    bytes_of_probes,
    pack_refinement,
    unpack_refinement,
)
from .pass_sums import PassSums, null_gradient
from .pixel_sample import (
    CANDIDATES,
    STORED,
    AxisRange,
    ChannelRange,
    count_and_seed,
    draw_pixels,
    prefer_uncertain,
)
from .solved_site import SolvedSite
from .solver import Solver, SolverCheckpoints, in_workers, tensors_of
from .state_reader import StateReader
from .strength_path import FoldSearch, PathSolution

PASSES = "passes.safetensors"
MEASURED = 8  # images whose states say how the first pass stores those of all


class PassSolver(Solver):
    """Linear probes of classes at the optimum of the loss of all images, from a sample and passes; see :class:`Solver`.

    Args:
        reader: Reads batches of training images with their states.
        options: Options of the command.
        checkpoints: Files of a killed run.
        sample_images: Number of images whose memory is used.
    """

    path_kind = OPTIMUM

    def __init__(
        self,
        reader: StateReader,
        options: SolverOptions,
        checkpoints: SolverCheckpoints,
        sample_images: int,
    ):
        super().__init__(reader, options, checkpoints)
        self.sample_images = sample_images
        self.most_passes = options.passes
        # on the disk, so that later passes run no model
        self.keeps_states = self._state_gb() <= options.disk_gb
        self.has_saved_pass = False
        # How the first pass stores states and how later ones do, and the moments of the first pass, by site
        self.channel_ranges: dict[str, ChannelRange] = {}
        self.axis_ranges: dict[str, AxisRange] = {}
        self.moments: dict[str, Moments] = {}
        # f64[F, K], labelled pixels of each class in each fold, from the first pass
        self.class_pixels = torch.zeros(
            options.folds, self.channels, dtype=torch.float64, device=self.device
        )
        # Labels, weights and folds of the n pixels of a pass, whose states are `sample_states`
        self.sample_pixels: tuple[Tensor, Tensor, Tensor] | None = None
        self.spaces: dict[str, SiteSpace] = {}
        self.refinements: dict[str, PassRefinement] = {}

    # ------------------------------------------------------------------------------------------------ first pass
    def prepare_first_pass(self) -> list[list[int]]:
        """Measure how states are stored, and return all of this process's images; none if a killed run saved a pass."""
        self.has_saved_pass = broadcast(self.checkpoints.has(PASSES), 0)
        if self.has_saved_pass:
            return []
        self._measure_channels()
        return self.reader.share(range(self.images))

    def read_first_pass(self) -> None:
        """Read the training images of the first pass; their states are written to the disk if it may be used."""
        if self.keeps_states:
            batches = self.reader.share(range(self.images))
            self.reader.keep_states(self.checkpoints.folder, sum(batches, []))
        super().read_first_pass()

    def _state_gb(self) -> float:
        """Return the memory of the states of all images."""
        return self.images * self.mllm.state_bytes(self.sites) / 1e9

    def memory(self) -> str:
        """Return that the states of all images do not fit, and the memory that the run takes."""
        widths = [self.mllm.widths[site] for site in self.sites]
        kept = self.sample_images * self.mllm.state_bytes(self.sites)
        probes = sum(bytes_of_probes(width, self.channels, self.options.folds) for width in widths)
        disk = f"; states of all images, {self._state_gb():.3g} GB, "
        if self.keeps_states:
            disk += "are on the disk until the end"
        else:
            disk += "are not on the disk (--disk-gb)"
        return (
            f"the memory of {self.sample_images:,} of {self.images:,} images is spent on pixels of all of them: "
            f"{kept / 1e9:.3g} GB, and {probes / 1e9:.3g} GB of probes at most{disk}"
        )

    def add(self, batch: dict[str, Any]) -> None:
        """Keep some of the pixels of a batch, count all, and add its tokens to the moments."""
        self._keep_pixels(batch, {})
        folds = self.fold_of[batch["index"].cpu()]
        self.class_pixels += class_pixels(batch["masks"], folds, self.options.folds)
        labels = batch["masks"].soft.flatten(2).mT.flatten(0, 1).double()
        for site, x in batch["states"].items():
            self.moments[site].update(x.flatten(0, 1), labels, 0)

    # ------------------------------------------------------------------------------------------------ samples
    def _measure_channels(self) -> None:
        """Set how the first pass stores states, from the same few images in all processes."""
        count = min(MEASURED, self.images)
        images = [i * self.images // count for i in range(count)]
        size = self.reader.data.rank_batch_size
        batches = [images[start : start + size] for start in range(0, count, size)]
        parts = [batch["states"] for batch in self.reader.training(batches, "channels")]
        self.channel_ranges = {
            site: ChannelRange.of(torch.cat([part[site] for part in parts])) for site in self.sites
        }
        self.moments = {
            site: Moments.zeros(channels.mean, 1, self.channels)
            for site, channels in self.channel_ranges.items()
        }

    def _keep_pixels(self, batch: dict[str, Any], sums: dict[str, PassSums]) -> None:
        """Keep some pixels of each image of a batch, others in each pass.

        Args:
            batch: Images with their states.
            sums: The sums of this pass by site, whose probes say which pixels are uncertain; {} in the first pass.
        """
        ranges = self.axis_ranges if sums else self.channel_ranges
        images = batch["index"].tolist()
        draws = [self._count_and_seed(image) for image in images]
        if sums:
            draws = [(CANDIDATES * count, seed) for count, seed in draws]
        targets = [target.cpu() for target in batch["target"]]
        pixels = draw_pixels(images, targets, draws, tuple(self.mllm.grid), self.mllm.geometry.view)
        if sums:
            by_site = [sums[site].uncertainty(x, pixels) for site, x in batch["states"].items()]
            pixels = prefer_uncertain(pixels, torch.stack(by_site).mean(0).cpu())
        at_pixels = {site: pixels.interpolate(x) for site, x in batch["states"].items()}
        states = {
            site: ranges[site].store(x).view(torch.uint8).cpu() for site, x in at_pixels.items()
        }
        self.kept.append((pixels.labels, pixels.weights, pixels.images, states))

    def _count_and_seed(self, image: int) -> tuple[int, int]:
        """Return how many pixels of an image this pass keeps, and the seed that chooses them.

        The first pass keeps a byte a channel, later ones half a byte, and so twice as many pixels.
        """
        tokens = self.sample_images * self.mllm.grid[0] * self.mllm.grid[1]
        total = tokens * self.mllm.model.dtype.itemsize * (1 if self.in_first_pass else 2)
        count, seed = count_and_seed(image, self.images, total, self.passes)
        return count, self.reader.data.seed + seed

    def _gather_pixels(self) -> None:
        """Bring the sample of each site to its owner, in the order of the images."""
        labels, weights, images, states = zip(*self.kept, strict=True)
        self.kept = []
        parts = all_gather_objects(tuple(map(torch.cat, (labels, weights, images))))
        counts = [len(part[0]) for part in parts]
        labels, weights, images = map(torch.cat, zip(*parts, strict=True))
        order = images.argsort(stable=True)
        self.sample_pixels = labels[order], weights[order], self.fold_of[images[order]]
        self.gather_states(states, counts, order)

    # ------------------------------------------------------------------------------------------------ passes
    def solve(self) -> dict[str, SolvedSite]:
        """Solve the sites by steps between passes, after what the sample of the first pass says."""
        if self.has_saved_pass:
            self._resume_passes()
        else:
            sums = {site: self._sum_moments(site) for site in self.sites}
            all_reduce(self.class_pixels)
            self._gather_pixels()
            self.spaces = {site: sums[site][0] for site in self.sample_states}
            found = dict(in_workers(self._solve_sample, list(self.sample_states), self.device))
            if self.most_passes == 1:
                solved = {
                    # without certificates: no pass has seen these probes
                    site: SolvedSite.of_points(solution.path, axes.space, solution.points)
                    for site, (axes, solution) in found.items()
                }
                return self.share_solved(solved)
            self._start_refinements(found, {site: sums[site][1] for site in found})
            self._save_passes()
        while not self._converged() and self.passes < self.most_passes:
            self._refine()
            self._save_passes()
        solved = {
            site: SolvedSite.of_points(x.window.path(), x.space, x.points, x.certificates)
            for site, x in self.refinements.items()
        }
        return self.share_solved(solved)

    def about(self) -> dict[str, Any]:
        """Return what metrics.json["path"] says of the passes."""
        return super().about() | {"sample_images": self.sample_images}

    def _start_refinements(
        self, found: dict[str, tuple[AxisRange, PathSolution]], null: dict[str, Tensor]
    ) -> None:
        """Start from what was found on the sample of the first pass, and from the gradients at w = 0, by site."""
        for site, (axes, solution) in found.items():
            self.refinements[site] = self._start(axes.space, null[site], solution)
        axes = {site: found[site][0] if site in found else None for site in self.sites}
        self.axis_ranges = {
            site: broadcast(axes[site], self.owner_of(site), self.device) for site in self.sites
        }

    def _sum_moments(self, site: str) -> tuple[SiteSpace, Tensor] | None:
        """Return the coordinates of a site and the gradient at w = 0; None on processes that do not solve it."""
        moments = self.moments.pop(site)
        for total in moments.sums().values():
            all_reduce(total)
        if rank() != self.owner_of(site):
            return None
        space = SiteSpace.of_moments(moments)
        return space, null_gradient(self.loss, space, moments)

    def _solve_sample(self, site: str) -> tuple[AxisRange, PathSolution]:
        """Solve a site on the sample of the first pass."""
        space = self.spaces[site]
        stored = self.sample_states[site].view(STORED)
        inputs = space.coordinates(self.channel_ranges[site].restore(stored.to(self.device)))
        labels, weights, folds = (x.to(self.device) for x in self.sample_pixels)
        problem = PixelProblem(space, self.loss, inputs, labels, weights, folds, self.options.folds)
        return AxisRange.of(space, inputs), FoldSearch(problem).solve(self.options.strengths)

    def _start(
        self,
        space: SiteSpace,
        null_gradient: Tensor,
        solution: PathSolution,
    ) -> PassRefinement:
        """Return the refinement of what was found on the sample."""
        path = solution.path
        of_all_images = solution.points[path.solved.index(path.chosen)]
        return PassRefinement.start(
            self.loss,
            space,
            null_gradient,
            path.strengths[path.chosen],
            torch.cat([solution.fold_points, of_all_images[None]]),
            self.options.strengths,
        )

    def _refine(self) -> None:
        """Take the exact losses and gradients of a pass over the split, and move the probes."""
        sums = {
            site: PassSums(
                self.loss, *broadcast(self._probes(site), self.owner_of(site), self.device)
            )
            for site in self.sites
        }
        labelled = torch.zeros(self.options.folds, dtype=torch.float64, device=self.device)
        lone = lone_classes(self.class_pixels)
        images = self.reader.share(range(self.images))
        for batch in self.reader.training(images, f"pass {self.passes + 1}"):
            self._keep_pixels(batch, sums)
            masks = batch["masks"]
            folds = self.fold_of[batch["index"].cpu()]
            scored = self._without(lone[folds], batch)
            labelled.index_add_(0, folds.to(self.device), masks.pixels)
            for site, of_site in sums.items():
                of_site.add(batch["states"][site], masks, scored, folds.tolist())
        self.passes += 1
        all_reduce(labelled)
        for site, of_site in sums.items():
            for total in of_site.totals():
                all_reduce(total)
            if site in self.refinements:
                refinement = self.refinements[site]
                refinement.accept_losses(*of_site.means(refinement.space, labelled))
        self._gather_pixels()
        self.refinements |= dict(in_workers(self._step, list(self.refinements), self.device))

    def _without(self, classes: Tensor, batch: dict[str, Any]) -> PreparedMasks:
        """Return the masks of a batch without the pixels of some classes, bool[B, K]."""
        targets = batch["target"]
        prepare = self.reader.prepare_masks
        return ignore_classes(batch["masks"], classes, lambda image: targets[image], prepare)

    def _probes(self, site: str) -> tuple[Tensor, Tensor, list[int | None], int] | None:
        """Return the arguments of `PassSums` after the loss; None on processes that do not solve the site."""
        refinement = self.refinements.get(site)
        return refinement and refinement.arguments()

    def _step(self, site: str) -> PassRefinement:
        refinement = self.refinements[site]
        _, weights, folds = (x.to(self.device) for x in self.sample_pixels)
        inputs = self.axis_ranges[site].coordinates_of(self.sample_states[site].to(self.device))
        is_last = self.passes == self.most_passes
        refinement.step(SampledPixels(inputs, weights.float(), folds), is_last)
        return refinement

    def _converged(self) -> bool:
        """Return whether the probes of all sites have a certificate."""
        return all(sum(all_gather_objects([x.converged for x in self.refinements.values()]), []))

    def _save_passes(self) -> None:
        """Save all sites in one file, so that they are of the same pass."""
        tensors = {"passes": torch.tensor(self.passes), "class_pixels": self.class_pixels}
        for site in self.sites:
            tensors[f"{site}/deviation"] = self.axis_ranges[site].deviation
            refinement = self.refinements.get(site)
            state = refinement and pack_refinement(refinement)
            state = broadcast(state, self.owner_of(site))
            tensors |= {f"{site}/{name}": x for name, x in state.items()} if rank() == 0 else {}
        if rank() == 0:
            self.checkpoints.save(PASSES, tensors)

    def _resume_passes(self) -> None:
        """Read what a run that was killed in a later pass has saved."""
        tensors = self.checkpoints.load(PASSES)
        self.passes = int(tensors["passes"])
        self.class_pixels = tensors["class_pixels"].to(self.device)
        rank_zero_info(f"resuming after pass {self.passes}")
        for site in self.sites:
            state = {name: x.to(self.device) for name, x in tensors_of(site, tensors).items()}
            deviation = state.pop("deviation")
            refinement = unpack_refinement(state, self.loss, self.options.strengths)
            self.axis_ranges[site] = AxisRange(refinement.space, deviation)
            if rank() == self.owner_of(site):
                self.refinements[site] = refinement
