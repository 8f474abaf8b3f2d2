"""Start of ddp_script.py on several processes, and what its runs return."""

import json
import shutil
import sys
from pathlib import Path

import tiny_models
import torch
from processes import run_ranks
from safetensors.torch import load_file, save_file

WORKER = Path(__file__).with_name("ddp_script.py")
LLMS = {  # changes of an LLM's config
    "dropout_llm": {"attention_dropout": 0.2},
    "tied_llm": {"tie_word_embeddings": True},
}
HEAD = "lm_head.weight"


def write_spec(root: Path) -> dict[str, str]:
    """Write models and data: 2 of 12 conversations have no image, and 9 questions do not divide by 2."""
    encoder, llm = tiny_models.write_parts(root)
    for name, changes in LLMS.items():
        shutil.copytree(llm, root / name)
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | changes))
    weights = load_file(root / "tied_llm/model.safetensors")
    tied = {key: tensor for key, tensor in weights.items() if key != HEAD}
    save_file(tied, root / "tied_llm/model.safetensors", {"format": "pt"})
    data = tiny_models.write_conversations(root / "data")
    questions = json.loads((data / "data.json").read_text())[3:]
    (data / "questions.json").write_text(json.dumps(questions))
    paths = {
        "root": root,
        "encoder": encoder.path,
        "llm": llm,
        "conversations": data,
    }
    paths |= {name: root / name for name in LLMS}
    return {key: str(path) for key, path in paths.items()}


def start(
    spec: dict,
    name: str,
    runs: list[str],
    processes: int = 2,
    **more,
):
    """Execute runs of the worker; return the folder, the exit codes and the output of the processes."""
    out = Path(spec["root"]) / name
    out.mkdir()
    settings = spec | {"out": str(out), "processes": processes} | more
    (out / "spec.json").write_text(json.dumps(settings))
    command = [sys.executable, str(WORKER), str(out / "spec.json"), *runs]
    return out, *run_ranks(command, out, processes)


def result(folder: Path, run: str, rank: int = 0) -> dict:
    """Load the result of a rank in a run."""
    return torch.load(folder / f"{run}.{rank}.pt")


def results(folder: Path, run: str) -> list[dict]:
    return [result(folder, run, rank) for rank in (0, 1)]
