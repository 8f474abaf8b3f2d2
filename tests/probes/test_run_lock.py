"""One process at a time writes a result, in every command of `probes`; a second one names the first."""

import subprocess
from pathlib import Path

import probe_runs
import processes
import pytest
import small_disks
import tiny_models

from llava_bidir.common.files import exclusive_run_lock
from probes.cli import main

COMMANDS = {  # command -> the result it locks
    "maps --probes RUN": "maps.json",
    "segment --probes RUN IMAGE --out RUN": "legend.json",
    "report STUDY --out RUN": "",
    "states nowhere IMAGE --out RUN/states.safetensors": "states.safetensors",
    "fit -c configs/demo/probes.yaml --model.mllm MODEL --data.root DATA --out RUN": "",
}


@pytest.fixture
def paths(tmp_path) -> dict[str, str]:
    """Runs without a model: a rejected command has not loaded one, only read the config of `fit`'s."""
    root = tiny_models.write_segmentation(tmp_path / "data")
    study = tmp_path / "study"
    for mask in ("causal", "bidirectional"):
        probe_runs.write_run(study / mask, [0.5] * 5, root=root, images=5, mask=mask)
    return {
        "MODEL": str(tiny_models.write_checkpoint(tmp_path / "model")),
        "RUN": str(study / "causal"),
        "STUDY": str(study),
        "DATA": str(root),
        "IMAGE": str(root / "images/validation/000.png"),
    }


def argv(command: str, paths: dict[str, str]) -> list[str]:
    for name, path in paths.items():
        command = command.replace(name, path)
    return command.split()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_writer_is_refused(command, paths):
    run = Path(paths["RUN"])
    with processes.inside(exclusive_run_lock(run, COMMANDS[command])):
        before = set(run.rglob("*"))
        message = rf"{run / COMMANDS[command]} is in use by another process"
        with pytest.raises(SystemExit, match=message):
            main(argv(command, paths))
        assert set(run.rglob("*")) == before


@pytest.mark.parametrize("command", [*COMMANDS][-2:])
def test_read_only_folder_is_an_error_before_a_model_is_loaded(command, paths, tmp_path):
    with small_disks.mounted(tmp_path / "disk", "size=1m") as disk:
        subprocess.run(["cp", "-r", paths["RUN"], disk / "run"], check=True)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(SystemExit, match=r"\S+run: Read-only file system"):
            main(argv(command, paths | {"RUN": str(disk / "run")}))
