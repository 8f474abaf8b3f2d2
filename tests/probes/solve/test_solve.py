"""`probes solve` end to end: files, several processes, killed and resumed runs, analyses of its runs."""

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from losses import LabelSmoothing
from optima import assert_same_solution
from PIL import Image
from probe_runs import effects_of_counts, read_masks
from processes import HANGING_S
from run_bytes import run_bytes
from solving import STRENGTHS, arguments

from llava_bidir.common.errors import UserError
from probes.cli import main
from probes.ops.cross_entropy import loss_and_gradient
from probes.runs.read import ProbeRun
from probes.score.effects import read_effect_file
from probes.site_probes import SiteProbes
from probes.solve.path import FoldSearch
from probes.solve.path_scores import PathScores
from probes.solve.progress import follow
from probes.solve.states import new_states
from probes.solve.workers import SiteFiles, in_workers
from probes.step_progress import watched
from probes.tasks.segmentation import Segmentation

pytestmark = pytest.mark.numerics


ADAPTER = ["--model.sites", "[adapter]"]
BYTES = ("probes.safetensors", "effects.safetensors", "counts.safetensors")


@pytest.fixture
def solve(checkpoints, segmentation, tmp_path):
    """Run a command in a folder of the test and return the run."""

    def run(*more: str, out: str = "run", strengths: tuple[str, ...] = STRENGTHS) -> ProbeRun:
        main(
            arguments(
                checkpoints["causal"],
                segmentation,
                tmp_path / out,
                *more,
                strengths=strengths,
            )
        )
        return ProbeRun(tmp_path / out)

    return run


@pytest.fixture(scope="module")
def run(checkpoints, segmentation, tmp_path_factory) -> ProbeRun:
    out = tmp_path_factory.mktemp("solved")
    main(
        arguments(
            checkpoints["causal"],
            segmentation,
            out,
            "--save_predictions",
            "true",
        )
    )
    return ProbeRun(out)


def test_the_strength_of_the_lowest_loss_is_chosen_and_all_are_certified(run):
    path = run.metrics["path"]
    assert [entry["site"] for entry in path["optimum"]["sites"]] == run.sites
    for entry in path["optimum"]["sites"]:
        assert entry["strengths"] == [0.1, 0.01]
        assert all(certificate["converged"] for certificate in entry["certificates"])
        best = int(np.argmin(entry["cv_cross_entropy"]))
        assert entry["chosen"] == entry["lowest"] == [0.1, 0.01][best]


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_and_sites_are_told_one_by_one(threads, monkeypatch, capsys, caplog):
    """Also those that are solved by several processes."""
    caplog.set_level("INFO")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    told = []
    with watched(lambda *progress: told.append(progress) or "about 1 min left"):
        assert [*follow("abc", 3, "states", "lines")] == ["a", "b", "c"]
        results = in_workers(str.upper, ["x", "y"], torch.device("cpu"))
        found = dict(follow(results, 2, "solving sites", "bar"))
    assert found == {"x": "X", "y": "Y"}
    batches = [("states", i, 3) for i in (1, 2, 3)]
    assert told == [*batches, ("solving sites", 1, 2), ("solving sites", 2, 2)]
    assert "solving sites: 100%" in capsys.readouterr().err
    assert "states: 3/3, 0:00:00 left" in caplog.text


def test_effects_are_written_as_the_counts_say(run):
    """To the last bit."""
    written, _ = read_effect_file(run.path / "effects.safetensors")
    computed = effects_of_counts(run)
    for name, estimate in computed.items():
        same = {
            "rtol": 0,
            "atol": 0,
            "equal_nan": True,
        }
        torch.testing.assert_close(written[name].vector, estimate.vector, **same)
        assert written[name].about == estimate.about
    assert {"recovery", "recovery@chosen", "patch_0@layer_02"} <= written.keys()
    for name in ("adapter_drop", "recovery"):
        assert torch.equal(written[f"{name}@chosen"].vector, computed[name].vector)
    assert torch.equal(run.effects["recovery"].vector, written["recovery"].vector)


