"""`probes solve` end to end: files, several processes, killed and resumed runs, analyses of its runs."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from PIL import Image
from processes import HANGING_S
from run_bytes import run_bytes
from safetensors.torch import load_file, save_file

from llava_bidir.common.errors import UserError
from probes.cli import main
from probes.ops.cross_entropy import upsampled_cross_entropy
from probes.results.probe_run import ProbeRun
from probes.training.moment_solver import spread
from probes.training.solver import ProbeSolver

pytestmark = pytest.mark.numerics


def arguments(checkpoint, root, out, *more: str) -> list[str]:
    """Return a command with three closed-form strengths, two of the optimum, and batches of two."""
    demo = ["solve", "-c", "configs/demo/probes.yaml", "--data.batch_size", "2", "--folds", "2"]
    demo += ["--strengths", "1e-4", "1e-2", "1", "--optimum-strengths", "1e-3", "1e-1"]
    return [*demo, "--model.mllm", str(checkpoint), "--data.root", str(root), "--out", str(out), *more]


@pytest.fixture(scope="module")
def run(checkpoints, segmentation, tmp_path_factory) -> ProbeRun:
    out = tmp_path_factory.mktemp("solved")
    main(arguments(checkpoints["causal"], segmentation, out, "--save_predictions", "true"))
    return ProbeRun(out)


def masks(segmentation) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((segmentation / "annotations/validation").glob("*.png"))]


def test_writes_the_files_of_a_fit_and_the_path(run):
    files = ("config.yaml", "probes.safetensors", "manifest.json", "metrics.json", "counts.safetensors")
    for name in (*files, "path.safetensors"):
        assert (run.path / name).is_file(), name
    path = run.metrics["path"]
    assert path["passes"] == 1 and path["closed_form"]["strengths"] == [1e-4, 1e-2, 1.0]
    assert [entry["site"] for entry in path["optimum"]["sites"]] == run.sites
    for entry in path["optimum"]["sites"]:
        assert all(certificate["converged"] for certificate in entry["certificates"])
        best = int(np.argmin(entry["cv_cross_entropy"]))
        assert entry["chosen"] == [1e-3, 1e-1][best]
    tensors = load_file(run.path / "path.safetensors")
    assert tensors["closed_form/intersection"].shape == (3, 6, 5, 3)
    assert tensors["optimum/cross_entropy"].shape == (2, 6, 5)


def test_manifest_has_the_hashes_of_the_files(run, tmp_path):
    names = ("counts.safetensors", "metrics.json", "path.safetensors", "probes.safetensors")
    hashes = {name: hashlib.sha256((run.path / name).read_bytes()).hexdigest() for name in names}
    assert run.manifest["files"] == hashes
    changed = ProbeRun(shutil.copytree(run.path, tmp_path / "run"))
    assert changed.path_counts("optimum")
    tensors = load_file(changed.path / "path.safetensors")
    save_file(
        tensors | {"optimum/cross_entropy": 0.9 * tensors["optimum/cross_entropy"]}, changed.path / "path.safetensors"
    )
    with pytest.raises(UserError, match="path.safetensors is not the file that the run wrote"):
        changed.path_counts("optimum")


def test_path_counts_of_more_pixels_than_are_labelled_are_an_error(run, tmp_path):
    """Also in runs of earlier versions, without hashes."""
    old = shutil.copytree(run.path, tmp_path / "run")
    (old / "manifest.json").write_text(json.dumps({k: v for k, v in run.manifest.items() if k != "files"}))
    tensors = load_file(old / "path.safetensors")
    save_file(tensors | {"optimum/predicted": tensors["optimum/predicted"] + 1000}, old / "path.safetensors")
    assert ProbeRun(old).path_counts("closed_form")
    with pytest.raises(UserError, match="path.safetensors: optimum: .* are not counts of the same pixels"):
        ProbeRun(old).path_counts("optimum")


def test_main_probe_is_that_of_the_chosen_strength(run):
    for i, entry in enumerate(run.metrics["path"]["optimum"]["sites"]):
        chosen = [1e-3, 1e-1].index(entry["chosen"])
        assert run.metrics["sites"][i]["miou"] == pytest.approx(entry["miou"][chosen], abs=1e-3)


def test_scores_equal_numpy_on_the_saved_predictions(run, segmentation):
    for site in run.metrics["sites"]:
        files = sorted((run.path / "predictions" / site["site"]).glob("*.png"))
        miou, pacc, _ = reference.scores([np.asarray(Image.open(file)) for file in files], masks(segmentation), 3)
        assert site["miou"] == pytest.approx(miou) and site["pacc"] == pytest.approx(pacc)


def test_saved_probes_give_the_cross_entropy_of_the_path(run, segmentation):
    mllm, probes = run.mllm(), run.probes()
    images = [Image.open(path).convert("RGB") for path in sorted((segmentation / "images/validation").glob("*"))]
    states = mllm.states(mllm.preprocess(images))
    for i, site in enumerate(run.sites):
        entry = run.metrics["path"]["optimum"]["sites"][i]
        logits = probes[site](states[site].float()).transpose(1, 2).unflatten(2, mllm.grid)
        total = pixels = 0
        for z, mask in zip(logits, masks(segmentation), strict=True):
            up = F.interpolate(z[None], mask.shape, mode="bilinear")
            label = torch.from_numpy(mask).long()[None]
            total += F.cross_entropy(up, label, ignore_index=255, reduction="sum").item()
            pixels += (mask != 255).sum()
        chosen = [1e-3, 1e-1].index(entry["chosen"])
        assert total / pixels == pytest.approx(entry["cross_entropy"][chosen], rel=1e-4)


def test_closed_form_alone_takes_one_pass(checkpoints, segmentation, tmp_path):
    main(arguments(checkpoints["causal"], segmentation, tmp_path, "--passes", "1"))
    path = ProbeRun(tmp_path).metrics["path"]
    assert path["passes"] == 1 and path.get("optimum") is None


def test_passes_with_a_small_sample_end_near_the_optimum(run, checkpoints, segmentation, tmp_path):
    """Four of six images in memory. The result is stated as not converged unless a certificate says so."""
    more = ["--model.sites", "[adapter]", "--optimum-strengths", "1e-1", "--sample-images", "4", "--passes", "25"]
    main(arguments(checkpoints["causal"], segmentation, tmp_path, *more))
    path = ProbeRun(tmp_path).metrics["path"]
    assert 1 < path["passes"] <= 25 and path["sample_images"] == 4
    whole = run.metrics["path"]["optimum"]["sites"][1]
    (ours,) = path["optimum"]["sites"]
    assert ours["cross_entropy"][0] == pytest.approx(whole["cross_entropy"][1], abs=0.01)
    (certificate,) = ours["certificates"]
    assert certificate["converged"] == (certificate["gradient"] < 1e-3 and certificate["decrease"] < 1e-4)


SLOW_REFINEMENT = """
import sys, time
from pathlib import Path
from probes.cli import main
from probes.training.refinement import Refinement
started = Path(sys.argv.pop(1))
Refinement.refine = lambda *args, **kwargs: (started.touch(), time.sleep(600))
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_sigterm_ends_a_run_at_once(checkpoints, segmentation, tmp_path):
    command = arguments(checkpoints["causal"], segmentation, tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-c", SLOW_REFINEMENT, str(tmp_path / "started"), *command])
    try:
        deadline = time.monotonic() + HANGING_S
        while not (tmp_path / "started").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.terminate()
        assert process.wait(timeout=30) == -signal.SIGTERM
    finally:
        process.kill()


def test_a_killed_run_resumes_to_the_same_bytes(run, checkpoints, segmentation, tmp_path, monkeypatch):
    """Moments are saved after every batch, and the third one is the last."""
    monkeypatch.setattr("probes.training.moment_solver.SAVE_SECONDS", -1)
    add, batches = ProbeSolver._add_moments, []

    def die(self, *args) -> None:
        add(self, *args)
        batches.append(1)
        if len(batches) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProbeSolver, "_add_moments", die)
    command = arguments(checkpoints["causal"], segmentation, tmp_path, "--passes", "1")
    with pytest.raises(SystemExit):
        main(command)
    assert (tmp_path / "checkpoints/moments_0.safetensors").is_file()
    monkeypatch.setattr(ProbeSolver, "_add_moments", add)
    with pytest.raises(SystemExit, match="unfinished"):
        main(command)
    main([*command, "--ckpt_path", "last"])
    undisturbed = tmp_path / "undisturbed"
    main(arguments(checkpoints["causal"], segmentation, undisturbed, "--passes", "1"))
    for name in ("probes.safetensors", "path.safetensors", "counts.safetensors"):
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("passes", ["2", "25"])  # the last one allowed, and all certificates
def test_a_run_killed_while_it_is_scored_resumes(checkpoints, segmentation, tmp_path, monkeypatch, passes):
    more = ["--model.sites", "[adapter]", "--optimum-strengths", "1e-1", "--sample-images", "4", "--passes", passes]

    def die(self) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProbeSolver, "on_test_start", die)
        with pytest.raises(SystemExit):
            main(arguments(checkpoints["causal"], segmentation, tmp_path / "killed", *more))
    main(arguments(checkpoints["causal"], segmentation, tmp_path / "killed", *more, "--ckpt_path", "last"))
    main(arguments(checkpoints["causal"], segmentation, tmp_path / "undisturbed", *more))
    killed, undisturbed = (ProbeRun(tmp_path / name).metrics["path"] for name in ("killed", "undisturbed"))
    assert killed["passes"] == undisturbed["passes"]
    assert killed["optimum"] == undisturbed["optimum"]


