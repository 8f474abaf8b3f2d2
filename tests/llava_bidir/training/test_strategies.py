"""DDP, ZeRO and FSDP2 on two CPU processes: the training of one process, exact resume, valid checkpoints, export.

Starts cost most, so that one set of processes executes many runs of tests/helpers/ddp_script.py.
"""

import json
from importlib import import_module
from pathlib import Path

import pytest
import tiny_models
import torch
import two_ranks
import without_package
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
from transformers import AutoProcessor
from without_package import answers_elsewhere

import llava_bidir.cli
from llava_bidir.training.deepspeed_strategy import load_zero_weights

pytest.importorskip("deepspeed", reason="DeepSpeed (extra: cluster) is not installed")
pytestmark = pytest.mark.distributed

AS_ONE = {  # run of two processes: run of one process, and tolerance
    "ddp:without_dropout:32-true": ("without_dropout:32-true", 1e-5),
    "ddp:tokens:32-true": ("tokens:32-true", 1e-5),
    "zero2:without_dropout:32-true": ("without_dropout:32-true", 1e-5),
    "zero2:without_dropout:bf16-mixed": ("without_dropout:32-true", 2e-2),
    "zero3:without_dropout:bf16-mixed": ("without_dropout:32-true", 2e-2),
    "zero3_offload:without_dropout:bf16-mixed": ("without_dropout:32-true", 2e-2),
    "fsdp2:without_dropout:32-true": ("without_dropout:32-true", 1e-5),
    "fsdp2:without_dropout:bf16-mixed": ("without_dropout:32-true", 2e-2),
    "fsdp2:without_dropout:bf16-true": ("without_dropout:32-true", 2e-2),
    "fsdp2:short_answers:32-true": ("without_dropout:32-true", 1e-5),
    "fsdp2:twenty_steps:32-true": ("twenty_steps:32-true", 1e-5),
    "fsdp2:clipped:32-true": ("clipped:32-true", 1e-5),
    "fsdp2:stage1:32-true": ("stage1:32-true", 1e-5),
    "fsdp2:tied:32-true": ("tied:32-true", 1e-5),
    "fsdp2:lora:bf16-mixed": ("lora:bf16-mixed", 2e-2),
    "ddp:encoder:32-true": ("encoder:32-true", 1e-5),
    "zero3:encoder:bf16-mixed": ("encoder:32-true", 2e-2),
}
TRAINED_ENCODER = {  # the same, too slow for every landing
    "zero2:encoder:32-true": 1e-5,
    "zero2:encoder:bf16-mixed": 2e-2,
    "zero3_offload:encoder:bf16-mixed": 2e-2,
    "fsdp2:encoder:32-true": 1e-5,
    "fsdp2:encoder:bf16-mixed": 2e-2,
}
RESUMED_ENCODER = [
    "ddp:encoder_{}:32-true",
    "zero2:encoder_{}:bf16-mixed",
    "zero3:encoder_{}:bf16-mixed",
    "fsdp2:encoder_{}:32-true",
]
SAVED = [
    "zero2:{}:32-true",
    "zero2:{}:bf16-mixed",
    "zero3:{}:bf16-mixed",
    "fsdp2:{}:32-true",
    "fsdp2:{}:bf16-mixed",
]
VALIDATED = [
    "zero2:validate:bf16-mixed",
    "zero3:validate:bf16-mixed",
    "fsdp2:validate:32-true",
    "fsdp2:validate_as_on_gpus:32-true",
]
ELSEWHERE = ["ddp:resume_elsewhere:32-true", "fsdp2:resume_elsewhere:32-true"]
RUNS = [*AS_ONE, *(run.format(kind) for run in SAVED for kind in ("uninterrupted", "resume"))]
SUMS = ["ddp:many_micro_batches:32-true", "zero2:sum_in_fp32:bf16-mixed"]
REJECTED = {  # checkpoint of two processes, resumed by one: message
    "ddp:reject:32-true": "of a run on 2 devices, and this one has 1",
    "zero3_offload:reject:32-true": "has world_size 2 and this run 1",
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> dict[str, str]:
    import_module("torch._inductor.lowering")  # DeepSpeed does so: once, before ranks are forked
    return write_spec(tmp_path_factory.mktemp("strategies"))


@pytest.fixture(scope="module")
def two(spec) -> Path:
    """Return the folder with the results of all runs on two processes."""
    resume = {"ddp": "fsdp2-plain-32-true.ckpt", "fsdp2": "ddp-plain-32-true.ckpt"}
    return start(spec, "two", [*RUNS, *VALIDATED, *ELSEWHERE], resume=resume)[0]


@pytest.fixture(scope="module")
def one(spec, two) -> Path:
    """Return the folder with the results of one process under DDP, and what it refuses to resume of `two`."""
    resume = {
        "ddp": str(two / "ddp-plain-32-true.ckpt"),
        "zero3_offload": str(two / "zero2-plain-32-true.ckpt"),
    }
    runs = dict.fromkeys(f"ddp:{run}" for run, _ in AS_ONE.values())
    return start(spec, "one", [*runs, *REJECTED], processes=1, resume=resume)[0]


# ---------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("run", AS_ONE)
def test_two_processes_train_as_one(run, one, two):
    """Compare losses, norm of the gradient, validation and weights.

    `clipped` also decays weights, averages over tokens and recomputes layers. `short_answers` validates before the
    first step, and answers end earlier on one rank, which then takes part in the forwards of the other.
    """
    of_one, tolerance = AS_ONE[run]
    _, kind, precision = run.split(":")
    single = result(one, f"ddp:{of_one}")
    ranks = results(two, run)
    assert_same_losses(together(ranks), single["losses"], tolerance)
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    if kind != of_one.split(":")[0]:
        return
    near = {"rtol": tolerance, "atol": tolerance}
    names = ("val/loss", "train/loss", "train/supervised_tokens", "train/grad_norm")
    if precision == "32-true":
        names = single["metrics"]
        torch.testing.assert_close(dict(ranks[0]["weights"]), dict(single["weights"]), **near)
    for name in names:
        of_rank, expected = (x["metrics"][name] for x in (ranks[0], single))
        torch.testing.assert_close(of_rank, expected, **near, msg=name)


@pytest.mark.nightly
def test_a_trained_encoder_is_that_of_one_process(spec, one):
    """Under each strategy; its last block is not read, and has no gradient that DDP would wait for."""
    out = start(spec, "trained_encoder", [*TRAINED_ENCODER])[0]
    expected = result(one, "ddp:encoder:32-true")["losses"]
    for run, tolerance in TRAINED_ENCODER.items():
        assert_same_losses(together(results(out, run)), expected, tolerance)


@pytest.mark.nightly
def test_a_trained_encoder_is_resumed_after_a_kill_and_exported(spec, tmp_path):
    """By new processes, from what those have left of which kill -9 ended one; exports are read without the package."""
    resume = {}
    for run in RESUMED_ENCODER:
        strategy, _, precision = run.split(":")
        killed = run.format("killed")
        out, codes, log = start(spec, f"killed_{strategy}", [killed], must_pass=False)
        assert codes[0] not in (0, -9) and codes[1] == -9, log
        resume[strategy] = str(out / f"{strategy}-encoder-{precision}.ckpt")
    runs = [run.format(kind) for run in RESUMED_ENCODER for kind in ("uninterrupted", "resume")]
    out = start(spec, "resumed_encoder", runs, resume=resume)[0]
    exports = {}
    for run in RESUMED_ENCODER:
        whole, resumed = (results(out, run.format(kind)) for kind in ("uninterrupted", "resume"))
        for before, after in zip(whole, resumed, strict=True):
            assert after["losses"] == before["losses"][4:]
            assert_same_weights(after["weights"], before["weights"])
        strategy, _, precision = run.split(":")
        folder = str(out / f"encoder-{strategy}-{precision}/hf")
        exports[folder] = resumed[0]["weights"]
        assert_same_weights(read_export(folder), exports[folder])
    for folder, answers in zip(exports, answers_elsewhere([*exports], tmp_path), strict=True):
        model = without_package.read(folder)
        model.load_state_dict(exports[folder])
        features = without_package.features(model, AutoProcessor.from_pretrained(folder))
        assert answers["features"] == features


@pytest.mark.nightly
def test_compiled_layers_train_as_one_process(spec, one):
    run = "fsdp2:compiled:32-true"
    ranks = results(start(spec, "compiled", [run])[0], run)
    assert_same_losses(together(ranks), result(one, "ddp:without_dropout:32-true")["losses"], 1e-5)
    assert ranks[0]["graphs"]


@pytest.mark.nightly
def test_gradients_summed_in_fp32_have_the_norm_of_float32(spec):
    """Of 256 micro-batches, with products in bfloat16; summed in bfloat16, it differs by more than 0.5%."""
    out = start(spec, "sums", SUMS, processes=1)[0]
    truth, fp32 = (result(out, run)["metrics"]["train/grad_norm"] for run in SUMS)
    assert abs(fp32 / truth - 1) < 2e-3


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
        assert {half[1:] for half in halves} == {parameter.shape[1:]}, name


@pytest.mark.parametrize("run", SAVED)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, two):
    """From inside an epoch, with dropout, and with batches that have images on one rank only."""
    whole, resumed = (results(two, run.format(kind)) for kind in ("uninterrupted", "resume"))
    modalities = zip(whole[0]["text_only"], whole[1]["text_only"], strict=True)
    one_sided = [first != second for first, second in modalities]
    assert any(one_sided[:4]) and any(one_sided[4:]), "before and after the checkpoint"
    for before, after in zip(whole, resumed, strict=True):
        assert len(before["losses"]) == 12, "two micro-batches a step"
        assert after["losses"] == before["losses"][4:]
        assert after["metrics"] == before["metrics"]
        assert_same_weights(after["weights"], before["weights"])
    plain = result(two, run.format("without_dropout"))
    assert whole[0]["losses"][0] != plain["losses"][0], "dropout is on"