def test_by_default_the_best_strength_and_its_neighbours_are_solved(solve):
    run = solve("--model.sites", "[encoder, adapter]", strengths=())
    for entry in run.metrics["path"]["optimum"]["sites"]:
        chosen = entry["strengths"].index(entry["chosen"])
        scored = [i for i, value in enumerate(entry["miou"]) if value is not None]
        assert scored == [chosen - 1, chosen, chosen + 1]


def test_each_strength_is_scored_as_a_run_of_that_strength_alone(run, solve):
    """The chosen probe is counted apart from the others, which must not be mixed up."""
    for row, strength in enumerate(STRENGTHS):
        ours = solve(out=strength, strengths=(strength,))
        for entry, alone in zip(run.site_strengths, ours.site_strengths, strict=True):
            assert entry["pacc"][row] == pytest.approx(alone["pacc"][0], abs=0.004)
        # of two strengths: all sites at the first, all at the second
        name = "adapter_drop@weaker" if row else "adapter_drop@stronger"
        of_row = run.effects.get(name, run.effects["adapter_drop@chosen"])
        assert of_row.value == pytest.approx(ours.effects["adapter_drop"].value, abs=0.01)


def test_saved_probes_have_the_scores_of_the_run(run, segmentation):
    mllm = run.mllm()
    probes = run.probes()
    images = [
        Image.open(path).convert("RGB")
        for path in sorted((segmentation / "images/validation").glob("*"))
    ]
    states = mllm.states(mllm.preprocess(images))
    masks = read_masks(segmentation / "annotations/validation")
    for site, entry in zip(run.sites, run.metrics["sites"], strict=True):
        logits = probes[site](states[site].float()).transpose(1, 2).unflatten(2, mllm.grid)
        right = pixels = 0
        for z, mask in zip(logits, masks, strict=True):
            up = F.interpolate(z[None], mask.shape, mode="bilinear")[0].argmax(0).numpy()
            right += (up == mask)[mask != 255].sum()
            pixels += (mask != 255).sum()
        assert right / pixels == pytest.approx(entry["pacc"], abs=1e-3)


def count_forwards(monkeypatch) -> list[tuple[str, ...]]:
    """Return a list to which each forward of training images adds its sites."""
    sites_of = []
    inner = SiteProbes.states

    def states(self, batch, sites=None):
        if sites is not None:
            sites_of.append(tuple(sites))
        return inner(self, batch, sites)

    monkeypatch.setattr(SiteProbes, "states", states)
    return sites_of


ONE_SITE_GB = 6 * 4 * 32 * 4 / 1e9  # six images of four tokens of 32 float32 channels


@pytest.mark.parametrize(
    ("gb", "groups"),
    [
        (0, [("encoder",), ("adapter",), ("layer_02",)]),
        (2.5 * ONE_SITE_GB, [("encoder", "adapter"), ("layer_02",)]),
    ],
    ids=["mapped files", "groups"],
)
def test_memory_changes_no_byte(gb, groups, run, solve, monkeypatch):
    forwards = count_forwards(monkeypatch)
    other = solve("--memory-gb", str(gb))
    assert list(dict.fromkeys(forwards)) == groups
    for name in BYTES:
        assert (other.path / name).read_bytes() == (run.path / name).read_bytes(), name


