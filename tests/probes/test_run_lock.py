"""One process at a time writes a result: the second is told who it is, and a killed one keeps nobody out."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import probe_runs
import pytest
import small_disks
import tiny_models

from llava_bidir.common.run_lock import exclusive_run_lock
from probes.cli import main

ROOT = Path(__file__).parents[2]
HOLDER = """
import os, sys, time
from pathlib import Path
from llava_bidir.common.run_lock import exclusive_run_lock
with exclusive_run_lock(Path(sys.argv[1]), sys.argv[2]):
    if "with a worker" in sys.argv and os.fork() == 0:
        time.sleep(60)  # as a worker of a data loader, which outlives its parent for a while
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""
COMMANDS = {  # command -> what it holds
    "knockout --probes RUN --classes sky": "knockout.json",
    "starvation --probes RUN OTHER --out RUN": "starvation.json",
    "umap --probes RUN": "umap.json",
    "maps --probes RUN": "maps.json",
    "explore RUN OTHER --images 0 --out RUN": "explorer.html",
    "report RUN OTHER --out RUN": "",
    "states nowhere IMAGE --out RUN/states.safetensors": "states.safetensors",
    "fit -c configs/demo/probes.yaml --model.mllm nowhere --data.root DATA --out RUN": "",
}


@pytest.fixture
def holding():
    """Starts processes that hold a result; ends them."""
    started = []

    def hold(folder: Path, result: str = "", *more: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(folder), result, *more]
        holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(holder)
        holder.held_by = int(holder.stdout.readline())
        return holder

    yield hold
    for holder in started:
        holder.kill()
        holder.wait()


@pytest.fixture
def places(tmp_path) -> dict[str, str]:
    """Runs that need no model: a command that is refused has not loaded one."""
    root, quality = tiny_models.write_segmentation(tmp_path / "data"), [0.5, 0.4, 0.5, 0.6, 0.6]
    run = probe_runs.write_run(tmp_path / "run", quality, root=root, images=5)
    other = probe_runs.write_run(tmp_path / "other", quality, root=root, images=5, mask="bidirectional")
    image = root / "images/validation/000.png"
    return {"RUN": str(run), "OTHER": str(other), "DATA": str(root), "IMAGE": str(image)}


def argv(command: str, places: dict[str, str]) -> list[str]:
    for name, path in places.items():
        command = command.replace(name, path)
    return command.split()


def listing(folder: str) -> set[Path]:
    return set(Path(folder).rglob("*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_second_writer_is_told_who_the_first_is(command, places, holding):
    holder = holding(Path(places["RUN"]), COMMANDS[command])
    before = listing(places["RUN"])
    what = rf"{Path(places['RUN']) / COMMANDS[command]} is in use by process {holder.held_by} on \S+ since 20"
    with pytest.raises(SystemExit, match=what):
        main(argv(command, places))
    assert listing(places["RUN"]) == before


def test_other_results_of_the_same_run_may_be_written_at_once(tmp_path, holding):
    holding(tmp_path, "knockout.json")
    with exclusive_run_lock(tmp_path, "umap.json"), exclusive_run_lock(tmp_path):
        pass


def test_killed_process_keeps_nobody_out_though_its_workers_live(tmp_path, holding):
    holder = holding(tmp_path, "umap.json", "with a worker")
    os.kill(holder.held_by, signal.SIGKILL)
    holder.wait()
    with exclusive_run_lock(tmp_path, "umap.json"):
        pass
    assert not list(tmp_path.iterdir()), "nor does the next one leave anything"


@pytest.mark.parametrize("command", COMMANDS)
def test_read_only_folder_is_an_error_before_a_model_is_loaded(command, places, tmp_path):
    with small_disks.mounted(tmp_path / "disk", "size=1m") as disk:
        subprocess.run(["cp", "-r", places["RUN"], disk / "run"], check=True)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(SystemExit, match=r"cannot write to folder \S+run: Read-only file system; choose"):
            main(argv(command, places | {"RUN": str(disk / "run")}))
