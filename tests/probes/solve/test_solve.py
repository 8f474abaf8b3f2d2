"""`probes solve` end to end: files, several processes, killed and resumed runs, analyses of its runs."""

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
from probes.runs.probe_run import ProbeRun
from probes.score.effect_file import read_effect_file
from probes.score.strengths import CONVERGED
from probes.site_probes import SiteProbes
from probes.solve.by_passes import PassSolver
from probes.solve.in_memory import MemorySolver
from probes.solve.path_scores import PathScores
from probes.solve.solver import SolverCheckpoints, in_workers
from probes.solve.state_reader import follow
from probes.solve.strength_path import HELD_OUT_GAIN
from probes.step_progress import watched
from probes.tasks.segmentation import Segmentation

pytestmark = pytest.mark.numerics


SAMPLED = ["--model.sites", "[adapter]", "--sample-images", "5", "--passes", "3"]
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


@pytest.fixture(scope="module")
def sampled(checkpoints, segmentation, tmp_path_factory) -> ProbeRun:
    """A run of three passes, with five of six images in memory."""
    out = tmp_path_factory.mktemp("sampled")
    main(arguments(checkpoints["causal"], segmentation, out, *SAMPLED))
    return ProbeRun(out)


def test_the_strength_of_the_lowest_loss_is_chosen_and_all_are_certified(run):
    path = run.metrics["path"]
    assert path["passes"] == 1
    assert path["sample_images"] == 6
    assert [entry["site"] for entry in path["optimum"]["sites"]] == run.sites
    for entry in path["optimum"]["sites"]:
        assert entry["strengths"] == [0.1, 0.01]
        assert all(certificate["converged"] for certificate in entry["certificates"])
        best = int(np.argmin(entry["cv_cross_entropy"]))
        assert entry["chosen"] == entry["lowest"] == [0.1, 0.01][best]


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_and_sites_are_told_one_by_one(threads, monkeypatch, capsys):
    """Also those that are solved by several processes."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    told = []
    with watched(lambda *progress: told.append(progress) or "about 1 min left"):
        assert [*follow("abc", 3, "pass 2", hidden=False)] == ["a", "b", "c"]
        found = dict(in_workers(str.upper, ["x", "y"], torch.device("cpu")))
    assert found == {"x": "X", "y": "Y"}
    passes = [("pass 2", i, 3) for i in (1, 2, 3)]
    assert told == [*passes, ("solving sites", 1, 2), ("solving sites", 2, 2)]
    shown = capsys.readouterr().err
    assert "pass 2: 100%" in shown and "solving sites: 100%" in shown


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


def test_passes_with_a_small_sample_end_at_the_optimum_in_memory(solve):
    """The memory of two of six images.

    Folds of given strengths end by passes at a decrease of 1e-4.
    """
    strengths = ("1", "1e-1")
    in_memory = solve(strengths=strengths)
    few = ("--sample-images", "2", "--passes", "10")
    by_passes = solve(*few, out="sampled", strengths=strengths)
    path = by_passes.metrics["path"]
    assert 1 < path["passes"] <= 10
    assert path["sample_images"] == 2
    assert_same_solution(in_memory, by_passes, held_out=HELD_OUT_GAIN * CONVERGED)
    for entry in path["optimum"]["sites"]:
        for certificate in entry["certificates"]:
            assert certificate["converged"]
            assert certificate["gradient"] < 1e-3
            assert certificate["decrease"] < 1e-4


def test_the_strength_does_not_depend_on_memory(solve):
    """Losses of left-out images are close to each other here, and two nodes a cell would choose another strength."""
    sites = ("--model.sites", "[encoder, adapter]")
    in_memory = solve(*sites, strengths=())
    by_passes = solve(*sites, "--sample-images", "4", out="sampled", strengths=())
    for ours, theirs in zip(in_memory.site_strengths, by_passes.site_strengths, strict=True):
        assert ours["chosen"] == pytest.approx(theirs["chosen"])
        assert ours["runner_up"]["behind"] > 0


SLOW_REFINEMENT = """
import sys, time
from pathlib import Path
from probes.cli import main
from probes.solve.in_memory import MemorySolver
started = Path(sys.argv.pop(1))
MemorySolver._gather = lambda *args, **kwargs: (started.touch(), time.sleep(600))
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


