"""Probe runs: probes are independent of each other, and scores match the saved predictions."""

import numpy as np
import probe_runs
import pytest
import reference
import tiny_models
import torch
import torch.nn.functional as F
from PIL import Image
from probe_runs import read_masks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tolerances import rounding

from probes.cli import main
from probes.fit.module import ProbeModule
from probes.runs.files import read_tensors
from probes.runs.read import ProbeRun

pytestmark = pytest.mark.numerics


STEPS = 2 * 6
FAST = ["--model.learning_rate", "0.3", "--trainer.max_epochs", "6"]
SITES = "encoder adapter layer_01 attn_02 layer_02 layer_03 final_norm".split()


@pytest.fixture(scope="module")
def fit(checkpoints, segmentation):
    """A function that trains probes of a model for two epochs of two batches."""

    def run(out, *more: str, root=segmentation) -> ProbeRun:
        words = ["--trainer.max_epochs", "2", "--data.batch_size", "3", *more]
        return probe_runs.fit(checkpoints["causal"], root, out, *words)

    return run


@pytest.fixture(scope="module")
def run(fit, tmp_path_factory) -> ProbeRun:
    """At a high rate, so that the last epoch is not the best at some site."""
    sites = f"[{', '.join(SITES)}]"
    out = tmp_path_factory.mktemp("run")
    return fit(out, "--save_predictions", "true", "--model.sites", sites, *FAST)


def test_sites_keep_their_best_epoch_and_the_summary_is_of_their_scores(run):
    sites = run.metrics["sites"]
    assert run.metrics["images"] == 5
    assert run.sites == SITES
    for site in sites:
        low, high = site["miou_ci95"]
        assert low <= site["miou"] <= high
        best = site["history"][site["best_epoch"] - 1]
        assert best == max(site["history"]) == pytest.approx(site["miou"])
    assert any(site["best_epoch"] < 6 for site in sites), "else best and last are the same"
    summary = run.metrics["summary"]
    miou = {site["site"]: site["miou"] for site in sites}
    assert summary["peak_llm"] == max(v for k, v in miou.items() if k.startswith("layer_"))
    assert summary["recovery"] == pytest.approx(summary["peak_llm"] - miou["adapter"])


def assert_scores_are_numpys(run: ProbeRun, targets: list[np.ndarray]) -> None:
    for site in run.metrics["sites"]:
        predictions = read_masks(run.path / "predictions" / site["site"])
        miou, pacc, iou = reference.scores(predictions, targets, 3)
        assert site["miou"] == pytest.approx(miou)
        assert site["pacc"] == pytest.approx(pacc)
        assert site["iou_per_class"] == [None if x is None else pytest.approx(x) for x in iou]


def test_baseline_is_the_most_frequent_class_and_scores_are_those_of_the_predictions(
    run, segmentation
):
    masks = read_masks(segmentation / "annotations/validation")
    assert_scores_are_numpys(run, masks)
    targets = np.concatenate(masks)
    shares = np.bincount(targets[targets != 255], minlength=3) / (targets != 255).sum()
    baseline = run.metrics["baseline"]
    assert baseline["class"] == tiny_models.CLASSES[shares.argmax()]
    assert baseline["pacc"] == pytest.approx(shares.max())
    assert baseline["miou"] == pytest.approx(shares.max() / 3)


def test_saved_probes_give_the_saved_predictions(run):
    """Best epoch, right site, right order."""
    for sample in run.dataset():
        for site in run.sites:
            file = run.path / "predictions" / site / f"{sample['name']}.png"
            differ = run.predict(sample["image"], site) != np.asarray(Image.open(file))
            assert differ.mean() < 0.01, "up to ties"


def test_probes_trained_together_equal_probes_trained_alone(run, fit, tmp_path):
    """Also their initialisation, whose seed is the number of the site among all of the model."""
    alone = fit(tmp_path, "--model.sites", "[attn_02, layer_02]", *FAST).probes()
    assert len(alone) == 2
    for site, probe in alone.items():
        together = run.probes()[site].state_dict()
        for name, a in probe.state_dict().items():
            b = together[name]
            torch.testing.assert_close(a, b, **rounding(b, STEPS), msg=f"{site}.{name}")


