"""FSDP2 on two CPU processes: the training of one process, exact resume, valid checkpoints, export.

One set of processes executes many runs of tests/helpers/ddp_script.py, as in test_deepspeed_strategy.py.
"""

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

pytestmark = pytest.mark.distributed

AS_ONE = {  # run, at a precision: run of one process in float32, and tolerance
    "twenty_steps:32-true": ("twenty_steps", 1e-5),
    "clipped:32-true": ("clipped", 1e-5),
    "stage1:32-true": ("stage1", 1e-5),
    "tied:32-true": ("tied", 1e-5),
    "without_dropout:bf16-mixed": ("without_dropout", 2e-2),
    "without_dropout:bf16-true": ("without_dropout", 2e-2),
    "short_answers:32-true": ("without_dropout", 1e-5),
    "compiled:32-true": ("without_dropout", 1e-5),
}
SAVED = ("32-true", "bf16-mixed")
OTHERS = {  # run under another strategy: tolerance of its losses
    "ddp:lora:bf16-mixed": 2e-2,
    "zero3:twenty_steps:32-true": 1e-5,
}
if find_spec("deepspeed") is None:
    del OTHERS["zero3:twenty_steps:32-true"]
RUNS = [
    "fsdp2:lora:bf16-mixed",
    *(f"fsdp2:{run}" for run in AS_ONE),
    *(f"fsdp2:{run}:{precision}" for precision in SAVED for run in ("uninterrupted", "resume")),
    "fsdp2:validate:32-true",
    "fsdp2:validate_as_on_gpus:32-true",
    "ddp:without_dropout:32-true",
    "fsdp2:without_dropout:32-true",
    "ddp:resume_elsewhere:32-true",
    "fsdp2:resume_elsewhere:32-true",
    *OTHERS,
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> dict[str, str]:
    return write_spec(tmp_path_factory.mktemp("fsdp2"))


@pytest.fixture(scope="module")
def two(spec) -> Path:
    """Return the folder with the results of RUNS on two processes."""
    resume = {"ddp": "fsdp2-plain-32-true.ckpt", "fsdp2": "ddp-plain-32-true.ckpt"}
    out, codes, log = start(spec, "two", RUNS, resume=resume)
    assert codes == [0, 0], log
    return out


@pytest.fixture(scope="module")
def one(spec, two) -> Path:
    """Return the folder with the results of one process under DDP."""
    runs = dict.fromkeys(f"ddp:{run}:32-true" for run, _ in AS_ONE.values())
    out, codes, log = start(spec, "one", [*runs], processes=1)
    assert codes == [0], log
    return out


# ---------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("run", AS_ONE)
def test_two_processes_train_as_one(run, one, two):
    """Compare losses, validation and weights.

    `clipped` also decays weights, averages over tokens and recomputes layers. `short_answers` validates before the
    first step, and answers end earlier on one rank, which then takes part in the forwards of the other.
    """
    of_one, tolerance = AS_ONE[run]
    single = result(one, f"ddp:{of_one}:32-true")
    ranks = results(two, f"fsdp2:{run}")
    assert_same_losses(together(ranks), single["losses"], tolerance)
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert ranks[0].get("graphs", 1) > 0, "compiled layers"
    if of_one == run.removesuffix(":32-true"):
        near = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(ranks[0]["metrics"], single["metrics"], **near)
        torch.testing.assert_close(dict(ranks[0]["weights"]), dict(single["weights"]), **near)


@pytest.mark.parametrize("other", OTHERS)
def test_losses_are_those_of_other_strategies(other, two):
    """Of 21 steps of two micro-batches, and of updates of an LLM in bfloat16."""
    strategy, _, run = other.partition(":")
    found, expected = (together(results(two, f"{name}:{run}")) for name in ("fsdp2", strategy))
    assert_same_losses(found, expected, OTHERS[other])


def test_each_process_has_half_of_every_parameter(two):
    ranks = results(two, "fsdp2:uninterrupted:32-true")
    for name, parameter in ranks[0]["weights"].items():
        halves = [rank["shards"][name] for rank in ranks]
        assert halves[0][0] == (len(parameter) + 1) // 2, name
        assert halves[0][0] + halves[1][0] == len(parameter), name
        assert {half[1:] for half in halves} == {parameter.shape[1:]}, name


@pytest.mark.parametrize("precision", SAVED)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(precision, two):
    """From inside an epoch, with dropout."""
    undisturbed = results(two, f"fsdp2:uninterrupted:{precision}")
    resumed = results(two, f"fsdp2:resume:{precision}")
    for before, after in zip(undisturbed, resumed, strict=True):
        assert len(before["losses"]) == 12, "two micro-batches a step"
        assert after["losses"] == before["losses"][4:]
        assert after["metrics"] == before["metrics"]
        assert_same_weights(after["weights"], before["weights"])
    plain = result(two, f"fsdp2:without_dropout:{precision}")
    assert undisturbed[0]["losses"][0] != plain["losses"][0], "dropout is on"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_resumes_what_the_other_strategy_has_saved(strategy, two):
    moved = result(two, f"{strategy}:resume_elsewhere:32-true")
    before = result(two, f"{strategy}:without_dropout:32-true")
    assert_same_losses(moved["losses"], before["losses"][4:], 1e-5)
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(dict(moved["weights"]), dict(before["weights"]), **near)


# ---------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("precision", SAVED)
def test_a_checkpoint_holds_trained_masters_and_is_exported_as_the_weights_of_all_processes(
    precision, two, tmp_path
):
    """By the callback at the end of the run, and by the command, without the processes of the run."""
    checkpoint = two / f"fsdp2-end-{precision}.ckpt"
    llava_bidir.cli.main(["export", str(checkpoint), str(tmp_path / "hf")])
    memory = result(two, f"fsdp2:uninterrupted:{precision}")["weights"]
    for folder in (tmp_path / "hf", two / f"fsdp2-{precision}" / "hf"):
        assert_same_weights(read_export(folder), memory)
    saved = torch.load(checkpoint, weights_only=True)
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


@pytest.mark.parametrize("run", ["validate", "validate_as_on_gpus"])
def test_checkpoint_is_validated_as_in_the_run(run, two):
    """On GPUs, in inference mode."""
    during = results(two, "fsdp2:uninterrupted:32-true")
    after = results(two, f"fsdp2:{run}:32-true")
    for before, again in zip(during, after, strict=True):
        validated = {key: x for key, x in before["metrics"].items() if key.startswith("val/")}
        assert again["metrics"] == validated


def test_command_resumes_to_the_export_of_an_undisturbed_run(parts, conversations, tmp_path):
    """`llava-bidir fit -c fsdp2` on two processes, from a checkpoint in the middle."""

    def fit(out: Path) -> None:
        options = f"""-c fsdp2 --trainer.accelerator cpu --trainer.devices 2 --trainer.precision 32-true
            --data.micro_batch_size 1 --trainer.max_epochs 2 --ckpt_path last --out {out}
            --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_train_steps=4
            --trainer.callbacks.filename=middle"""
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
    shutil.move(saved / "middle.ckpt", saved / "last.ckpt")
    assert torch.load(saved / "last.ckpt", weights_only=True)["global_step"] < 6
    fit(resumed)
    assert_same_weights(read_export(resumed / "hf"), read_export(tmp_path / "undisturbed/hf"))
