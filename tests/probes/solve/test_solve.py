"""`probes solve` end to end: files, several processes, killed and resumed runs, analyses of its runs."""

import errno
import os
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from losses import LabelSmoothing
from optima import assert_same_solution
from probe_runs import effects_of_counts
from run_bytes import assert_same_results
from solving import STRENGTHS, arguments

from llava_bidir.common.errors import UserError
from probes.cli import main
from probes.data.batches import MaskPreparer
from probes.ops import lbfgs
from probes.ops.cross_entropy import loss_and_gradient
from probes.ops.geometry import GridPlacement
from probes.ops.normal_equations import normal_equations
from probes.runs.read import ProbeRun
from probes.score.image_metrics import TaskMetric
from probes.site_probes import SiteProbes
from probes.solve import states
from probes.solve.objective import NODES, SiteProblem
from probes.solve.run import MEMORY_SHARE
from probes.solve.states import new_states, target_bytes
from probes.solve.strength_search import FoldSearch
from probes.solve.workers import SiteFiles, in_workers
from probes.tasks.segmentation import Segmentation

pytestmark = pytest.mark.numerics


ADAPTER = ["--model.sites", "[adapter]"]


@pytest.fixture(scope="module")
def words(checkpoints, segmentation):
    """The command, as a function of its folder and more options."""
    return partial(arguments, checkpoints["causal"], segmentation)


@pytest.fixture
def solve(words, tmp_path):
    """Run a command in a folder of the test and return the run."""

    def run(*more: str, out: str = "run", **options) -> ProbeRun:
        main(words(tmp_path / out, *more, **options))
        return ProbeRun(tmp_path / out)

    return run


@pytest.fixture(scope="module")
def run(words, tmp_path_factory) -> ProbeRun:
    out = tmp_path_factory.mktemp("solved")
    main(words(out))
    return ProbeRun(out)


def test_the_strength_of_the_lowest_loss_is_chosen_and_all_are_certified(run):
    assert [entry["site"] for entry in run.strengths.sites] == run.sites
    for entry in run.strengths.sites:
        assert entry["strengths"] == [0.1, 0.01]
        assert all(certificate["converged"] for certificate in entry["certificates"])
        best = int(np.argmin(entry["cv_cross_entropy"]))
        assert entry["chosen"] == entry["lowest"] == [0.1, 0.01][best]


def test_effects_are_written_as_the_counts_say(run):
    """To the last bit."""
    computed = effects_of_counts(run)
    computed |= {f"{name}@chosen": computed[name] for name in ("adapter_drop", "recovery")}
    assert "patch_0@layer_02" in computed
    for name, estimate in computed.items():
        written = run.effects[name]
        torch.testing.assert_close(written.vector, estimate.vector, rtol=0, atol=0, equal_nan=True)
        assert written.about | estimate.about == written.about


def test_each_strength_is_scored_as_a_run_of_that_strength_alone(run, solve):
    """The chosen probe is counted apart from the others, which must not be mixed up."""
    for row, strength in enumerate(STRENGTHS):
        ours = solve("--model.sites", "[encoder, adapter]", out=strength, strengths=(strength,))
        for alone in ours.strengths.sites:
            entry = run.strengths.sites[run.sites.index(alone["site"])]
            assert entry["pacc"][row] == pytest.approx(alone["pacc"][0], abs=0.004)
        # of two strengths: all sites at the first, all at the second
        name = "adapter_drop@weaker" if row else "adapter_drop@stronger"
        of_row = run.effects.get(name, run.effects["adapter_drop@chosen"])
        assert of_row.value == pytest.approx(ours.effects["adapter_drop"].value, abs=0.01)


@pytest.fixture
def forwards(monkeypatch) -> dict[tuple[str, ...], None]:
    """Groups of sites that are read from training images, in their order."""
    groups = {}
    states = SiteProbes.states

    def counted(self, batch, sites=None):
        groups.update({tuple(sites): None} if sites else {})
        return states(self, batch, sites)

    monkeypatch.setattr(SiteProbes, "states", counted)
    return groups


