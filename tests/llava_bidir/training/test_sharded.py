"""ZeRO and FSDP2 on two CPU processes: the training of one process, exact resume, valid checkpoints, export.

Starts cost most, so that one set of processes executes many runs of tests/helpers/ddp_script.py.
"""

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_models
import torch
from processes import run_ranks
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
AS_ONE = {  # run: run of one process in float32, and tolerance
    "ddp:without_dropout:32-true": ("without_dropout", 1e-5),
    "ddp:tokens:32-true": ("tokens", 1e-5),
    "zero2:without_dropout:32-true": ("without_dropout", 1e-5),
    "zero2:without_dropout:bf16-mixed": ("without_dropout", 2e-2),
    "zero3:without_dropout:bf16-mixed": ("without_dropout", 2e-2),
    "zero3_offload:without_dropout:bf16-mixed": ("without_dropout", 2e-2),
    "fsdp2:twenty_steps:32-true": ("twenty_steps", 1e-5),
    "fsdp2:clipped:32-true": ("clipped", 1e-5),
    "fsdp2:stage1:32-true": ("stage1", 1e-5),
    "fsdp2:tied:32-true": ("tied", 1e-5),
    "fsdp2:without_dropout:32-true": ("without_dropout", 1e-5),
    "fsdp2:without_dropout:bf16-mixed": ("without_dropout", 2e-2),
    "fsdp2:without_dropout:bf16-true": ("without_dropout", 2e-2),
    "fsdp2:short_answers:32-true": ("without_dropout", 1e-5),
    "fsdp2:compiled:32-true": ("without_dropout", 1e-5),
}
SAVED = [  # trained with dropout, saved in the middle of an epoch and at the end
    ("zero2", "32-true"),
    ("zero2", "bf16-mixed"),
    ("zero3", "bf16-mixed"),
    ("fsdp2", "32-true"),
    ("fsdp2", "bf16-mixed"),
]
VALIDATED = ["zero2:validate", "zero3:validate", "fsdp2:validate", "fsdp2:validate_as_on_gpus"]
OTHERS = {  # run under FSDP2 and another strategy: tolerance of the losses
    "ddp:lora:bf16-mixed": 2e-2,
    "zero3:twenty_steps:32-true": 1e-5,
}
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
    return write_spec(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def two(spec) -> Path:
    """Return the folder with the results of two processes."""
    saved = [f"{strategy}:{{}}:{precision}" for strategy, precision in SAVED]
    runs = [
        *AS_ONE,
        *(run.format(kind) for run in saved for kind in ("uninterrupted", "resume")),
        *(f"{run}:bf16-mixed" for run in VALIDATED),
        "fsdp2:lora:bf16-mixed",
        *OTHERS,
        "ddp:resume_elsewhere:32-true",
        "fsdp2:resume_elsewhere:32-true",
    ]
    resume = {"ddp": "fsdp2-plain-32-true.ckpt", "fsdp2": "ddp-plain-32-true.ckpt"}
    out, codes, log = start(spec, "two", runs, resume=resume)
    assert codes == [0, 0], log
    return out


@pytest.fixture(scope="module")
def one(spec, two) -> Path:
    """Return the folder with the results of one process: the same training, and resumed checkpoints of `two`."""
    resume = {
        "ddp": str(two / "ddp-plain-32-true.ckpt"),
        "zero3_offload": str(two / "zero2-plain-32-true.ckpt"),
    }
    runs = dict.fromkeys(f"ddp:{run}:32-true" for run, _ in AS_ONE.values())
    out, codes, log = start(spec, "one", [*runs, *REJECTED, *SUMS], processes=1, resume=resume)
    assert codes == [0], log
    return out


# ---------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("run", AS_ONE)
def test_two_processes_train_as_one(run, one, two):
    """Compare losses, metrics and, under FSDP2, weights.

    `clipped` also decays weights, averages over tokens and recomputes layers. `short_answers` validates before the
    first step, and answers end earlier on one rank, which then takes part in the forwards of the other.
    """
    of_one, tolerance = AS_ONE[run]
    single = result(one, f"ddp:{of_one}:32-true")
    ranks = results(two, run)
    assert_same_losses(together(ranks), single["losses"], tolerance)
    assert ranks[0]["metrics"]["val/loss"] == ranks[1]["metrics"]["val/loss"]
    assert ranks[0].get("graphs", 1) > 0, "compiled layers"
    strategy, name, precision = run.split(":")
    near = {"rtol": tolerance, "atol": tolerance}
    if name == of_one:
        for metric, value in single["metrics"].items():
            if precision == "32-true" or metric != "val/answer_accuracy":
                assert ranks[0]["metrics"][metric] == pytest.approx(value, tolerance, tolerance)
    if name == of_one and strategy == "fsdp2" and precision == "32-true":
        torch.testing.assert_close(dict(ranks[0]["weights"]), dict(single["weights"]), **near)


@pytest.mark.parametrize("other", OTHERS)
def test_losses_are_those_of_other_strategies(other, two):
    """Of 21 steps of two micro-batches, and of updates of an LLM in bfloat16."""
    strategy, _, run = other.partition(":")
    found, expected = (together(results(two, f"{name}:{run}")) for name in ("fsdp2", strategy))
    assert_same_losses(found, expected, OTHERS[other])


def test_gradients_summed_in_fp32_have_the_norm_of_float32(one):
    """Of 256 micro-batches; products are in bfloat16 in both runs under ZeRO."""
    truth, bf16, fp32 = (result(one, run)["metrics"]["train/grad_norm"] for run in SUMS)
    assert abs(fp32 / truth - 1) < 2e-3
    assert abs(bf16 / truth - 1) > 5e-3


def test_each_process_has_half_of_every_parameter(two):
    for run in results(two, "zero3:uninterrupted:bf16-mixed"):
        assert len(run["shares"]) == len(run["weights"])
        for name, (local, total, share) in run["shares"].items():
            assert local == 0 and share == (total + 1) // 2, name
        assert all(weight.dtype == torch.bfloat16 for weight in run["weights"].values())
    ranks = results(two, "fsdp2:uninterrupted:32-true")
    for name, parameter in ranks[0]["weights"].items():
        halves = [rank["shards"][name] for rank in ranks]
        assert halves[0][0] == (len(parameter) + 1) // 2, name
        assert halves[0][0] + halves[1][0] == len(parameter), name


# ---------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize(("strategy", "precision"), SAVED)
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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_resumes_what_the_other_strategy_has_saved(strategy, two):
    moved = result(two, f"{strategy}:resume_elsewhere:32-true")
    before = result(two, f"{strategy}:without_dropout:32-true")
    assert_same_losses(moved["losses"], before["losses"][4:], 1e-5)
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(dict(moved["weights"]), dict(before["weights"]), **near)


@pytest.mark.parametrize("run", REJECTED)
def test_another_number_of_processes_is_rejected(run, one):
    assert REJECTED[run] in result(one, run)["message"]


@pytest.mark.parametrize(("strategy", "precision"), SAVED)
def test_export_of_a_checkpoint_equals_the_weights_of_all_processes(
    strategy, precision, two, tmp_path
):
    """Export by the callback at the end of the run, and by the command, without the processes of the run."""
    checkpoint = two / f"{strategy}-end-{precision}.ckpt"
    llava_bidir.cli.main(["export", str(checkpoint), str(tmp_path / "hf")])
    memory = result(two, f"{strategy}:uninterrupted:{precision}")["weights"]
    for folder in (tmp_path / "hf", two / f"{strategy}-{precision}" / "hf"):
        assert_same_weights(read_export(folder), memory)


def test_export_merges_the_updates_of_lora(two):
    """Those of all processes, with alpha / r = 2."""
    memory = result(two, "fsdp2:lora:bf16-mixed")["weights"]
    written = read_export(two / "lora-fsdp2-bf16-mixed/hf")
    merged = [name.partition(".base_layer")[0] for name in memory if ".base_layer" in name]
    assert len(merged) == 3 * 7, "layers of three blocks"
    for name in merged:
        base, a, b = (
            memory[f"{name}.{part}.weight"].float()
            for part in ("base_layer", "lora_A.default", "lora_B.default")
        )
        assert b.norm() > 0
        assert torch.equal(written[f"{name}.weight"], (base + 2 * (b @ a)).bfloat16()), name


def test_export_of_tied_embeddings_equals_the_weights_of_all_processes(two):
    written = read_export(two / "tied-fsdp2-32-true/hf")
    assert_same_weights(written, result(two, "fsdp2:tied:32-true")["weights"])
    embedding = written["model.language_model.embed_tokens.weight"]
    assert torch.equal(embedding, written["lm_head.weight"])


@pytest.mark.parametrize("run", VALIDATED)
def test_checkpoint_is_validated_as_in_the_run(run, two):
    """On GPUs, in inference mode."""
    strategy = run.partition(":")[0]
    during = results(two, f"{strategy}:uninterrupted:bf16-mixed")
    for before, again in zip(during, results(two, f"{run}:bf16-mixed"), strict=True):
        validated = {key: x for key, x in before["metrics"].items() if key.startswith("val/")}
        assert again["metrics"] == validated


def test_checkpoints_hold_trained_weights_only(two):
    """Those of FSDP2 are masters in float32, with the optimizer's state of all processes."""
    for stage in (2, 3):
        checkpoint = two / f"zero{stage}-end-bf16-mixed.ckpt"
        layout = json.loads((checkpoint / "whole.json").read_text())
        assert (layout["world_size"], layout["stage"]) == (2, stage)
        file = next((checkpoint / "checkpoint").glob("*mp_rank_00_model_states.pt"))
        saved = torch.load(file, weights_only=False)["module"]
        assert saved and not any("vision_tower" in name for name in saved)
    saved = torch.load(two / "fsdp2-end-bf16-mixed.ckpt", weights_only=True)
    weights = saved["state_dict"]
    memory = result(two, "fsdp2:uninterrupted:bf16-mixed")["weights"]
    assert weights.keys() == {f"model.{name}" for name in memory if "vision_tower" not in name}
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    (optimizer,) = saved["optimizer_states"]
    moments = [state["exp_avg"].shape for state in optimizer["state"].values()]
    assert sorted(moments) == sorted(weight.shape for weight in weights.values())


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


@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_command_resumes_to_the_export_of_an_undisturbed_run(
    strategy, parts, conversations, tmp_path, monkeypatch
):
    """`llava-bidir fit` on two processes; it is resumed from a checkpoint in the middle, and exported once more."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), "tests/helpers"]))

    def fit(out: Path) -> None:
        options = f"""-c {strategy} --trainer.accelerator cpu --trainer.devices 2 --trainer.precision 32-true
            --data.micro_batch_size 1 --trainer.max_epochs 2 --ckpt_path last --out {out}
            --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_train_steps=4
            --trainer.callbacks.filename=middle"""
        if strategy == "zero2":
            options += " --trainer.strategy.class_path zero_on_cpu.ZeROOnCPU"
        words = [*tiny_models.training_arguments(parts, conversations), *options.split()]
        logs = out.with_name(f"{out.name}-logs")
        logs.mkdir()
        codes, log = run_ranks([sys.executable, "-m", "llava_bidir", "fit", *words], logs)
        assert codes == [0, 0], log

    fit(tmp_path / "undisturbed")
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "undisturbed", resumed)
    shutil.rmtree(resumed / "hf")
    saved = resumed / "checkpoints"
    last = saved / "last.ckpt"
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    shutil.move(saved / "middle.ckpt", last)
    fit(resumed)
    llava_bidir.cli.main(["export", str(resumed), str(tmp_path / "hf")])
    expected = read_export(tmp_path / "undisturbed/hf")
    for folder in (resumed / "hf", tmp_path / "hf"):
        assert_same_weights(read_export(folder), expected)
