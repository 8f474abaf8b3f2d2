"""The comparison of two optima, `tests/helpers/optima.py`, rejects what faulty solvers find."""

import pytest
import solving
from optima import assert_same_solution

from probes.cli import main
from probes.data.batches import MaskPreparer
from probes.ops import lbfgs
from probes.runs.read import ProbeRun
from probes.solve import states
from probes.solve.objective import SiteProblem

pytestmark = pytest.mark.numerics

SITES = ["adapter"]


@pytest.fixture(scope="module")
def folders(checkpoints, segmentation):
    return checkpoints["causal"], segmentation


def solve(folders, out) -> ProbeRun:
    main(solving.arguments(*folders, out, "--model.sites", f"[{SITES[0]}]"))
    return ProbeRun(out)


@pytest.fixture(scope="module")
def right(folders, tmp_path_factory) -> ProbeRun:
    return solve(folders, tmp_path_factory.mktemp("right"))


def bias_without_gradient(patch) -> None:
    inner = SiteProblem.sums

    def sums(*args, **kwargs):
        loss, gradient = inner(*args, **kwargs)
        if gradient is not None:
            gradient[..., -1] = 0
        return loss, gradient

    patch.setattr(SiteProblem, "sums", sums)


def images_of_a_fold_missed(patch) -> None:
    inner = SiteProblem.sums

    def sums(self, fold, *args, **kwargs):
        loss, gradient = inner(self, fold, *args, **kwargs)
        if fold == 0:
            return 0 * loss, None if gradient is None else 0 * gradient
        return loss, gradient

    patch.setattr(SiteProblem, "sums", sums)


def folds_that_see_what_they_leave_out(patch) -> None:
    inner = SiteProblem.objective

    def of_all_images(self, strengths, left_out):
        return inner(self, strengths, [None] * len(left_out))

    patch.setattr(SiteProblem, "objective", of_all_images)


def optimizer_stopped(patch) -> None:
    patch.setattr(lbfgs, "ITERATIONS", 1)


def few_nodes(patch) -> None:
    patch.setattr(states, "NODES", 2)


def rows_of_pixels_dropped(patch) -> None:
    inner = MaskPreparer.__call__

    def prepare(self, target):
        for mask in target:
            mask[-2:] = 255
        return inner(self, target)

    patch.setattr(MaskPreparer, "__call__", prepare)


FAULTS = (
    bias_without_gradient,
    images_of_a_fold_missed,
    folds_that_see_what_they_leave_out,
    optimizer_stopped,
    few_nodes,
    rows_of_pixels_dropped,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_faulty_solver_has_another_optimum(fault, right, folders, tmp_path, monkeypatch):
    fault(monkeypatch)
    wrong = solve(folders, tmp_path)
    with pytest.raises(AssertionError):
        assert_same_solution(right, wrong)
