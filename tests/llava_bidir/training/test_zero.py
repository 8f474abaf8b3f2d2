"""ZeRO on two CPU processes: the same training as on one, exact resume, whole checkpoints, export."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch

import llava_bidir.cli
from llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.training.checkpoints import newest_whole

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed (extra: cluster) is not installed"),
]
WORKER = Path(__file__).parents[2] / "two_processes.py"
RUNS = {  # what each pair of processes does, one after the other
    "one": ["plain:32-true"],
    "ddp": ["plain:32-true"],
    "zero2": [f"{run}:{p}" for p in ("32-true", "bf16-mixed") for run in ("plain", "whole", "resumed")],
    "zero3": [f"{run}:{p}" for p in ("32-true", "bf16-mixed") for run in ("plain", "whole", "resumed")],
    "zero3_offload": ["plain:bf16-mixed"],
}
for stage in ("zero2", "zero3"):
    RUNS[stage] += ["validated:bf16-mixed"]
ZERO = [(stage, precision) for stage in ("zero2", "zero3") for precision in ("32-true", "bf16-mixed")]


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> dict:
    """Models and data of all runs: of 12 conversations 2 are without an image, and 9 questions do not halve."""
    root = tmp_path_factory.mktemp("zero")
    encoder, llm = tiny.write_parts(root)
    shutil.copytree(llm, root / "dropout_llm")
    config = json.loads((root / "dropout_llm/config.json").read_text())
    (root / "dropout_llm/config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    data = tiny.write_conversations(root / "data")
    questions = json.loads((data / "data.json").read_text())[3:]
    (data / "questions.json").write_text(json.dumps(questions))
    paths = {"encoder": encoder.path, "llm": llm, "dropout_llm": str(root / "dropout_llm"), "conversations": str(data)}
    return paths | {"root": str(root)}


@pytest.fixture(scope="module")
def results(spec):
    """results(strategy) -> folder of what its processes found; they run when first asked for."""
    done = {}

    def run(strategy: str) -> Path:
        if strategy not in done:
            processes = 1 if strategy == "one" else 2
            done[strategy], codes, log = start(spec, strategy.replace("one", "ddp"), RUNS[strategy], processes)
            assert codes == [0] * processes, log
        return done[strategy]

    return run


def start(spec: dict, strategy: str, runs: list[str], processes: int = 2, **more) -> tuple[Path, list[int], str]:
    """Runs the worker's functions; returns the folder, the exit codes, and what the processes printed."""
    out = Path(spec["root"]) / f"{strategy}-{processes}-{runs[0]}"
    out.mkdir()
    (out / "spec.json").write_text(
        json.dumps(spec | {"out": str(out), "strategy": strategy, "processes": processes} | more)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": 1, "PYTHONWARNINGS": "ignore"}
    started = []
    for rank in range(processes):
        environment = os.environ | {k: str(v) for k, v in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        log = (out / f"{rank}.log").open("w")
        command = [sys.executable, str(WORKER), str(out / "spec.json"), *runs]
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return out, codes, "\n".join((out / f"{rank}.log").read_text()[-3000:] for rank in range(processes))


def found(folder: Path, run: str, rank: int = 0) -> dict:
    return torch.load(folder / f"{run}.{rank}.pt")


# ---------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize(
    ("strategy", "precision", "tolerance"),
    [
        ("ddp", "32-true", 1e-5),
        ("zero2", "32-true", 1e-5),
        ("zero3", "32-true", 1e-5),
        ("zero2", "bf16-mixed", 2e-2),
        ("zero3", "bf16-mixed", 2e-2),
        ("zero3_offload", "bf16-mixed", 2e-2),
    ],
)
def test_two_processes_train_as_one(strategy, precision, tolerance, results):
    """Losses, gradient norm and validation; without dropout, which differs between ranks."""
    one = found(results("one"), "plain:32-true")
    ranks = [found(results(strategy), f"plain:{precision}", rank) for rank in (0, 1)]
    together = [loss for pair in zip(*(rank["losses"] for rank in ranks), strict=True) for loss in pair]
    assert [ids for ids, _ in together] == [ids for ids, _ in one["losses"]]
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close([loss for _, loss in together], [loss for _, loss in one["losses"]], **near)
    for name in ("val/loss", "val/answer_accuracy", "train/grad_norm"):
        if precision == "32-true" or name == "val/loss":
            torch.testing.assert_close(ranks[0]["metrics"][name], one["metrics"][name], **near)
    assert ranks[0]["metrics"]["val/loss"] == ranks[1]["metrics"]["val/loss"]


def test_zero3_leaves_each_process_half_of_every_parameter(results):
    """Between steps nothing is whole, and what was loaded is what ZeRO-2 loaded (test above)."""
    for rank in (0, 1):
        result = found(results("zero3"), "whole:bf16-mixed", rank)
        assert len(result["shares"]) == len([n for n in result["weights"] if "position_ids" not in n])
        for name, (here, total, share) in result["shares"].items():
            assert here == 0 and share == (total + 1) // 2, name
        assert all(w.dtype == torch.bfloat16 for w in result["weights"].values())


@pytest.mark.parametrize(("strategy", "precision"), ZERO)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(strategy, precision, results):
    """From the middle of an epoch, with dropout, and with batches that have an image on one rank only."""
    folder = results(strategy)
    whole, resumed = ([found(folder, f"{run}:{precision}", rank) for rank in (0, 1)] for run in ("whole", "resumed"))
    one_sided = [a != b for a, b in zip(whole[0]["text_only"], whole[1]["text_only"], strict=True)]
    assert any(one_sided[:4]) and any(one_sided[4:]), "text on one rank before and after the checkpoint"
    for before, after in zip(whole, resumed, strict=True):
        assert len(before["losses"]) == 12 and after["losses"] == before["losses"][4:], "two micro-batches a step"
        assert after["metrics"] == before["metrics"]
        for name, weight in before["weights"].items():
            assert torch.equal(weight, after["weights"][name]), name
    assert whole[0]["losses"][0] != found(folder, f"plain:{precision}")["losses"][0], "dropout is on"


# ---------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize(("strategy", "precision"), ZERO)
def test_export_of_a_checkpoint_equals_the_model_in_memory(strategy, precision, results, tmp_path):
    """Both ways to a directory: the callback at the end of the run, and the command on the checkpoint, here without
    the processes that wrote it."""
    folder = results(strategy)
    llava_bidir.cli.main(["export", str(folder / f"end-{precision}.ckpt"), str(tmp_path / "hf")])
    memory = found(folder, f"whole:{precision}")["weights"]
    for directory in (tmp_path / "hf", folder / precision / "hf"):
        written = LlavaBidirForConditionalGeneration.from_pretrained(directory, dtype="auto").state_dict()
        assert set(written) == set(memory)
        for name, weight in memory.items():
            assert torch.equal(weight, written[name]), name


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_validation_of_a_checkpoint_repeats_that_of_the_run(strategy, results):
    for rank in (0, 1):
        during, after = (found(results(strategy), f"{run}:bf16-mixed", rank) for run in ("whole", "validated"))
        assert after["metrics"] == {k: v for k, v in during["metrics"].items() if k.startswith("val/")}


def test_checkpoint_holds_what_trains(results):
    for strategy in ("zero2", "zero3"):
        listing = json.loads((results(strategy) / "end-bf16-mixed.ckpt/whole.json").read_text())
        assert listing["world_size"] == 2 and listing["stage"] == int(strategy[-1])
        state = next((results(strategy) / "end-bf16-mixed.ckpt/checkpoint").glob("*mp_rank_00_model_states.pt"))
        saved = torch.load(state, weights_only=False)["module"]
        assert saved and not any("vision_tower" in name for name in [*saved, *listing["trained"]])


def test_another_number_of_processes_is_refused_with_the_way_out(results, spec):
    checkpoint = str(results("zero2") / "middle-32-true.ckpt")
    out, codes, log = start(spec, "zero2", ["refused:32-true"], processes=1, resume=checkpoint)
    assert codes == [0], log
    message = found(out, "refused:32-true")["message"]
    assert "has world_size 2 and this run 1" in message and "ds_to_universal" in message


@pytest.mark.parametrize(
    ("strategy", "processes"), [("ddp", 1), ("ddp", 2), ("zero2", 1), ("zero2", 2), ("zero3", 1), ("zero3", 2)]
)
def test_resumed_on_another_number_of_processes_trains_the_same_samples(strategy, processes, results, spec):
    """Through DeepSpeed's universal checkpoint, or a plain one under DDP; to one process, and to two again."""
    checkpoint = results(strategy) / "plain-32-true.ckpt"
    if strategy != "ddp":
        universal = checkpoint.with_name(f"universal-{processes}.ckpt")
        command = "-m deepspeed.checkpoint.ds_to_universal --inject_missing_state --num_extract_workers 1"
        folders = ["--input_folder", str(checkpoint / "checkpoint"), "--output_folder", str(universal / "checkpoint")]
        subprocess.run(
            [sys.executable, *command.split(), "--num_merge_workers", "1", *folders], check=True, capture_output=True
        )
        checkpoint = universal
    out, codes, log = start(spec, strategy, ["moved:32-true"], processes, resume=str(checkpoint))
    assert codes == [0] * processes, log
    together = [
        x for group in zip(*(found(out, "moved:32-true", r)["losses"] for r in range(processes))) for x in group
    ]
    one = found(results("one"), "plain:32-true")
    assert [ids for ids, _ in together] == [ids for ids, _ in one["losses"][8:]]
    torch.testing.assert_close([x for _, x in together], [x for _, x in one["losses"][8:]], rtol=1e-5, atol=1e-5)
    for name, weight in found(out, "moved:32-true")["weights"].items():
        torch.testing.assert_close(weight, one["weights"][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trouble", ["killed", "disk_full"])
def test_interrupted_save_leaves_the_checkpoint_before_it(trouble, spec, results):
    """Rank 1 dies in the middle of writing, or finds the disk full: the run fails, nothing half-written counts, and the
    earlier checkpoint goes on to what an undisturbed run ends with."""
    out, codes, log = start(spec, "zero2", [f"{trouble}:32-true"])
    assert codes[0] != 0 and codes[1] == (-9 if trouble == "killed" else 1), log
    left = sorted(path.name for path in (out / "trouble").iterdir())
    assert left == ["bad.ckpt.partial", "good.ckpt"]
    assert newest_whole(out / "trouble") == out / "trouble/good.ckpt"
    undisturbed = results("zero2") / "middle-32-true.ckpt"
    shares = sorted((out / "trouble/good.ckpt/checkpoint").glob("*optim_states.pt"))
    assert len(shares) == 2
    for share in shares:
        ours, theirs = (
            torch.load(d / share.name, weights_only=False) for d in (share.parent, undisturbed / "checkpoint")
        )
        for a, b in zip(
            *(x["optimizer_state_dict"]["single_partition_of_fp32_groups"] for x in (ours, theirs)), strict=True
        ):
            assert torch.equal(a, b)
