"""`probes fit -c dinov3-linear` beside DINOv3's own script on the same crops: losses and validation counts.

Set DINOV3 to a clone of facebookresearch/dinov3 (helpers/dinov3_script.py has the commit), whose files are never
committed here. With LLAVA_BIDIR_TEST_DATA also 200 steps of DINOv2-S at 224 px on CamVid, batches of 4 of the preset's
16, 28 minutes of half a core: losses differ by at most 6e-7 nats, and 2 of 8,657,188 pixels are counted otherwise.
"""

import os
from pathlib import Path

import probe_runs
import pytest
import tiny_models
import torch
from dinov3_script import DINOv3Script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_encoders import STOCK

from experiments.real.import_dinov2 import find_file, import_dinov2
from llava_bidir.common.configs import find_config
from llava_bidir.common.errors import UserError
from probes.cli import main
from probes.data.random_crops import RandomCrops
from probes.data.samplers import TrainingBatches
from probes.fit.cli import build_cli
from probes.heads import Probe
from probes.runs.read import ProbeRun

pytestmark = pytest.mark.nightly
CLONE = os.environ.get("DINOV3")
DATA = os.environ.get("LLAVA_BIDIR_TEST_DATA")
# at most, in nats: ours sums the pixels of a patch together
LOSSES_DIFFER = 1e-5
# share of the pixels that rounding may decide, where two classes tie
COUNTS_DIFFER = 1e-6


@pytest.fixture(autouse=True)
def clone() -> Path:
    if CLONE is None:
        pytest.skip("needs DINOv3's script: DINOV3=FOLDER of a clone of facebookresearch/dinov3")
    return Path(CLONE)


def test_a_tiny_encoder_trains_as_by_the_publishers_script(clone, tmp_path):
    encoder = STOCK["dinov2"].write(tmp_path / "dinov2")
    photos = tiny_models.write_segmentation(tmp_path / "photos", 6, 2, size=(20, 40))
    compare(clone, encoder, photos, tmp_path / "run", steps=40, batch=2, px=16, stride=11)


@pytest.mark.slow
def test_dinov2_trains_as_by_the_publishers_script(clone, tmp_path):
    if DATA is None:
        pytest.skip("needs CamVid: LLAVA_BIDIR_TEST_DATA=FOLDER")
    try:
        file = find_file()
    except UserError as error:
        pytest.skip(str(error))
    encoder = tmp_path / "dinov2"
    import_dinov2(file, encoder)
    photos = Path(DATA) / "camvid"
    compare(clone, encoder, photos, tmp_path / "run", steps=200, batch=4, px=224, stride=149)


def compare(clone, encoder, photos, out, steps, batch, px, stride):
    """Train by both, and compare the loss of each step and the counts of the validation photos at the end."""
    warmup = max(steps * 1500 // 40000, 1)
    sizes = f"""--data.dataset folder --data.name photos --data.batch_size {batch} --data.num_workers 0
        --model.image_px {px} --model.stride_px {stride} --model.warmup_steps {warmup} --model.dropout 0
        --trainer.max_steps {steps} --trainer.val_check_interval {steps} --trainer.accelerator cpu
        --trainer.log_every_n_steps 1 --trainer.enable_progress_bar false"""
    words = ["-c", find_config("dinov3-linear"), *sizes.split()]
    words = [*map(str, words), *probe_runs.places(encoder, photos, out)]
    main(["fit", *words])
    run = ProbeRun(out)
    losses = losses_of(out)

    cli = build_cli(words, run=False)
    mllm = run.mllm()
    seed = cli.datamodule.data.seed
    crops = RandomCrops(run.dataset("training"), mllm, cli.datamodule.options, seed)
    script = DINOv3Script(clone, encoder, len(run.metrics["classes"]), steps, warmup)
    script.head.conv.weight.data = first_weights(mllm, seed, script.classes)
    expected = []
    for number, indices in enumerate(batches_of(len(crops), batch, seed, steps)):
        samples = [crops[i] for i in indices]
        pixels = torch.stack([script.normalised(sample["image"], px) for sample in samples])
        target = torch.stack([torch.from_numpy(sample["target"]) for sample in samples])
        expected.append(script.step(number, pixels, target))
    differences = torch.tensor(losses) - torch.tensor(expected)
    print(f"{steps} steps, losses {losses[0]:.4f} to {losses[-1]:.4f}, differ by at most", end=" ")
    print(f"{differences.abs().max().item():.1e}")

    theirs = script.evaluate(script.photos_of(run), px, stride)
    counts = run.counts
    right, predicted = (
        (mine[0].sum(0) - count).abs().sum().item()
        for mine, count in (
            (counts.intersection, theirs.right),
            (counts.predicted, theirs.predicted),
        )
    )
    print(f"{theirs.labelled.sum()} labelled pixels, of {right} only one is right", end="; ")
    print(f"two classes tie at {theirs.ties}")
    assert len(losses) == len(expected) == steps
    assert differences.abs().max() <= LOSSES_DIFFER
    assert torch.equal(counts.labelled.sum(0), theirs.labelled)
    assert right <= theirs.ties and predicted <= 2 * theirs.ties
    assert right <= theirs.labelled.sum() * COUNTS_DIFFER


def losses_of(out: Path) -> list[float]:
    """Return the loss of each step of a run."""
    log = EventAccumulator(str(out), size_guidance={"scalars": 0}).Reload()
    (loss,) = (tag for tag in log.Tags()["scalars"] if "loss" in tag)
    return [event.value for event in log.Scalars(loss)]


def first_weights(mllm, seed: int, classes: int) -> torch.Tensor:
    """Return the weights f[K, d, 1, 1] that our head begins with."""
    numbered = [*mllm.sites].index("final_norm")
    width = mllm.widths["final_norm"]
    with torch.random.fork_rng():
        torch.manual_seed(seed * 1_000_003 + numbered)
        probe = Probe(width, classes, mllm.grid, "batchnorm_affine", init_std=0.01)
    return probe.head.weight.data[:, :, None, None].clone()


def batches_of(images: int, batch: int, seed: int, steps: int) -> list[list[int]]:
    """Return the indices of the crops of all steps."""
    sampler = TrainingBatches(images, batch, seed=seed, are_random=True)
    batches = []
    while len(batches) < steps:
        sampler.set_epoch(len(batches) // len(sampler))
        batches += sampler
    return batches[:steps]