@pytest.mark.parametrize("run", ELSEWHERE)
def test_a_run_resumes_what_another_strategy_has_saved(run, two):
    moved = result(two, run)
    before = result(two, run.replace("resume_elsewhere", "without_dropout"))
    assert_same_losses(moved["losses"], before["losses"][4:], 1e-5)
    weights = (dict(run["weights"]) for run in (moved, before))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("run", SAVED)
def test_export_of_a_checkpoint_equals_the_model_in_memory(run, two, tmp_path):
    """Export at the end of the run, and by the command, without the processes of the run."""
    strategy, _, precision = run.split(":")
    checkpoint = two / f"{strategy}-end-{precision}.ckpt"
    llava_bidir.cli.main(["export", str(checkpoint), str(tmp_path / "hf")])
    memory = result(two, run.format("uninterrupted"))["weights"]
    for folder in (tmp_path / "hf", two / f"{strategy}-{precision}" / "hf"):
        assert_same_weights(read_export(folder), memory)


@pytest.mark.parametrize("run", VALIDATED)
def test_checkpoint_is_validated_as_in_the_run(run, two):
    """Also in inference mode, as on GPUs."""
    strategy, _, precision = run.split(":")
    during = results(two, f"{strategy}:uninterrupted:{precision}")
    for before, again in zip(during, results(two, run), strict=True):
        validated = {key: x for key, x in before["metrics"].items() if key.startswith("val/")}
        assert again["metrics"] == validated


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_zero_holds_trainable_weights_only(stage, two):
    checkpoint = two / f"zero{stage}-end-bf16-mixed.ckpt"
    layout = json.loads((checkpoint / "whole.json").read_text())
    assert (layout["world_size"], layout["stage"]) == (2, stage)
    file = next((checkpoint / "checkpoint").glob("*mp_rank_00_model_states.pt"))
    saved = torch.load(file, weights_only=False)["module"]
    assert saved
    assert not any("vision_tower" in name for name in saved)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_checkpoint_of_fsdp2_holds_trained_masters_in_float32(precision, two):
    memory = result(two, f"fsdp2:uninterrupted:{precision}")["weights"]
    saved = torch.load(two / f"fsdp2-end-{precision}.ckpt", weights_only=True)
    weights = saved["state_dict"]
    assert weights.keys() == {f"model.{name}" for name in memory if "vision_tower" not in name}
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    (optimizer,) = saved["optimizer_states"]
    moments = [state["exp_avg"].shape for state in optimizer["state"].values()]
    assert sorted(moments) == sorted(weight.shape for weight in weights.values())


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