def test_a_finished_run_is_left_alone(run, checkpoints, segmentation, caplog):
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
        (["--folds", "99"], "99 folds"),
        (["--sample-images", "1"], "at least 2, one for each of the 2 --folds; got 1"),
        (["--trainer.limit_predict_batches", "0.5"], "limit_predict_batches must be 1.0, got 0.5"),
    ],
)
def test_rejects_bad_options(option, message, checkpoints, segmentation, tmp_path):
    with pytest.raises((SystemExit, UserError), match=message):
        main(arguments(checkpoints["causal"], segmentation, tmp_path, *option))


def test_moments_that_do_not_fit_name_sites_that_do(checkpoints, segmentation, tmp_path, monkeypatch):
    monkeypatch.setattr("probes.training.moment_solver.available_memory", lambda: 80_000)
    with pytest.raises(
        SystemExit, match=r"moments of 6 sites in 2 folds: .* choose .*\[encoder, adapter, final_norm\]"
    ):
        main(arguments(checkpoints["causal"], segmentation, tmp_path))


@pytest.mark.parametrize(("wanted", "expected"), [(None, 10), (10, 10), (4, 4)])
def test_all_images_are_kept_where_they_fit_also_with_folds_of_different_sizes(wanted, expected):
    root = SimpleNamespace(root_device=torch.device("cpu"))
    solver = SimpleNamespace(
        fold_of=torch.tensor([0] * 8 + [1] * 2),  # as of two groups of 8 and 2 images
        hparams=SimpleNamespace(sample_images=wanted, folds=2),
        mllm=SimpleNamespace(grid=(2, 2), widths={"adapter": 8}, model=torch.nn.Linear(1, 1)),
        sites=["adapter"],
        trainer=SimpleNamespace(num_devices=1, strategy=root),
    )
    solver.mllm.model.dtype = torch.float32
    assert ProbeSolver._choose_sample(solver).sum() == expected


