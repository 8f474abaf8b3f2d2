"""`probes solve` and `probes fit` of other tasks end to end: scores, the closed form, saved predictions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from task_runs import arguments

from llava_bidir.common.errors import UserError
from probes import ProbeRun
from probes.cli import main
from probes.tasks import TASKS as PROBE_TASKS

pytestmark = pytest.mark.numerics

TASKS = ("depth", "normals")


@pytest.fixture(scope="module")
def runs(checkpoints, task_root, task_runs, tmp_path_factory) -> dict[str, ProbeRun]:
    """Solved runs by task, and two trained ones; a command leaves the precision of products to the next one."""
    runs_by_name = {f"solve {task}": task_runs[task] for task in (*TASKS, "boundaries")}
    for task in ("depth", "boundaries"):
        out = tmp_path_factory.mktemp(f"fitted_{task}")
        places = checkpoints["causal"], task_root, out
        main(arguments("fit", task, *places, "--model.learning_rate", "0.1"))
        runs_by_name[f"fit {task}"] = ProbeRun(out)
    assert torch.get_float32_matmul_precision() == "highest"
    return runs_by_name


def depth_scores(prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
    p = prediction[np.isfinite(target)]
    t = target[np.isfinite(target)]
    ratio = np.maximum(p / t, t / p)
    scores = {"rmse": np.sqrt(((p - t) ** 2).mean()), "abs_rel": (np.abs(p - t) / t).mean()}
    scores["log10"] = np.abs(np.log10(p) - np.log10(t)).mean()
    return scores | {f"delta_{k}": (ratio < 1.25**k).mean() for k in (1, 2, 3)}


def normals_scores(prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
    valid = np.isfinite(target).all(-1)
    cosine = (prediction[valid].astype(np.float64) * target[valid]).sum(-1)
    angle = np.sort(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    scores = {"mean": angle.mean(), "median": angle[(len(angle) - 1) // 2]}
    return scores | {f"within_{int(limit)}": (angle < limit).mean() for limit in (11.25, 22.5, 30)}


SCORES = {"depth": depth_scores, "normals": normals_scores}


@pytest.mark.parametrize("name", ["solve depth", "solve normals", "fit depth"])
def test_scores_equal_numpy_on_the_saved_predictions(name, runs):
    run = runs[name]
    truth = [sample["target"].astype(np.float64) for sample in run.dataset()]
    for site in run.metrics["sites"]:
        files = sorted((run.path / "predictions" / site["site"]).glob("*.npy"))
        score_of = SCORES[run.task_name]
        per_image = [score_of(np.load(f), t) for f, t in zip(files, truth, strict=True)]
        for score in run.metrics["scores"]:
            if score == "rmse_pixels":
                errors = [
                    np.square(np.load(f) - t).ravel() for f, t in zip(files, truth, strict=True)
                ]
                mean = np.sqrt(np.nanmean(np.concatenate(errors)))
                assert mean != pytest.approx(site["rmse"], rel=1e-4), "of each image first"
            else:
                mean = np.mean([scores[score] for scores in per_image])
            assert site[score] == pytest.approx(mean, rel=1e-4, abs=1e-3), (site["site"], score)
            low, high = site[f"{score}_ci95"]
            assert low <= site[score] <= high


@pytest.mark.parametrize("task", TASKS)
def test_saved_probes_are_least_squares_on_upsampled_states(task, runs, task_root):
    """The probe of the chosen strength from scikit-learn's ridge regression over all labelled pixels, in float64."""
    run = runs[f"solve {task}"]
    mllm = run.mllm()
    samples = [*run.dataset("training")]
    states = mllm.states(mllm.preprocess([sample["image"] for sample in samples]))
    truth = torch.from_numpy(np.stack([sample["target"] for sample in samples]))
    y = run.task.values(truth).double().flatten(0, 2)
    valid = y.isfinite().all(-1)
    probes = run.probes()
    for site, path in zip(run.sites, run.strengths.sites, strict=True):
        grid = states[site].double().mT.unflatten(2, mllm.grid)
        up = F.interpolate(grid, truth.shape[1:3], mode="bilinear").flatten(2)
        x = up.mT.flatten(0, 1)[valid]
        scaled = StandardScaler().fit_transform(x)
        alpha = len(x) * path["chosen"] / max(1 - path["chosen"], 1e-9)
        expected = Ridge(alpha).fit(scaled, y[valid]).predict(scaled).reshape(len(x), -1)
        ours = probes[site].double()(x[None])[0].detach()
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


def test_boundary_scores_equal_numpy_on_the_saved_probabilities(runs):
    """At 24 x 20 pixels the tolerance is below one pixel, so that right pixels are those of the target."""
    run = runs["solve boundaries"]
    truth = np.concatenate([sample["target"].ravel() for sample in run.dataset()])
    for site in run.metrics["sites"]:
        files = sorted((run.path / "predictions" / site["site"]).glob("*.npy"))
        probability = np.concatenate([np.load(file).ravel() for file in files])
        best = area = before = 0.0
        for step in range(99, 0, -1):
            predicted = (probability >= np.float32(step / 100)) & (truth != 255)
            right = (predicted & (truth == 1)).sum()
            precision = right / max(predicted.sum(), 1)
            recall = right / (truth == 1).sum()
            best = max(best, 2 * precision * recall / max(precision + recall, 1e-12))
            area = area + precision * (recall - before)
            before = recall
        assert site["f"] == pytest.approx(best, abs=1e-3)
        assert site["ap"] == pytest.approx(area, abs=1e-3)


@pytest.mark.parametrize("task", ["depth", "boundaries"])
def test_fit_keeps_the_best_epoch_whichever_way_is_better(task, runs):
    run = runs[f"fit {task}"]
    best = max if run.task.scores[run.task.score] else min
    for site in run.metrics["sites"]:
        kept = site["history"][site["best_epoch"] - 1]
        assert kept == best(site["history"]) == pytest.approx(site[run.task.score])
    assert any(len(set(site["history"])) == 2 for site in run.metrics["sites"]), "the epochs differ"


@pytest.mark.parametrize("task", TASKS)
def test_predict_gives_the_saved_prediction(task, task_runs, task_root):
    run = task_runs[task]
    file = min((task_root / "images/validation").glob("*"))
    ours = run.predict(Image.open(file).convert("RGB"), "adapter")
    saved = np.load(run.path / f"predictions/adapter/{file.stem}.npy")
    np.testing.assert_allclose(ours, saved, atol=1e-3)
    assert run.task.colorize(ours).shape == (24, 20, 3)


def test_sums_of_depth_of_an_older_version_are_refused():
    with pytest.raises(UserError, match="of an older version"):
        PROBE_TASKS["depth"].dataset_scores(torch.ones(3, 7))
