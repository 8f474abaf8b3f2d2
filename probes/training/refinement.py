"""Refine the probes of all sites on a sample of states in memory and by exact gradients of passes; see `optimum.py`.

Legend: P problems of a site, F folds, B images, T tokens, n tokens, d width, K classes.
"""

from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from probes.data.batches import group_by_mask_size
from probes.ops.cross_entropy import soft_labels

from .distributed import all_gather, all_reduce, rank, rank_count
from .optimum import DENSE, Certificate, Objective, Problem, dense_metric, loss_sums, minimise, tilt
from .state_sample import StateSample, centre

DENSE_TOKENS = 2**12  # tokens from which a Hessian is computed

Images = list[tuple[int, Tensor, Tensor]]  # fold, x - mean f32[B, T, d], masks uint8[B, H, W]


class Refinement:
    """The problems of all sites.

    Args:
        sample: States in memory.
    """

    def __init__(self, sample: StateSample):
        self.sample, self.mllm = sample, sample.mllm
        self.problems: dict[str, list[Problem]] = {}  # by site, the whole data before its folds, strong before weak
        self._pass: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # current probes and sums of this pass, by site
        self._pixels = torch.zeros(sample.fold_count, dtype=torch.float64, device=self.mllm.device)

    @property
    def converged(self) -> bool:
        """Every problem has a certificate that it is at its optimum."""
        certificates = [problem.certificate for problems in self.problems.values() for problem in problems]
        return all(certificate is not None and certificate.converged for certificate in certificates)

    # -------------------------------------------------------------------------------------------- on the sample
    def refine(self, whole: bool, last: bool = False) -> None:
        """Certify every problem, and move it to its next point.

        Args:
            whole: The sample is the whole training split, so that the next point is the optimum. Otherwise the
                problems must have their exact gradients.
            last: No pass follows that could check the next point, so that the problems stay where they are.
        """
        pixels = self.sample.labelled()
        sites = tqdm(self.problems.items(), desc="refining sites", disable=rank() > 0, mininterval=5)
        for site, problems in sites:
            mean = problems[0].space.mean
            images = [(fold, centre(x, mean), y.to(mean.device)) for fold, x, y in self.sample.chunks(site)]
            tokens = self._tokens(problems[0], images) if problems[0].point.numel() <= DENSE else None
            nearest = metric = None
            for problem in problems:
                if whole and nearest is not None:  # convex: the start decides the time, not the result
                    problem.point = nearest
                factorise = partial(dense_metric, problem, *tokens) if tokens else None
                objective = self._objective(problem, images, pixels)
                self._step(problem, objective, whole, last, factorise, None if problem.fold is None else metric)
                if whole and problem.fold is None:
                    nearest, metric = problem.point, factorise() if factorise else None

    def _step(self, problem: Problem, on_sample: Objective, whole: bool, last: bool, *metrics) -> None:
        if whole:
            problem.certificate = minimise(on_sample, problem, *metrics)
            return
        before, (_, gradient) = problem.point, problem.add_ridge(0.0, problem.gradient, problem.point)
        tilted = tilt(on_sample, problem, gradient)
        minimise(tilted, problem, *metrics)
        decrease = tilted(before)[0] - tilted(problem.point)[0]
        problem.certificate = Certificate(problem.norm(gradient) / problem.null_gradient, decrease)
        if last or problem.certificate.converged:
            problem.point = before  # what the certificate is about

    def _objective(self, problem: Problem, images: Images, pixels: Tensor) -> Objective:
        """Return the objective on the images, of all processes, that are not of the problem's fold."""
        used = [(x, masks) for fold, x, masks in images if fold != problem.fold]
        count = _without(pixels, problem.fold)

        def objective(point: Tensor) -> tuple[float, Tensor]:
            linear, bias = problem.linear(point)
            total = torch.zeros(1 + linear.numel() + len(bias), dtype=torch.float64, device=linear.device)
            for x, masks in used:
                options = self.sample.loss_options(masks)
                total += loss_sums(x, masks, linear[None], bias[None], self.mllm.grid, **options)[0]
            return problem.add_ridge(*problem.by_point(all_reduce(total) / count), point)

        return objective

    def _tokens(self, problem: Problem, images: Images) -> tuple[Tensor, Tensor]:
        """Return coordinates f32[n, d + 1] and labelled pixels f32[n] of some tokens of all processes' images."""
        share, width = DENSE_TOKENS // rank_count(), len(problem.space.mean) + 2
        step = max(1, sum(x.shape[0] * x.shape[1] for _, x, _ in images) // share)
        found = [torch.zeros(share + len(images), width, device=problem.space.mean.device)]  # the same size everywhere
        for _, x, masks in images:
            labels = soft_labels(masks, len(problem.point), self.mllm.grid, **self.sample.loss_options(masks))
            pixels = labels.sum(-1).flatten()[::step].float()
            found.insert(0, torch.cat([problem.coordinates(x.flatten(0, 1)[::step]), pixels[:, None]], 1))
        tokens = all_gather(torch.cat(found)[:share]).flatten(0, 1)
        return tokens[:, :-1], tokens[:, -1]

    # ------------------------------------------------------------------------------------------------ in a pass
    def add_gradients(self, states: dict[str, Tensor], target: Tensor | list[Tensor], fold: int) -> None:
        """Add images of a fold to loss and gradient, at the current point, of each problem that uses the fold.

        Args:
            states: f[B, T, d] by site.
            target: uint8[B, H, W], or a list of B masks.
            fold: Their fold.
        """
        for images, masks in group_by_mask_size(target):
            options = self.sample.loss_options(masks)
            for site, problems in self.problems.items():
                used = [i for i, problem in enumerate(problems) if problem.fold != fold]
                linear, bias, sums = self._sums(site)
                x = centre(states[site][images], problems[0].space.mean)
                sums[used] += loss_sums(x, masks, linear[used], bias[used], self.mllm.grid, **options)
            self._pixels[fold] += self.sample.count_labelled(masks)

    def _sums(self, site: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the current probes f32[P, K, d], f32[P, K], and the sums of this pass f64[P, 1 + K d + K]."""
        if site not in self._pass:
            linear, bias = stack_points(self.problems[site])
            sums = linear.new_zeros(len(linear), 1 + linear[0].numel() + bias.shape[1], dtype=torch.float64)
            self._pass[site] = linear, bias, sums
        return self._pass[site]

    def set_gradients(self) -> None:
        """Give the problems the exact gradients that a pass has summed."""
        all_reduce(self._pixels)
        for site, problems in self.problems.items():
            for problem, total in zip(problems, all_reduce(self._sums(site)[2]), strict=True):
                problem.accept(*problem.by_point(total / _without(self._pixels, problem.fold)))
        self._pass.clear()
        self._pixels.zero_()


def _without(pixels: Tensor, fold: int | None) -> float:
    return (pixels.sum() - (0 if fold is None else pixels[fold])).item()


def stack_points(problems: list[Problem]) -> tuple[Tensor, Tensor]:
    """Return the probes of the current points, weights f32[P, K, d] of x - mean and biases f32[P, K]."""
    weights, biases = zip(*[problem.linear() for problem in problems], strict=True)
    return torch.stack(weights).float(), torch.stack(biases).float()