@pytest.mark.parametrize("run", REJECTED)
def test_another_number_of_processes_is_rejected(run, one):
    assert REJECTED[run] in result(one, run)["message"]


@pytest.mark.parametrize(
    "fault", ["kill_in_save", pytest.param("kill_in_step", marks=pytest.mark.nightly)]
)
def test_a_rank_that_dies_ends_the_run_and_leaves_the_checkpoint_before_it(fault, spec, two):
    """The other rank fails before DDP's own timeout; the good checkpoint is that of an undisturbed run."""
    out, codes, log = start(spec, fault, [f"zero2:{fault}:32-true"], must_pass=False)
    assert codes[0] not in (0, -9) and codes[1] == -9, log
    assert not (out / "zero2-32-true/hf").exists()
    if fault == "kill_in_save":
        assert (out / "fault/bad.ckpt.partial").is_dir()
        assert not (out / "fault/bad.ckpt").exists()
    undisturbed = load_zero_weights(two / "zero2-middle-32-true.ckpt")
    assert_same_weights(load_zero_weights(out / "fault/good.ckpt"), undisturbed)


def test_command_resumes_to_the_export_of_an_undisturbed_run(parts, conversations, tmp_path):
    """`llava-bidir fit -c fsdp2` on two processes, from a checkpoint in the middle."""
    undisturbed = tmp_path / "undisturbed"
    resumed = tmp_path / "resumed"
    middle = undisturbed / "checkpoints/middle.ckpt"
    (resumed / "checkpoints").mkdir(parents=True)
    (resumed / "checkpoints/last.ckpt").symlink_to(middle)
    fit = ["llava_bidir", "fit", *tiny_models.training_arguments(parts, conversations)]
    fit += """-c fsdp2 --trainer.accelerator cpu --trainer.devices 2 --trainer.precision 32-true
        --data.micro_batch_size 1 --trainer.max_epochs 2 --ckpt_path last
        --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_train_steps=4
        --trainer.callbacks.filename=middle""".split()
    commands = {out.name: [*fit, "--out", str(out)] for out in (undisturbed, resumed)}
    said = two_ranks.run(commands, tmp_path)
    assert "Restored all states from the checkpoint" in said["resumed"]
    assert torch.load(middle, weights_only=True)["global_step"] < 6
    assert_same_weights(read_export(resumed / "hf"), read_export(undisturbed / "hf"))
