"""Published protocols: the loop of the publisher on the same crops, and every option of a preset moves a number."""

import probe_runs
import pytest
import tiny_models
import torch
from published_rates import rates_of_dinov3, rates_of_mmcv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_encoders import STOCK
from torch import nn
from torch.nn import functional as F

from llava_bidir.common.configs import find_config, read_config
from probes.cli import main
from probes.data.random_crops import RandomCrops
from probes.data.samplers import TrainingBatches
from probes.fit.cli import build_cli
from probes.heads import Probe
from probes.runs.read import ProbeRun

STEPS, WARMUP = 6, 2
# what the presets have, at the size of tiny encoders
TINY = f"""--data.dataset folder --data.name photos --data.batch_size 2 --data.num_workers 0 --model.image_px 16
    --model.stride_px 11 --model.warmup_steps {WARMUP} --trainer.max_steps {STEPS} --trainer.val_check_interval 3
    --trainer.accelerator cpu --trainer.log_every_n_steps 1 --trainer.enable_progress_bar false"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    encoder = STOCK["dinov2"].write(tmp_path_factory.mktemp("dinov2"))
    photos = tiny_models.write_segmentation(tmp_path_factory.mktemp("photos"), 5, 2, size=(20, 40))
    return lambda out: probe_runs.places(encoder, photos, out)


@pytest.fixture(scope="module")
def fit(places, tmp_path_factory):
    """Train by a preset and return its run, and the loss of each step."""

    def run(preset: str, *more: str) -> tuple[ProbeRun, list[float]]:
        out = tmp_path_factory.mktemp("run")
        main(["fit", "-c", preset, *TINY.split(), *places(out), *more])
        (loss,) = (
            tag for tag in EventAccumulator(str(out)).Reload().Tags()["scalars"] if "loss" in tag
        )
        events = EventAccumulator(str(out)).Reload().Scalars(loss)
        return ProbeRun(out), [event.value for event in events]

    return run


@pytest.mark.parametrize(
    ("preset", "rates", "decay"),
    [("dinov3-linear", rates_of_dinov3, 1e-3), ("dinov2-linear", rates_of_mmcv, 1e-4)],
)
def test_losses_and_probes_are_those_of_the_publishers_loop(
    preset, rates, decay, fit, places, tmp_path
):
    """On the same crops, without dropout, whose random numbers differ; the head is a 1 x 1 convolution of maps.

    Source: linear_head.py, loss.py and train.py of DINOv3 (eval/segmentation); mmsegmentation's EncoderDecoder.
    """
    run, losses = fit(preset, "--model.dropout", "0")
    words = ["-c", str(find_config(preset)), *TINY.split(), *places(tmp_path)]
    cli = build_cli(words, run=False)
    mllm = run.mllm()
    crops = RandomCrops(
        run.dataset("training"), mllm, cli.datamodule.options, cli.datamodule.data.seed
    )
    norm, conv = nn.BatchNorm2d(16), nn.Conv2d(16, 3, 1)
    numbered = [*mllm.sites].index("final_norm")
    with torch.random.fork_rng():
        torch.manual_seed(cli.datamodule.data.seed * 1_000_003 + numbered)
        start = Probe(16, 3, mllm.grid, "batchnorm_affine", init_std=0.01)
    conv.weight.data = start.head.weight.data[:, :, None, None].clone()
    conv.bias.data.zero_()
    optimizer = torch.optim.AdamW(
        [*norm.parameters(), *conv.parameters()], 1e-3, (0.9, 0.999), weight_decay=decay
    )
    expected = []
    for batch, rate in zip(batches_of(cli), rates(STEPS, WARMUP), strict=False):
        samples = [crops[i] for i in batch]
        states = mllm.states(
            mllm.normalise([sample["image"] for sample in samples]), ["final_norm"]
        )
        maps = states["final_norm"].transpose(1, 2).unflatten(2, mllm.grid)
        target = torch.stack([torch.from_numpy(sample["target"]) for sample in samples]).long()
        logits = F.interpolate(conv(norm(maps)), target.shape[1:], mode="bilinear")
        loss = F.cross_entropy(logits, target, ignore_index=255, reduction="none").mean()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, abs=1e-6)
    last = torch.load(run.path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(
        last["heads.final_norm.head.weight"], conv.weight[:, :, 0, 0].detach(), rtol=0, atol=1e-6
    )


def batches_of(cli) -> list[list[int]]:
    """Return the indices of the batches of all steps."""
    sampler = TrainingBatches(5, 2, seed=cli.datamodule.data.seed, are_random=True)
    batches = []
    for epoch in range(STEPS):
        sampler.set_epoch(epoch)
        batches += sampler
    return batches[:STEPS]


def test_dropout_is_of_channels_of_an_image_and_in_training_alone():
    torch.manual_seed(0)
    probe = Probe(64, 3, (2, 2), dropout=0.5)
    seen = []
    probe.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    states = torch.ones(2, 4, 64)
    probe(states)
    probe.eval()(states)
    dropped = seen[0] == 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped)), "of all tokens"
    assert not torch.equal(dropped[0], dropped[1])
    assert 0.3 < dropped.float().mean() < 0.7
    assert torch.equal(seen[1], states)


# option of a preset: another value
OTHER = {
    "seed_everything": 7,
    "model.sites": "[layer_02]",
    "model.dtype": "bfloat16",
    "model.image_px": 20,
    "model.stride_px": 5,
    "model.dropout": 0.5,
    "model.feature_norm": "batchnorm",
    "model.head": "conv",
    "model.init_std": 0.5,
    "model.learning_rate": 0.01,
    "model.betas": "[0.5, 0.9]",
    "model.weight_decay": 0.5,
    "model.schedule": "linear",
    "model.warmup_steps": 5,
    "model.loss_average": "null",
    "model.exact_loss": "false",
    "data.batch_size": 3,
    "data.random_scale": "[1, 1]",
    "data.max_class_share": 0.5,
    "data.flip_probability": 0,
    "data.photometric_hue": 0.1,
    "trainer.precision": "bf16-mixed",
    "trainer.max_steps": 9,
    "trainer.val_check_interval": 2,
}
# the layout, names, what is logged, and what only goes with others
NO_NUMBER = {
    *("data.dataset", "data.name", "data.num_workers", "trainer.log_every_n_steps"),
    *("trainer.max_epochs", "trainer.check_val_every_n_epoch", "model.image_resize"),
}


def flat(config: dict) -> set[str]:
    return {
        f"{section}.{key}" if isinstance(values, dict) else section
        for section, values in config.items()
        for key in (values if isinstance(values, dict) else [""])
    }


def test_every_option_of_a_preset_is_known_here():
    names = flat(read_config("dinov3-linear")) | flat(read_config("dinov2-linear"))
    assert names == OTHER.keys() | NO_NUMBER


@pytest.fixture(scope="module")
def base(fit):
    return numbers(*fit("dinov3-linear"))


def numbers(run: ProbeRun, losses: list[float]) -> tuple:
    entry = run.metrics["sites"][0]
    return losses, entry["history"], entry["miou"]


@pytest.mark.nightly
@pytest.mark.parametrize("name", OTHER)
def test_an_option_of_a_preset_moves_a_number(name, fit, base):
    assert numbers(*fit("dinov3-linear", f"--{name}={OTHER[name]}")) != base
