"""Refine the probes of a site to the optimum of the paper's loss.

The objective of a problem (a strength r, and a fold of images that is left out, or none) is convex:

    f(w, b) = mean cross-entropy of the upsampled logits over labelled pixels + r/2 w^T D w        (D: closed_form.py)

w is in the coordinates in which D is the identity and the within-class covariance diag(s). L-BFGS minimises f over a
sample of images whose states are kept in memory. If the sample is the whole training split, that is the optimum. If
not, the next point minimises

    f_S(w) + <g - grad f_S(w_t), w - w_t> + c/2 |w - w_t|^2     S: the sample, w_t: the current point, g = grad f(w_t)

which has the right gradient and the sample's curvature. At w_0 = 0 the moments give g; later it takes a pass over the
split. If f has risen, the step is taken back and c is increased. A pass costs a forward of the frozen MLLM for each
image, L-BFGS on the sample none. Source: DANE (Shamir, Srebro and Zhang 2014), with a pass in place of the other
machines.

Legend: P problems, B images, T tokens, n tokens, d width, K classes.
"""

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

from probes.ops.cross_entropy import upsampled_cross_entropy

from .closed_form import ClosedForm
from .moments import full_precision

OPTIMUM_STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3)
GRADIENT, DECREASE = 1e-3, 1e-4  # tolerances of a certificate
MEMORY = 20  # pairs of L-BFGS
ITERATIONS = 500
DENSE = 3000  # parameters up to which the Hessian is factorised
DENSE_ROUND = 10  # iterations with one factor
DENSE_ROUNDS = 8
ROUNDING = 1e-7  # decrease in nats below which float32 sums do not allow another step


class Certificate(NamedTuple):
    """How far a point can be from the minimum of a convex objective.

    Args:
        gradient: Norm of the gradient in whitened coordinates, relative to that at w = 0.
        decrease: Decrease in nats that a quadratic model predicts, 1/2 g^T H^-1 g with the curvature H of L-BFGS; with
            a sample, the decrease that its model has found.
    """

    gradient: float
    decrease: float

    @property
    def converged(self) -> bool:
        """Both are below their tolerance."""
        return self.gradient < GRADIENT and self.decrease < DECREASE


@dataclass
class Problem:
    """A strength and a left-out fold at one site, with the current point.

    Args:
        space: The discriminants of all folds, which define coordinates and D.
        strength: r.
        fold: Fold that is left out, or None.
        moments: The discriminants of the folds that are used, for the gradient at w = 0.
        point: f64[K, d + 1], w and, in the last column, b.
        gradient: f64[K, d + 1], exact gradient of the cross-entropy at `point`; None if it is unknown.
    """

    space: ClosedForm
    strength: float
    fold: int | None
    moments: InitVar[ClosedForm]
    point: Tensor = field(init=False)
    gradient: Tensor | None = field(init=False)
    certificate: Certificate | None = None
    proximal: float = 1e-3  # weight of |w - w_t|^2 in whitened coordinates

    def __post_init__(self, moments: ClosedForm):
        width = len(self.space.spectrum)
        self.point = torch.cat(
            [self.space.directions.new_zeros(len(moments.log_prior), width), moments.log_prior[:, None]], 1
        )
        by_state = -moments.log_prior.exp()[:, None] * moments.centred_means()
        self.gradient = torch.cat([self.space.from_gradient(by_state), torch.zeros_like(self.point[:, -1:])], 1)
        self.null_gradient = self.norm(self.gradient)
        self._value = -(moments.log_prior.exp() * moments.log_prior).sum().item()  # objective at `_kept`
        self._kept = self.point, self.gradient

    def accept(self, loss: float, gradient: Tensor) -> None:
        """Take the exact cross-entropy and its gradient at the current point; step back if the objective has risen."""
        value, _ = self.add_ridge(loss, gradient, self.point)
        if value <= self._value:
            self._value, self._kept = value, (self.point, gradient)
        else:  # the sample's model does not hold so far away
            self.proximal *= 10
        self.point, self.gradient = self._kept

    def state(self) -> dict[str, Tensor]:
        """Return what a killed run needs to go on; the problem must have a certificate.

        Returns:
            {"points": f64[K, d + 1], the current point; "kept_points" and "kept_gradients": f64[K, d + 1], the last
            accepted point and the gradient there; "numbers": f64[4], the certificate, `proximal`, and the objective at
            the accepted point}
        """
        point, gradient = self._kept
        numbers = torch.tensor([*self.certificate, self.proximal, self._value], dtype=torch.float64)
        return {"points": self.point, "kept_points": point, "kept_gradients": gradient, "numbers": numbers}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Set what :meth:`state` returned; the next pass gives the gradient at the current point."""
        self.point, *kept = (state[key].to(self.point) for key in ("points", "kept_points", "kept_gradients"))
        self._kept = tuple(kept)
        *certificate, self.proximal, self._value = state["numbers"].tolist()
        self.certificate = Certificate(*certificate)

    @property
    def metric(self) -> Tensor:
        """Eigenvalues s + r of the coordinates in which gradients are measured, f64[d + 1]; 1 for the bias."""
        return torch.cat([self.space.spectrum + self.strength, torch.ones_like(self.space.spectrum[:1])])

    def norm(self, gradient: Tensor) -> float:
        """Return the norm of a gradient f64[K, d + 1] in whitened coordinates."""
        return gradient.div(self.metric.sqrt()).norm().item()

    def linear(self, point: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights f64[K, d] of x - mean and biases f64[K] of a point, by default the current one."""
        point = self.point if point is None else point
        return self.space.to_states(point[:, :-1]), point[:, -1]

    def by_point(self, sums: Tensor) -> tuple[float, Tensor]:
        """Return a mean loss and its gradient by the point, from f64[1 + K d + K] as of :func:`loss_sums`."""
        loss, by_linear, by_bias = sums.split([1, self.point[:, :-1].numel(), len(self.point)])
        gradient = self.space.from_gradient(by_linear.view(len(self.point), -1))
        return loss.item(), torch.cat([gradient, by_bias[:, None]], 1)

    def add_ridge(self, loss: float, gradient: Tensor, point: Tensor) -> tuple[float, Tensor]:
        """Return objective and gradient from those of the cross-entropy."""
        ridge = torch.cat([self.strength * point[:, :-1], torch.zeros_like(point[:, -1:])], 1)
        return loss + (ridge * point).sum().item() / 2, gradient + ridge

    def coordinates(self, states: Tensor) -> Tensor:
        """Return x - mean f[n, d] in the coordinates of the weights, with a last column of ones for the bias."""
        u = (states * self.space.scale.to(states)) @ self.space.basis.to(states)
        return torch.cat([u, torch.ones_like(u[:, :1])], 1)