def test_masks_of_different_sizes_are_scored_at_their_position_in_padded_squares(fit, tmp_path):
    """Maps are logits upsampled to the padded square, cropped; probes of a bfloat16 model are float32."""
    root = tiny_models.write_segmentation(tmp_path / "data")
    for path in root.glob("*/*/000.png"):
        image = Image.open(path)
        image.resize((31, 17), Image.Resampling.NEAREST).save(path)
    more = "--save_predictions true --model.dtype bfloat16 --model.image_resize pad".split()
    run = fit(tmp_path / "run", *more, root=root)
    assert_scores_are_numpys(run, read_masks(root / "annotations/validation"))
    predictions = read_masks(run.path / "predictions/adapter")
    mllm = run.mllm()
    head = run.probes()["adapter"]
    assert run.metrics["image_resize"] == mllm.geometry.resize == "pad"
    assert mllm.model.dtype == torch.bfloat16
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    for sample, saved in zip(run.dataset(), predictions, strict=True):
        height, width = sample["target"].shape
        side = max(height, width)
        states = mllm.states(mllm.preprocess([sample["image"]]), ["adapter"])["adapter"]
        logits = head(states.float()).transpose(1, 2).unflatten(-1, mllm.grid)
        square = F.interpolate(logits, (side, side), mode="bilinear")[0].argmax(0)
        top = (side - height) // 2
        left = (side - width) // 2
        found = square[top : top + height, left : left + width].numpy()
        assert (found == saved).mean() > 0.95, "bfloat16 of another batch"


def test_training_sized_by_steps_ends_and_decays_at_them(checkpoints, segmentation, tmp_path):
    """configs/probes/folder.yaml: validations and the rate (power 0.9) follow the steps."""
    more = "-c configs/probes/folder.yaml --data.num_workers 0 --trainer.accelerator cpu".split()
    more += "--trainer.max_steps 12 --trainer.val_check_interval 4".split()
    main(["fit", *more, *probe_runs.places(checkpoints["causal"], segmentation, tmp_path)])
    run = ProbeRun(tmp_path)
    probe = run.metrics["probe"]
    assert (probe["steps"], probe["validated_at"]) == (12, [4, 8, 12])
    assert all(len(entry["history"]) == 3 for entry in run.metrics["sites"])
    events = EventAccumulator(str(tmp_path)).Reload()
    rates = events.Scalars("lr-AdamW")
    expected = [1e-3 * (1 - event.step / 12) ** 0.9 for event in rates]
    assert [event.value for event in rates] == pytest.approx(expected)
    assert len(rates) == 12


def test_the_schedule_ends_with_the_batches_that_are_trained(fit, tmp_path):
    """One of two in each of two epochs."""
    probe = fit(tmp_path, "--trainer.limit_train_batches", "0.5").metrics["probe"]
    assert (probe["steps"], probe["epochs"], probe["validated_at"]) == (2, 2, [1, 2])
    events = EventAccumulator(str(tmp_path)).Reload()
    first, last = (event.value for event in events.Scalars("lr-AdamW"))
    assert last < 0.6 * first


def test_a_validation_that_is_not_a_number_is_never_the_best(fit, tmp_path, monkeypatch):
    """As the first one, it was kept for ever."""
    scores = iter([float("nan"), 0.5, float("nan"), 0.25])
    keep = ProbeModule._keep_if_best
    kept = []

    def keep_if_best(module, site, score):
        before = module.best.get(site)
        keep(module, site, next(scores))
        kept.append(module.best.get(site) is not before)

    monkeypatch.setattr(ProbeModule, "_keep_if_best", keep_if_best)
    more = "--trainer.max_epochs 4 --model.sites [adapter]".split()
    run = fit(tmp_path, *more)
    assert kept == [False, True, False, False]
    assert run.metrics["sites"][0]["best_epoch"] == 2


WHY = ": probes train on batches of"


@pytest.mark.parametrize(
    ("option", "found"),
    [
        ("--trainer.accumulate_grad_batches 4", f"accumulate_grad_batches must be 1, got 4{WHY}"),
        ("--trainer.limit_val_batches 0.5", f"limit_val_batches must be 1.0, got 0.5{WHY}"),
        ("--trainer.max_epochs 0", "max_epochs is 0, so nothing would be trained"),
        ("--trainer.max_steps 0", "max_steps is 0, so nothing would be trained"),
        ("--trainer.limit_train_batches 0", "limit_train_batches is 0, so nothing would be"),
    ],
)
def test_options_that_leave_out_images_or_change_the_schedule_are_refused(
    option, found, fit, tmp_path
):
    """Scores of probes without a step were written as those of a run."""
    with pytest.raises(SystemExit, match=f"trainer.{found}"):
        fit(tmp_path / "out", *option.split())
    assert not (tmp_path / "out").exists()


def test_resumed_run_equals_an_uninterrupted_one(fit, tmp_path):
    save = tmp_path / "save.yaml"
    save.write_text(
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {save_top_k: -1}}]}"
    )
    more = ["--trainer.max_epochs", "3", "--model.head", "mlp"]
    whole = fit(tmp_path / "a", "-c", str(save), *more)
    (first,) = (tmp_path / "a/checkpoints").glob("epoch=0-*.ckpt")
    state = torch.load(first, weights_only=True)["state_dict"]
    assert all(name.startswith("heads.") for name in state), "probes only"
    resumed = fit(tmp_path / "b", *more, "--ckpt_path", str(first))
    assert whole.metrics == resumed.metrics
    assert len(whole.metrics["sites"][0]["history"]) == 3
    tensors = [read_tensors(run.path / "probes.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())