# class and method, the number of calls after which it is killed, and whether the sample is a part
KILLS = {
    "in the first pass": (MemorySolver, "add", 2, False),
    "on the path": (SolverCheckpoints, "save", 3, False),
    "in a later pass": (SiteProbes, "states", 5, True),
    "after a later pass": (PassSolver, "_refine", 2, True),
    "while it is scored": (PathScores, "add", 1, True),
}


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_run_resumes_to_the_same_bytes(
    when,
    run,
    sampled,
    checkpoints,
    segmentation,
    tmp_path,
    monkeypatch,
):
    owner, method, calls, part = KILLS[when]
    original = getattr(owner, method)
    count = []

    def stop(self, *args) -> object:
        count.append(1)
        return die() if len(count) == calls else original(self, *args)

    killed = arguments(checkpoints["causal"], segmentation, tmp_path, *(SAMPLED if part else []))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(owner, method, stop)
        main(killed)
    if when == "on the path":
        assert len(list((tmp_path / "checkpoints").glob("*.safetensors"))) in (1, 2)
        with pytest.raises(SystemExit, match="unfinished"):
            main(killed)
    main([*killed, "--ckpt_path", "last"])
    for name in BYTES:
        assert (tmp_path / name).read_bytes() == (
            (sampled if part else run).path / name
        ).read_bytes(), name
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
        (["--passes", "0"], "--passes must be at least 1"),
        (["--folds", "1"], "--folds must be at least 2"),
        (["--strengths", "0"], "above 0"),
        (["--data.task", "depth", "--strengths", "2"], "at most 1, got 2"),
        (["--folds", "99"], "99 folds"),
        (["--sample-images", "1"], "at least 2, one for each of the 2 --folds; got 1"),
        (["--trainer.limit_test_batches", "0.5"], "limit_test_batches must be 1.0, got 0.5"),
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


def test_moments_that_do_not_fit_are_an_error(
    checkpoints,
    task_root,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr("probes.solve.least_squares_solver.available_memory", lambda: 80_000)
    message = (
        "moments of 6 sites in 2 folds: .* GB are available; choose fewer --folds or --model.sites"
    )
    with pytest.raises(SystemExit, match=message):
        main(
            arguments(
                checkpoints["causal"],
                task_root,
                tmp_path,
                "--data.task",
                "depth",
                "--model.sites",
                "null",
            )
        )


def test_images_of_each_fold_are_kept_however_little_memory_there_is(solve, monkeypatch):
    monkeypatch.setattr("probes.solve.run.available_memory", lambda: 0)
    monkeypatch.setattr("probes.solve.run.LEAST", 1)
    path = solve("--passes", "1").metrics["path"]
    assert path["sample_images"] == 2
    assert np.isfinite([entry["cv_cross_entropy"] for entry in path["optimum"]["sites"]]).all()


def test_gradients_that_certify_an_optimum_are_not_autocast(solve, monkeypatch):
    seen = set()

    def record(*args, **kwargs):
        seen.add(torch.is_autocast_enabled("cpu"))
        return loss_and_gradient(*args, **kwargs)

    monkeypatch.setattr("probes.tasks.losses.loss_and_gradient", record)
    solve(
        "--trainer.precision",
        "bf16-mixed",
        "--model.sites",
        "[adapter]",
        "--sample-images",
        "4",
        "--passes",
        "2",
    )
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
    assert "images/s; a pass over 6 training images" in caplog.text
    main([*command, *SAMPLED])
    assert "h, at most 3 passes (" in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_loss_is_another_run(solve, tmp_path, monkeypatch):
    """The command, repeated with another loss in the code, left the run of the first loss as its own."""
    solve(*SAMPLED)
    monkeypatch.setattr(Segmentation, "loss", LabelSmoothing(0.2))
    message = r"with model.loss=None, but this run has 'LabelSmoothing\(share=0.2\)'"
    with pytest.raises(SystemExit, match=message):
        solve(*SAMPLED, "--ckpt_path", "last")
    solve(*SAMPLED, "--overwrite", "true")
    monkeypatch.setattr(Segmentation, "loss", LabelSmoothing(0.3))
    with pytest.raises(SystemExit, match=r"share=0.2\)', but this run has 'Label.*share=0.3"):
        solve(*SAMPLED, "--ckpt_path", "last")
