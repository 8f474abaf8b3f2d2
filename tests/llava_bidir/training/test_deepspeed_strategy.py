"""ZeRO on two CPU processes: the training of one process, exact resume, valid checkpoints, export."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_models
import torch
from processes import HANGING_S

import llava_bidir.cli
from llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.common.checkpoint_io import latest_valid_checkpoint
from llava_bidir.training.deepspeed_strategy import load_zero_weights

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        find_spec("deepspeed") is None, reason="DeepSpeed (extra: cluster) is not installed"
    ),
]
WORKER = Path(__file__).parents[2] / "helpers/ddp_script.py"
ZERO = [
    (stage, precision) for stage in ("zero2", "zero3") for precision in ("32-true", "bf16-mixed")
]
RUNS = [f"{s}:without_dropout:32-true" for s in ("zero3", "ddp", "zero2")] + [
    "zero3_offload:without_dropout:bf16-mixed"
]
RUNS += [f"{s}:{run}:{p}" for s, p in ZERO for run in ("uninterrupted", "resume")]
RUNS += [
    f"{s}:{run}:bf16-mixed" for s in ("zero2", "zero3") for run in ("without_dropout", "validate")
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> dict:
    """Write models and data: 2 of 12 conversations have no image, and 9 questions do not divide by 2."""
    root = tmp_path_factory.mktemp("zero")
    encoder, llm = tiny_models.write_parts(root)
    shutil.copytree(llm, root / "dropout_llm")
    config = json.loads((root / "dropout_llm/config.json").read_text())
    (root / "dropout_llm/config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    data = tiny_models.write_conversations(root / "data")
    questions = json.loads((data / "data.json").read_text())[3:]
    (data / "questions.json").write_text(json.dumps(questions))
    paths = {
        "encoder": encoder.path,
        "llm": llm,
        "dropout_llm": str(root / "dropout_llm"),
        "conversations": str(data),
    }
    return paths | {"root": str(root)}


@pytest.fixture(scope="module")
def two(spec) -> Path:
    """Return the folder with the results of RUNS on two processes."""
    out, codes, log = start(spec, "two", RUNS)
    assert codes == [0, 0], log
    return out


@pytest.fixture(scope="module")
def one(spec, two) -> Path:
    """Return the folder with the results of one process: the same training, and resumed checkpoints of `two`."""
    checkpoints = {
        "ddp": two / "ddp-plain-32-true.ckpt",
        "zero3_offload": two / "zero2-plain-32-true.ckpt",
    }
    runs = [
        "ddp:without_dropout:32-true",
        "ddp:resume_elsewhere:32-true",
        "zero3_offload:reject:32-true",
    ]
    out, codes, log = start(
        spec, "one", runs, processes=1, resume={k: str(v) for k, v in checkpoints.items()}
    )
    assert codes == [0], log
    return out


def start(
    spec: dict, name: str, runs: list[str], processes: int = 2, **more
) -> tuple[Path, list[int], str]:
    """Run functions of the worker; return the folder, the exit codes and the output of the processes."""
    out = Path(spec["root"]) / name
    out.mkdir()
    (out / "spec.json").write_text(
        json.dumps(spec | {"out": str(out), "processes": processes} | more)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
    }
    group |= {
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": 1,
        "PYTHONWARNINGS": "ignore",
    }
    running = []
    for rank in range(processes):
        environment = os.environ | {
            k: str(v) for k, v in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()
        }
        log = (out / f"{rank}.log").open("w")
        command = [sys.executable, str(WORKER), str(out / "spec.json"), *runs]
        running.append(
            subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        )
    try:
        codes = [process.wait(timeout=HANGING_S) for process in running]
    finally:
        for process in running:
            process.kill()
    return (
        out,
        codes,
        "\n".join((out / f"{rank}.log").read_text()[-3000:] for rank in range(processes)),
    )


def result(folder: Path, run: str, rank: int = 0) -> dict:
    """Load the result of a rank in a run."""
    return torch.load(folder / f"{run}.{rank}.pt")


# ---------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize(
    ("run", "tolerance"),
    [
        ("ddp:without_dropout:32-true", 1e-5),
        ("zero2:without_dropout:32-true", 1e-5),
        ("zero3:without_dropout:32-true", 1e-5),
        ("zero2:without_dropout:bf16-mixed", 2e-2),
        ("zero3:without_dropout:bf16-mixed", 2e-2),
        ("zero3_offload:without_dropout:bf16-mixed", 2e-2),
    ],
)
def test_two_processes_train_as_one(run, tolerance, one, two):
    """Compare losses, gradient norm and validation, without dropout, which differs between ranks."""
    single = result(one, "ddp:without_dropout:32-true")
    ranks = [result(two, run, rank) for rank in (0, 1)]
    together = [
        loss for pair in zip(*(rank["losses"] for rank in ranks), strict=True) for loss in pair
    ]
    assert [ids for ids, _ in together] == [ids for ids, _ in single["losses"]]
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(
        [loss for _, loss in together], [loss for _, loss in single["losses"]], **near
    )
    for name in ("val/loss", "train/grad_norm"):
        torch.testing.assert_close(ranks[0]["metrics"][name], single["metrics"][name], **near)
    assert ranks[0]["metrics"]["val/loss"] == ranks[1]["metrics"]["val/loss"]
    if "32-true" in run:
        assert (
            ranks[0]["metrics"]["val/answer_accuracy"] == single["metrics"]["val/answer_accuracy"]
        )


def test_zero3_leaves_each_process_half_of_every_parameter(two):
    for rank in (0, 1):
        run = result(two, "zero3:uninterrupted:bf16-mixed", rank)
        assert len(run["shares"]) == len(run["weights"])
        for name, (local, total, share) in run["shares"].items():
            assert local == 0 and share == (total + 1) // 2, name
        assert all(weight.dtype == torch.bfloat16 for weight in run["weights"].values())


@pytest.mark.parametrize(("strategy", "precision"), ZERO)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(strategy, precision, two):
    """From inside an epoch, with dropout, and with batches that have images on one rank only."""
    whole, resumed = (
        [result(two, f"{strategy}:{run}:{precision}", rank) for rank in (0, 1)]
        for run in ("uninterrupted", "resume")
    )
    one_sided = [a != b for a, b in zip(whole[0]["text_only"], whole[1]["text_only"], strict=True)]
    assert any(one_sided[:4]) and any(one_sided[4:]), (
        "text on one rank before and after the checkpoint"
    )
    for before, after in zip(whole, resumed, strict=True):
        assert len(before["losses"]) == 12 and after["losses"] == before["losses"][4:], (
            "two micro-batches a step"
        )
        assert after["metrics"] == before["metrics"]
        for name, weight in before["weights"].items():
            assert torch.equal(weight, after["weights"][name]), name
    assert (
        whole[0]["losses"][0] != result(two, f"{strategy}:without_dropout:{precision}")["losses"][0]
    ), "dropout is on"


# ---------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize(("strategy", "precision"), ZERO)
def test_export_of_a_checkpoint_equals_the_model_in_memory(strategy, precision, two, tmp_path):
    """Export by the callback at the end of the run, and by the command, without the processes of the run."""
    llava_bidir.cli.main(
        ["export", str(two / f"{strategy}-end-{precision}.ckpt"), str(tmp_path / "hf")]
    )
    memory = result(two, f"{strategy}:uninterrupted:{precision}")["weights"]
    for directory in (tmp_path / "hf", two / f"{strategy}-{precision}" / "hf"):
        written = LlavaBidirForConditionalGeneration.from_pretrained(
            directory, dtype="auto"
        ).state_dict()
        assert set(written) == set(memory)
        for name, weight in memory.items():
            assert torch.equal(weight, written[name]), name


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_validation_of_a_checkpoint_repeats_that_of_the_run(strategy, two):
    for rank in (0, 1):
        during = result(two, f"{strategy}:uninterrupted:bf16-mixed", rank)
        after = result(two, f"{strategy}:validate:bf16-mixed", rank)
        assert after["metrics"] == {
            k: v for k, v in during["metrics"].items() if k.startswith("val/")
        }


@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoint_holds_trainable_weights_only(stage, two):
    checkpoint = two / f"zero{stage}-end-bf16-mixed.ckpt"
    listing = json.loads((checkpoint / "whole.json").read_text())
    assert listing["world_size"] == 2 and listing["stage"] == stage
    file = next((checkpoint / "checkpoint").glob("*mp_rank_00_model_states.pt"))
    saved = torch.load(file, weights_only=False)["module"]
    assert saved and not any("vision_tower" in name for name in [*saved, *listing["trained"]])


def test_resumed_on_another_number_of_processes_trains_the_same_samples(one):
    """One process resumes a checkpoint of two under DDP."""
    moved, single = (
        result(one, "ddp:resume_elsewhere:32-true"),
        result(one, "ddp:without_dropout:32-true"),
    )
    rest = single["losses"][8:]
    assert [ids for ids, _ in moved["losses"]] == [ids for ids, _ in rest]
    torch.testing.assert_close(
        [x for _, x in moved["losses"]], [x for _, x in rest], rtol=1e-5, atol=1e-5
    )
    for name, weight in moved["weights"].items():
        torch.testing.assert_close(weight, single["weights"][name], rtol=1e-5, atol=1e-5)


def test_another_number_of_processes_is_rejected_with_the_way_out(one):
    message = result(one, "zero3_offload:reject:32-true")["message"]
    assert "has world_size 2 and this run 1" in message and "llava-bidir export" in message


@pytest.mark.parametrize("fault", ["kill_in_save", "disk_full_in_save"])
def test_interrupted_save_leaves_the_checkpoint_before_it(fault, spec, two):
    """The run fails, the partial checkpoint is ignored, and the one before equals that of an undisturbed run."""
    out, codes, log = start(spec, fault, [f"zero2:{fault}:32-true"])
    assert codes[0] != 0 and codes[1] == (-9 if fault == "kill_in_save" else 1), log
    assert sorted(path.name for path in (out / "fault").iterdir()) == [
        "bad.ckpt.partial",
        "good.ckpt",
    ]
    assert latest_valid_checkpoint(out / "fault") == out / "fault/good.ckpt"
    ours, undisturbed = (
        load_zero_weights(out / "fault/good.ckpt"),
        load_zero_weights(two / "zero2-middle-32-true.ckpt"),
    )
    assert all(torch.equal(weight, undisturbed[name]) for name, weight in ours.items())


def test_a_rank_that_dies_ends_the_run(spec):
    """The other rank fails before its timeout, and the run is not marked as finished."""
    out, codes, log = start(spec, "zero2-dies", ["zero2:kill_in_step:32-true"])
    assert codes[0] not in (0, -9) and codes[1] == -9, log
    assert not (out / "zero2-32-true/hf").exists()
    assert latest_valid_checkpoint(out / "fault") == out / "fault/good.ckpt"


def test_a_rank_that_stalls_ends_the_run_after_the_timeout(spec):
    """Under ZeRO too, where DeepSpeed creates its own process groups."""
    out, codes, log = start(spec, "stalls", ["zero2:stall_in_step:32-true"], timeout_minutes=0.5)
    assert codes[0] not in (0, -9), log
    assert not (out / "zero2-32-true/hf").exists()
    assert latest_valid_checkpoint(out / "fault") == out / "fault/good.ckpt"