ONE_SITE_GB = 6 * 4 * 32 * 4 / 1e9  # six images of four tokens of 32 float32 channels


@pytest.mark.parametrize(
    ("gb", "groups"),
    [
        (0, [("encoder",), ("adapter",), ("layer_02",)]),
        (2.5 * ONE_SITE_GB, [("encoder", "adapter"), ("layer_02",)]),
    ],
    ids=["mapped files", "groups"],
)
def test_memory_changes_no_byte(gb, groups, run, solve, forwards):
    other = solve("--memory-gb", str(gb))
    assert list(forwards) == groups
    assert_same_results(other.path, run.path)


def test_masks_count_in_the_memory_and_are_in_it_once(
    run, solve, words, tmp_path, forwards, caplog, monkeypatch
):
    """Of ADE20K they are 8 GB, which a list of batches and their join had twice."""
    masks = (
        6 * 4 * (3 * 4 + (2 + NODES) ** 2)
    )  # three classes at four tokens, and nodes of one cell
    free = (masks + 2.4e9 * ONE_SITE_GB) / MEMORY_SHARE
    monkeypatch.setattr("probes.solve.run.available_memory", lambda: free)
    batches = []

    def record(batch, device):
        assert sum(masks() is not None for masks in batches) <= 1, "the one before"
        if "masks" in batch:
            batches.append(weakref.ref(batch["masks"].soft))
        return batch

    monkeypatch.setattr(states, "move_batch", record)
    other = solve()
    assert len(batches) == 3
    assert list(forwards) == [("encoder", "adapter"), ("layer_02",)]
    assert_same_results(other.path, run.path)
    main(words(tmp_path / "out", "--dry-run"))
    assert "2 forwards at most" in caplog.text


def test_bytes_of_values_are_known_before_they_are_read():
    grid = (6, 5)
    equations = normal_equations(torch.rand(1, 9, 9, 3), grid, GridPlacement.full((9, 9)))
    tensors = [*equations.couplings.values(), equations.weight, equations.projected]
    task = SimpleNamespace(loss=None)
    probes = SimpleNamespace(mllm=SimpleNamespace(grid=grid), task=task, channels=3)
    assert target_bytes(probes) == pytest.approx(sum(x.nbytes for x in tensors), rel=0.1)


def in_this_process(work, sites, device):
    """Solve sites on one thread here, where a patch is seen; workers are processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from ((site, work(site)) for site in sites)
    finally:
        torch.set_num_threads(threads)


# class and method, and the number of calls after which it is killed
KILLS = {
    "in a search": (FoldSearch, "visit", 4),
    "when a site is saved": (SiteFiles, "save", 2),
    "while it is scored": (TaskMetric, "update", 1),
}


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_run_resumes_to_the_same_bytes(when, run, words, tmp_path, monkeypatch):
    owner, method, calls = KILLS[when]
    original = getattr(owner, method)
    count = []

    def stop(self, *args) -> object:
        count.append(1)
        if len(count) == calls:
            raise KeyboardInterrupt
        return original(self, *args)

    killed = words(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(owner, method, stop)
        patch.setattr("probes.solve.run.in_workers", in_this_process)
        main(killed)
    if when == "when a site is saved":
        assert len(list((tmp_path / "checkpoints").glob("*.safetensors"))) == 1
        with pytest.raises(SystemExit, match="unfinished"):
            main(killed)
    main([*killed, "--ckpt_path", "last"])
    assert_same_results(tmp_path, run.path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--model.head", "conv"], "only linear probes"),
        (["--data.task", "depth", "--strengths", "2"], "at most 1, got 2"),
        (["--folds", "99"], "99 folds"),
        (["--model.draw", "3"], "draw 3 is one of random weights; add their part to untrained"),
    ],
)
def test_rejects_bad_options(option, message, solve, task_root):
    with pytest.raises((SystemExit, UserError), match=message):
        solve("--data.root", str(task_root), *option)


def test_gradients_that_certify_an_optimum_are_not_autocast(solve, monkeypatch):
    seen = set()

    def record(*args, **kwargs):
        seen.add(torch.is_autocast_enabled("cpu"))
        return loss_and_gradient(*args, **kwargs)

    monkeypatch.setattr("probes.tasks.losses.loss_and_gradient", record)
    monkeypatch.setattr("probes.solve.run.in_workers", in_this_process)
    solve("--trainer.precision", "bf16-mixed", *ADAPTER)
    assert seen == {False}


def test_sites_solved_on_one_thread_and_on_two_have_the_same_optimum(run, solve):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        other = solve("--model.sites", "[encoder, adapter]")
        assert torch.get_num_threads() == 3 - min(threads, 2), "restored"
    finally:
        torch.set_num_threads(threads)
    assert_same_solution(run, other)


def test_a_site_left_alone_is_solved_on_one_thread_too():
    """With more it would round otherwise than in the run that was killed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = dict(in_workers(lambda _: torch.get_num_threads(), ["a"], torch.device("cpu")))
    finally:
        torch.set_num_threads(threads)
    assert found == {"a": 1}


