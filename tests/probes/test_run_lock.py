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
    "knockout --probes RUN --classes sky": "knockout.json",
    "sinks --probes RUN": "sinks.json",
    "umap --probes RUN": "umap.json",
    "maps --probes RUN": "maps.json",
    "segment --probes RUN IMAGE --out RUN": "legend.json",
    "report STUDY --out RUN": "",
    "states nowhere IMAGE --out RUN/states.safetensors": "states.safetensors",
    "fit -c configs/demo/probes.yaml --model.mllm nowhere --data.root DATA --out RUN": "",
}


@pytest.fixture
def paths(tmp_path) -> dict[str, str]:
    """Runs without a model: a rejected command has not loaded one."""
    root = tiny_models.write_segmentation(tmp_path / "data")
    quality = [0.5, 0.4, 0.5, 0.6, 0.6]
    run = probe_runs.write_run(
        tmp_path / "study/run",
        quality,
        root=root,
        images=5,
    )
    probe_runs.write_run(
        tmp_path / "study/other",
        quality,
        root=root,
        images=5,
        mask="bidirectional",
    )
    image = root / "images/validation/000.png"
    return {
        "RUN": str(run),
        "STUDY": str(tmp_path / "study"),
        "DATA": str(root),
        "IMAGE": str(image),
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
        with pytest.raises(
            SystemExit,
            match=rf"{run / COMMANDS[command]} is in use by another process",
        ):
            main(argv(command, paths))
        assert set(run.rglob("*")) == before


@pytest.mark.parametrize("command", [*COMMANDS][-3:])
def test_read_only_folder_is_an_error_before_a_model_is_loaded(command, paths, tmp_path):
    with small_disks.mounted(tmp_path / "disk", "size=1m") as disk:
        subprocess.run(["cp", "-r", paths["RUN"], disk / "run"], check=True)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(SystemExit, match=r"\S+run: Read-only file system"):
            main(argv(command, paths | {"RUN": str(disk / "run")}))