def test_sites_are_spread_from_the_first_two_to_the_last():
    sites = ["encoder", "adapter", *(f"layer_{i:02d}" for i in range(1, 9)), "final_norm"]
    assert spread(sites, 99) == sites and spread(sites, 0) == [] and spread(sites, 2) == sites[:2]
    assert spread(sites, 5) == ["encoder", "adapter", "layer_03", "layer_06", "final_norm"]


def test_the_states_of_an_image_of_each_fold_are_kept_however_little_memory_there_is(
    checkpoints, segmentation, tmp_path, monkeypatch
):
    monkeypatch.setattr("probes.training.solver.available_memory", lambda: 0)
    main(arguments(checkpoints["causal"], segmentation, tmp_path, "--passes", "1"))
    path = ProbeRun(tmp_path).metrics["path"]
    assert path["sample_images"] == 2
    assert np.isfinite([entry["cv_cross_entropy"] for entry in path["closed_form"]["sites"]]).all()


def test_parts_of_a_batch_are_scored_as_the_whole(run, checkpoints, segmentation, tmp_path, monkeypatch):
    monkeypatch.setattr("probes.training.moment_solver.SCORE_BYTES", 1)  # one image at a time
    main(arguments(checkpoints["causal"], segmentation, tmp_path))
    one, whole = load_file(tmp_path / "path.safetensors"), load_file(run.path / "path.safetensors")
    for key in whole:
        torch.testing.assert_close(one[key], whole[key], rtol=1e-5, atol=1e-5)


def test_gradients_that_certify_an_optimum_are_not_autocast(checkpoints, segmentation, tmp_path, monkeypatch):
    seen = set()

    def record(*args, **kwargs):
        seen.add(torch.is_autocast_enabled("cpu"))
        return upsampled_cross_entropy(*args, **kwargs)

    monkeypatch.setattr("probes.training.optimum.upsampled_cross_entropy", record)
    mixed = ["--trainer.precision", "bf16-mixed", "--sample-images", "2", "--passes", "2"]
    main(arguments(checkpoints["causal"], segmentation, tmp_path, *mixed))
    assert seen == {False}


def test_dry_run_measures_and_writes_nothing(checkpoints, segmentation, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("probes.training.moment_solver.SAVE_SECONDS", -1)  # it is due after every batch
    main(arguments(checkpoints["causal"], segmentation, tmp_path / "out", "--dry-run"))
    assert "images/s; a pass over 6 training images" in caplog.text
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_two_processes_give_the_probes_of_one(run, checkpoints, segmentation, tmp_path):
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command = arguments(checkpoints["causal"], segmentation, tmp_path, *two)
    subprocess.run([sys.executable, "-m", "probes", *command], check=True, timeout=300)
    ours, theirs = load_file(tmp_path / "path.safetensors"), load_file(run.path / "path.safetensors")
    for name in ("closed_form/cross_entropy", "optimum/cross_entropy"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-1)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["images"] == 5


def test_analyses_read_the_run(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    main(["knockout", "--probes", str(copy), "--classes", "auto:1", "--draws", "1"])
    main(["maps", "--probes", str(copy), "--image", "0"])
    main(["report", str(copy), "--out", str(tmp_path / "report")])
    assert (tmp_path / "report/index.html").is_file()
