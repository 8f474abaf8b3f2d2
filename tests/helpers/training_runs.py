"""Trainings from Python; start of ddp_script.py on several processes, and what its runs return."""

import json
import shutil
import sys
from pathlib import Path
from runpy import run_path

import tiny_models
import torch
from lightning import Trainer
from processes import run_ranks
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.data.datamodule import InstructionData
from llava_bidir.model.build import build_processor

WORKER = Path(__file__).with_name("ddp_script.py")
LLMS = {  # changes of an LLM's config
    "dropout_llm": {"attention_dropout": 0.2},
    "tied_llm": {"tie_word_embeddings": True},
}
HEAD = "lm_head.weight"


def make_data(folder, parts, **settings) -> InstructionData:
    """Return the conversations in a folder, two of them a micro-batch and four a step."""
    defaults = {
        "batch_size": 4,
        "micro_batch_size": 2,
        "num_workers": 0,
        "image_tokens": tiny_models.TOKENS,
    }
    return InstructionData(
        f"{folder}/data.json", str(folder), processor=build_processor(*parts), **defaults | settings
    )


def make_trainer(folder, **settings) -> Trainer:
    """Return the trainer of an epoch on one CPU, which logs and saves nothing."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**defaults | settings)


def points(run: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    """Return step and value of each point of a metric in the run's TensorBoard."""
    return [(x.step, x.value) for x in EventAccumulator(str(run)).Reload().Scalars(tag)]


def write_spec(root: Path) -> dict[str, str]:
    """Write models and data: 2 of 12 conversations have no image, and 9 questions do not divide by 2."""
    encoder, llm = tiny_models.write_parts(root)
    for name, changes in LLMS.items():
        shutil.copytree(llm, root / name)
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | changes))
    weights = load_file(root / "tied_llm/model.safetensors")
    del weights[HEAD]
    save_file(weights, root / "tied_llm/model.safetensors", {"format": "pt"})
    data = tiny_models.write_conversations(root / "data")
    questions = json.loads((data / "data.json").read_text())[3:]
    (data / "questions.json").write_text(json.dumps(questions))
    paths = {"root": root, "encoder": encoder.path, "llm": llm, "conversations": data}
    paths |= {name: root / name for name in LLMS}
    return {key: str(path) for key, path in paths.items()}


def start(
    spec: dict, name: str, runs: list[str], processes: int = 2, must_pass: bool = True, **more
):
    """Execute runs of the worker; return the folder, and exit codes and output of the processes, which must pass."""
    out = Path(spec["root"]) / name
    out.mkdir()
    settings = spec | {"out": str(out), "processes": processes} | more
    (out / "spec.json").write_text(json.dumps(settings))

    def execute() -> None:
        sys.argv = [str(WORKER), str(out / "spec.json"), *runs]
        run_path(sys.argv[0], run_name="__main__")

    codes, log = run_ranks(execute, out, processes)
    assert codes == [0] * processes or not must_pass, log
    return out, codes, log


def result(folder: Path, run: str, rank: int = 0) -> dict:
    """Load the result of a rank in a run."""
    return torch.load(folder / f"{run}.{rank}.pt")


def results(folder: Path, run: str) -> list[dict]:
    return [result(folder, run, rank) for rank in (0, 1)]


def together(ranks: list[dict]) -> list[tuple]:
    """Return samples and loss of each micro-batch of two processes in the order of one."""
    pairs = zip(*(rank["losses"] for rank in ranks), strict=True)
    return [micro_batch for pair in pairs for micro_batch in pair]


def assert_same_losses(actual: list[tuple], expected: list[tuple], tolerance: float) -> None:
    assert [ids for ids, _ in actual] == [ids for ids, _ in expected]
    losses = [[loss for _, loss in run] for run in (actual, expected)]
    torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)


def assert_same_weights(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, actual[name]), name


def read_export(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of an exported model in the dtype in which they are written."""
    return LlavaBidirForConditionalGeneration.from_pretrained(folder, dtype="auto").state_dict()