SLOW_REFINEMENT = """
import sys, time
from pathlib import Path
from probes.cli import main
from probes.solve.path import FoldSearch
started = Path(sys.argv.pop(1))
FoldSearch.visit = lambda *args: (started.touch(), time.sleep(600))
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_sigterm_ends_a_run_at_once(checkpoints, segmentation, tmp_path):
    command = arguments(checkpoints["causal"], segmentation, tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_REFINEMENT, str(tmp_path / "started"), *command]
    )
    try:
        deadline = time.monotonic() + HANGING_S
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.terminate()
        assert process.wait(timeout=30) == -signal.SIGTERM
    finally:
        process.kill()


def die(*args, **kwargs) -> None:
    raise KeyboardInterrupt


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
    "while states are read": (SiteProbes, "states", 2),
    "in a search": (FoldSearch, "visit", 4),
    "when a site is saved": (SiteFiles, "save", 2),
    "while it is scored": (PathScores, "add", 1),
}


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_run_resumes_to_the_same_bytes(
    when,
    run,
    checkpoints,
    segmentation,
    tmp_path,
    monkeypatch,
):
    owner, method, calls = KILLS[when]
    original = getattr(owner, method)
    count = []

    def stop(self, *args) -> object:
        count.append(1)
        return die() if len(count) == calls else original(self, *args)

    killed = arguments(checkpoints["causal"], segmentation, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(owner, method, stop)
        patch.setattr("probes.solve.run.in_workers", in_this_process)
        main(killed)
    if when == "when a site is saved":
        assert len(list((tmp_path / "checkpoints").glob("*.safetensors"))) == 1
        with pytest.raises(SystemExit, match="unfinished"):
            main(killed)
    main([*killed, "--ckpt_path", "last"])
    for name in BYTES:
        assert (tmp_path / name).read_bytes() == (run.path / name).read_bytes(), name
    assert not (tmp_path / "checkpoints").exists()


def test_a_finished_run_is_left_alone(
    run,
    checkpoints,
    segmentation,
    caplog,
):
    before = run_bytes(run.path)
    command = arguments(checkpoints["causal"], segmentation, run.path)
    main([*command, "--ckpt_path", "last"])
    assert "nothing to do" in caplog.text
    with pytest.raises(SystemExit, match="finished run"):
        main(command)
    with pytest.raises(SystemExit, match="folds"):
        main([*command, "--ckpt_path", "last", "--folds", "3"])
    assert run_bytes(run.path) == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--model.head", "conv"], "only linear probes"),
        (["--folds", "1"], "--folds must be at least 2"),
        (["--strengths", "0"], "above 0"),
        (["--data.task", "depth", "--strengths", "2"], "at most 1, got 2"),
        (["--folds", "99"], "99 folds"),
        (["--memory-gb", "-1"], "--memory-gb must be at least 0, got -1"),
        (["--trainer.limit_test_batches", "0.5"], "limit_test_batches has no meaning for solved"),
    ],
)
def test_rejects_bad_options(
    option,
    message,
    checkpoints,
    task_root,
    tmp_path,
):
    with pytest.raises((SystemExit, UserError), match=message):
        main(arguments(checkpoints["causal"], task_root, tmp_path, *option))


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


def test_dry_run_measures_and_writes_nothing(
    checkpoints,
    segmentation,
    tmp_path,
    caplog,
):
    command = arguments(checkpoints["causal"], segmentation, tmp_path / "out", "--dry-run")
    main(command)
    assert "images/s; a forward over 6 training images" in caplog.text
    assert "1 forwards at most" in caplog.text and "GB in memory" in caplog.text
    main([*command, "--memory-gb", "0"])
    assert "3 forwards at most" in caplog.text and "GB in a file" in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_loss_is_another_run(solve, tmp_path, monkeypatch):
    """The command, repeated with another loss in the code, left the run of the first loss as its own."""
    solve(*ADAPTER)
    monkeypatch.setattr(Segmentation, "loss", LabelSmoothing(0.2))
    message = r"with model.loss=None, but this run has 'LabelSmoothing\(share=0.2\)'"
    with pytest.raises(SystemExit, match=message):
        solve(*ADAPTER, "--ckpt_path", "last")
    solve(*ADAPTER, "--overwrite", "true")
    monkeypatch.setattr(Segmentation, "loss", LabelSmoothing(0.3))
    with pytest.raises(SystemExit, match=r"share=0.2\)', but this run has 'Label.*share=0.3"):
        solve(*ADAPTER, "--ckpt_path", "last")


@pytest.mark.parametrize("can_reserve", [True, False])
def test_mapped_states_keep_their_bits_and_leave_no_file(can_reserve, tmp_path, monkeypatch):
    if not can_reserve:  # as on macOS
        monkeypatch.delattr(os, "posix_fallocate")
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x[1, 0, 0] = torch.inf
    kept = new_states(x.shape, x.dtype, tmp_path / "made")
    for i in (2, 0, 1):
        kept[i] = x[i]
    assert torch.equal(kept, x)
    assert not any((tmp_path / "made").iterdir())


def test_a_full_disk_is_an_error_that_says_how_much_is_needed(tmp_path, monkeypatch):
    def full(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="take 0.008 GB, more than --memory-gb, and more than"):
        new_states((1000, 1000, 2), torch.float32, tmp_path)