def test_dry_run_measures_and_writes_nothing(words, tmp_path, caplog, monkeypatch):
    command = words(tmp_path / "out", "--dry-run")
    main(command)
    assert "1 forwards at most" in caplog.text and "GB in memory, beside" in caplog.text
    main([*command, "--memory-gb", "0"])
    assert "3 forwards at most" in caplog.text and "GB in a file" in caplog.text
    monkeypatch.setattr("probes.solve.run.rank", lambda: 1)
    monkeypatch.setattr("probes.solve.run.rank_count", lambda: 2)
    main([*command, *ADAPTER])  # this process has no site
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_loss_is_another_run(run, words, monkeypatch):
    """The command, repeated with another loss in the code, left the run of the first loss as its own."""
    monkeypatch.setattr(Segmentation, "loss", LabelSmoothing(0.2))
    message = r"with model.loss=None, but this run has 'LabelSmoothing\(share=0.2\)'"
    with pytest.raises(SystemExit, match=message):
        main(words(run.path, "--ckpt_path", "last"))


def test_mapped_states_keep_their_bits_and_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x[1, 0, 0] = torch.inf
    kept = new_states(x.shape, x.dtype, tmp_path / "made")
    kept[torch.tensor([2, 0, 1])] = x[[2, 0, 1]]
    assert torch.equal(kept, x)
    assert not any((tmp_path / "made").iterdir())


def test_a_full_disk_is_an_error_that_says_how_much_is_needed(tmp_path, monkeypatch):
    def full(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left.* takes 0.008 GB, more than --memory-gb"):
        new_states((1000, 1000, 2), torch.float32, tmp_path)


# ---------------------------------------------------------------------------------------------------- optima.py
def bias_without_gradient(inner, *args, **kwargs):
    loss, gradient = inner(*args, **kwargs)
    if gradient is not None:
        gradient[..., -1] = 0
    return loss, gradient


def folds_that_see_what_they_leave_out(inner, self, strengths, left_out):
    return inner(self, strengths, [None] * len(left_out))


def rows_of_pixels_dropped(inner, self, target):
    for mask in target:
        mask[-2:] = 255
    return inner(self, target)


FAULTS = {
    bias_without_gradient: (SiteProblem, "sums"),
    folds_that_see_what_they_leave_out: (SiteProblem, "objective"),
    rows_of_pixels_dropped: (MaskPreparer, "__call__"),
    1: (lbfgs, "ITERATIONS"),  # stopped too early
    2: (states, "NODES"),  # too few for the integrals
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_of_optima_rejects_what_a_faulty_solver_finds(
    fault, run, solve, monkeypatch
):
    owner, name = FAULTS[fault]
    inner = getattr(owner, name)
    faulty = (lambda *args, **kwargs: fault(inner, *args, **kwargs)) if callable(fault) else fault
    monkeypatch.setattr(owner, name, faulty)
    wrong = solve(*ADAPTER)
    with pytest.raises(AssertionError):
        assert_same_solution(run, wrong)
