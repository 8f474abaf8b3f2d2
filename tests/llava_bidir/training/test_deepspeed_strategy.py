"""ZeRO on two CPU processes: the training of one process, exact resume, valid checkpoints, export.

Starts cost most, so that one set of processes executes many runs of tests/helpers/ddp_script.py.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from training_runs import (
    assert_same_losses,
    assert_same_weights,
    read_export,
    result,
    results,
    start,
    together,
    write_spec,
)

import llava_bidir.cli
from llava_bidir.training.deepspeed_strategy import load_zero_weights

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        find_spec("deepspeed") is None, reason="DeepSpeed (extra: cluster) is not installed"
    ),
]
ZERO = [("zero2", "32-true"), ("zero2", "bf16-mixed"), ("zero3", "bf16-mixed")]
AS_ONE = {  # run without dropout, which differs between ranks: tolerance
    "ddp:without_dropout:32-true": 1e-5,
    "ddp:tokens:32-true": 1e-5,
    "zero2:without_dropout:32-true": 1e-5,
    "zero2:without_dropout:bf16-mixed": 2e-2,
    "zero3:without_dropout:bf16-mixed": 2e-2,
    "zero3_offload:without_dropout:bf16-mixed": 2e-2,
}
RUNS = [
    *AS_ONE,
    *(
        f"{stage}:{run}:{precision}"
        for stage, precision in ZERO
        for run in ("uninterrupted", "resume")
    ),
    *(f"{stage}:validate:bf16-mixed" for stage in ("zero2", "zero3")),
]
SUMS = (
    "ddp:many_micro_batches:32-true",
    "zero2:many_micro_batches:bf16-mixed",
    "zero2:sum_in_fp32:bf16-mixed",
)
REJECTED = {  # checkpoint of two processes, resumed by one: message
    "ddp:reject:32-true": "of a run on 2 devices, and this one has 1",
    "zero3_offload:reject:32-true": "has world_size 2 and this run 1",
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> dict[str, str]:
    return write_spec(tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def two(spec) -> Path:
    """Return the folder with the results of RUNS on two processes."""
    out, codes, log = start(spec, "two", RUNS)
    assert codes == [0, 0], log
    return out


@pytest.fixture(scope="module")
def one(spec, two) -> Path:
    """Return the folder with the results of one process: the same training, and resumed checkpoints of `two`."""
    resume = {
        "ddp": str(two / "ddp-plain-32-true.ckpt"),
        "zero3_offload": str(two / "zero2-plain-32-true.ckpt"),
    }
    runs = ["ddp:without_dropout:32-true", "ddp:tokens:32-true", *REJECTED, *SUMS]
    out, codes, log = start(spec, "one", runs, processes=1, resume=resume)
    assert codes == [0], log
    return out


# ---------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize(("run", "tolerance"), AS_ONE.items())
def test_two_processes_train_as_one(run, tolerance, one, two):
    """Compare losses, gradient norm and validation."""
    single = result(one, f"ddp:{run.split(':')[1]}:32-true")
    ranks = results(two, run)
    assert_same_losses(together(ranks), single["losses"], tolerance)
    metrics = ranks[0]["metrics"]
    for name in ("val/loss", "train/loss", "train/supervised_tokens", "train/grad_norm"):
        assert metrics[name] == pytest.approx(single["metrics"][name], tolerance, tolerance), name
    assert metrics["val/loss"] == ranks[1]["metrics"]["val/loss"]
    if "32-true" in run:
        assert metrics["val/answer_accuracy"] == single["metrics"]["val/answer_accuracy"]


def test_gradients_summed_in_fp32_have_the_norm_of_float32(one):
    """Of 256 micro-batches; products are in bfloat16 in both runs under ZeRO."""
    truth, bf16, fp32 = (result(one, run)["metrics"]["train/grad_norm"] for run in SUMS)
    assert abs(fp32 / truth - 1) < 2e-3
    assert abs(bf16 / truth - 1) > 5e-3


def test_zero3_leaves_each_process_half_of_every_parameter(two):
    for run in results(two, "zero3:uninterrupted:bf16-mixed"):
        assert len(run["shares"]) == len(run["weights"])
        for name, (local, total, share) in run["shares"].items():
            assert local == 0 and share == (total + 1) // 2, name
        assert all(weight.dtype == torch.bfloat16 for weight in run["weights"].values())


@pytest.mark.parametrize(("strategy", "precision"), ZERO)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(strategy, precision, two):
    """From inside an epoch, with dropout, and with batches that have images on one rank only."""
    whole = results(two, f"{strategy}:uninterrupted:{precision}")
    resumed = results(two, f"{strategy}:resume:{precision}")
    modalities = zip(whole[0]["text_only"], whole[1]["text_only"], strict=True)
    one_sided = [first != second for first, second in modalities]
    assert any(one_sided[:4]) and any(one_sided[4:]), "before and after the checkpoint"
    for before, after in zip(whole, resumed, strict=True):
        assert len(before["losses"]) == 12, "two micro-batches a step"
        assert after["losses"] == before["losses"][4:]
        assert after["metrics"] == before["metrics"]
        assert_same_weights(after["weights"], before["weights"])
    plain = result(two, f"{strategy}:without_dropout:{precision}")
    assert whole[0]["losses"][0] != plain["losses"][0], "dropout is on"


# ---------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize(("strategy", "precision"), ZERO)
def test_export_of_a_checkpoint_equals_the_model_in_memory(strategy, precision, two, tmp_path):
    """Export by the callback at the end of the run, and by the command, without the processes of the run."""
    checkpoint = two / f"{strategy}-end-{precision}.ckpt"
    llava_bidir.cli.main(["export", str(checkpoint), str(tmp_path / "hf")])
    memory = result(two, f"{strategy}:uninterrupted:{precision}")["weights"]
    for folder in (tmp_path / "hf", two / f"{strategy}-{precision}" / "hf"):
        assert_same_weights(read_export(folder), memory)


@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoint_is_validated_as_in_the_run_and_holds_trainable_weights_only(stage, two):
    during = results(two, f"zero{stage}:uninterrupted:bf16-mixed")
    after = results(two, f"zero{stage}:validate:bf16-mixed")
    for run, again in zip(during, after, strict=True):
        validated = {key: x for key, x in run["metrics"].items() if key.startswith("val/")}
        assert again["metrics"] == validated
    checkpoint = two / f"zero{stage}-end-bf16-mixed.ckpt"
    layout = json.loads((checkpoint / "whole.json").read_text())
    assert (layout["world_size"], layout["stage"]) == (2, stage)
    file = next((checkpoint / "checkpoint").glob("*mp_rank_00_model_states.pt"))
    saved = torch.load(file, weights_only=False)["module"]
    assert saved
    assert not any("vision_tower" in name for name in saved)


@pytest.mark.parametrize("run", REJECTED)
def test_another_number_of_processes_is_rejected(run, one):
    assert REJECTED[run] in result(one, run)["message"]


FAULTS = {  # run of the worker: (exit code of rank 1, settings)
    "kill_in_save": (-9, {}),
    "disk_full_in_save": (1, {}),
    "kill_in_step": (-9, {}),
    "stall_in_step": (None, {"timeout_minutes": 0.5}),
}


@pytest.mark.parametrize(
    "fault",
    ["kill_in_save", *(pytest.param(name, marks=pytest.mark.nightly) for name in [*FAULTS][1:])],
)
def test_a_rank_that_fails_ends_the_run_and_leaves_the_checkpoint_before_it(fault, spec, two):
    """The other rank fails before DDP's own timeout; the good checkpoint is that of an undisturbed run."""
    code, settings = FAULTS[fault]
    out, codes, log = start(spec, fault, [f"zero2:{fault}:32-true"], **settings)
    assert codes[0] not in (0, -9), log
    assert code is None or codes[1] == code, log
    assert not (out / "zero2-32-true/hf").exists()
    if "save" in fault:
        assert (out / "fault/bad.ckpt.partial").is_dir()
        assert not (out / "fault/bad.ckpt").exists()
    undisturbed = load_zero_weights(two / "zero2-middle-32-true.ckpt")
    assert_same_weights(load_zero_weights(out / "fault/good.ckpt"), undisturbed)