@full_precision()
def loss_sums(
    states: Tensor, target: Tensor, weights: Tensor, bias: Tensor, grid: tuple[int, int], **loss_options
) -> Tensor:
    """Return summed loss, gradient by weights and by biases of P linear probes on the same images, f64[P, 1 + K d + K].

    Args:
        states: f[B, T, d], x - mean, in the dtype of the computation.
        target: uint8[B, H, W], 255 ignored.
        weights, bias: f[P, K, d] and f[P, K].
        grid: (h, w).
        loss_options: `view` and `label_stride` of :func:`upsampled_cross_entropy`.
    """
    with torch.enable_grad():
        logits = torch.einsum("btd,pkd->pbkt", states, weights.to(states)) + bias.to(states)[:, None, :, None]
        logits = logits.detach().requires_grad_()
        loss = upsampled_cross_entropy(logits.unflatten(-1, grid), target, reduction="sum", **loss_options)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
    by_weights = torch.einsum("pbkt,btd->pkd", gradient, states)
    return torch.cat([loss.detach()[:, None], by_weights.flatten(1), gradient.sum((1, 3))], 1).double()


class Metric:
    """Coordinates phi of steps, point = start + L^-T phi, in which the Hessian is about the identity, H = L L^T.

    Args:
        factor: f64[n, n], L; or f64[n] if it is diagonal.
    """

    def __init__(self, factor: Tensor):
        self.factor = factor

    def step(self, phi: Tensor) -> Tensor:
        """Return L^-T phi."""
        if self.factor.ndim == 1:
            return phi / self.factor
        return torch.linalg.solve_triangular(self.factor.T, phi[:, None], upper=True)[:, 0]

    def gradient(self, gradient: Tensor) -> Tensor:
        """Return L^-1 gradient."""
        if self.factor.ndim == 1:
            return gradient / self.factor
        return torch.linalg.solve_triangular(self.factor, gradient[:, None], upper=False)[:, 0]


def diagonal_metric(problem: Problem) -> Metric:
    """Return the metric W + r D for every class: it whitens the states."""
    return Metric(problem.metric.sqrt().expand_as(problem.point).flatten())


def dense_metric(problem: Problem, tokens: Tensor, pixels: Tensor) -> Metric:
    """Return the Hessian of the cross-entropy of tokens instead of pixels at the current point, factorised.

    It is an upper bound of the Hessian, since upsampling averages logits.

    Args:
        problem: At its current point.
        tokens: f32[n, d + 1], :meth:`Problem.coordinates`.
        pixels: f32[n], labelled pixels of each token.
    """
    p = torch.softmax(tokens @ problem.point.to(tokens).T, -1)
    weight, (classes, width) = pixels / pixels.sum(), problem.point.shape
    hessian = tokens.new_empty(classes, width, classes, width)
    for k in range(classes):
        for other in range(k, classes):
            curvature = weight * p[:, k] * (float(k == other) - p[:, other])
            hessian[k, :, other] = hessian[other, :, k] = tokens.T @ (tokens * curvature[:, None])
    hessian = hessian.view(classes * width, classes * width).double()
    ridge = torch.full_like(problem.point, problem.strength)
    ridge[:, -1] = 0
    # the sum of all biases is free, and float32 products are exact to about 1e-7 of the largest eigenvalue
    floor = 1e-6 * hessian.diagonal().mean()
    for _ in range(16):
        factor, failed = torch.linalg.cholesky_ex(hessian + torch.diag(ridge.flatten() + floor))
        if not failed:
            return Metric(factor)
        floor = 10 * floor
    raise RuntimeError("the loss has no curvature: its Hessian is 0 or not finite")


Objective = Callable[[Tensor], tuple[float, Tensor]]  # point f64[K, d + 1] -> value, gradient


def minimise(
    objective: Objective, problem: Problem, factorise: Callable[[], Metric] | None = None, metric: Metric | None = None
) -> Certificate:
    """Move a problem to the minimum of an objective by L-BFGS; return the certificate.

    Args:
        objective: Convex.
        problem: At the starting point.
        factorise: Returns the metric at the problem's current point; called every few iterations. None: the states are
            whitened, which takes more iterations.
        metric: Metric of the first iterations, if one is known.
    """
    if factorise is None:
        return _minimise_in(objective, problem, diagonal_metric(problem), ITERATIONS)[0]
    for _ in range(DENSE_ROUNDS):
        certificate, decrease = _minimise_in(objective, problem, metric or factorise(), DENSE_ROUND)
        if certificate.converged or decrease < ROUNDING:
            break
        metric = None
    return certificate


def _minimise_in(objective: Objective, problem: Problem, metric: Metric, iterations: int) -> tuple[Certificate, float]:
    start, last = problem.point, [problem.point]
    first, gradient = objective(start)
    # L-BFGS-B starts with a step of length 1; in these units that is the Newton step
    unit = max(metric.gradient(gradient.flatten()).norm().item(), 1e-30)

    def value_and_gradient(phi: np.ndarray) -> tuple[float, np.ndarray]:
        point = start + metric.step(torch.from_numpy(phi * unit).to(start)).view_as(start)
        value, gradient = objective(point)
        last[:] = point, gradient
        return value / unit**2, (metric.gradient(gradient.flatten()) / unit).cpu().numpy()

    def stop(intermediate_result: OptimizeResult) -> None:
        decrease = (metric.gradient(last[1].flatten()).norm() ** 2 / 2).item()
        if problem.norm(last[1]) < GRADIENT / 4 * problem.null_gradient and decrease < DECREASE / 100:
            raise StopIteration

    zero = np.zeros(start.numel())
    options = {"maxcor": MEMORY, "maxiter": iterations, "ftol": 0.0, "gtol": 0.0}
    result = minimize(value_and_gradient, zero, jac=True, method="L-BFGS-B", options=options, callback=stop)
    value, gradient = objective(start + metric.step(torch.from_numpy(result.x * unit).to(start)).view_as(start))
    problem.point = start + metric.step(torch.from_numpy(result.x * unit).to(start)).view_as(start)
    decrease = 0.5 * float(result.jac @ (result.hess_inv @ result.jac)) * unit**2
    return Certificate(problem.norm(gradient) / problem.null_gradient, decrease), first - value


def tilt(objective: Objective, problem: Problem, exact: Tensor) -> Objective:
    """Return the model of an objective about the problem's point whose gradient there is `exact`, f64[K, d + 1].

    It is the objective on the sample plus a linear term, and a quadratic one, without which a class that
    the sample hardly has could leave the model without a minimum.
    """
    point, linear, proximal = problem.point, exact - objective(problem.point)[1], problem.proximal * problem.metric

    def tilted(x: Tensor) -> tuple[float, Tensor]:
        (value, gradient), pull = objective(x), proximal * (x - point)
        return value + ((x - point) * (linear + pull / 2)).sum().item(), gradient + linear + pull

    return tilted
