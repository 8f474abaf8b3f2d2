"""Where solved probes are computed: one process needs torch only, and has the same results as one of Lightning."""

import os
import sys

import own_modules
import pytest
import solving
import torch
from processes import run_command
from safetensors.torch import load_file

from probes.cli import main
from probes.compute import machine
from probes.compute.machine import Machine, build_machine, device_of_one_process

RUN = """
import sys
from probes.cli import main
main(sys.argv[1:])
print("loaded:", *{name.partition(".")[0] for name in sys.modules})
"""
HEAVY = {"lightning", "deepspeed", "tensorboard", "umap"}


@pytest.fixture
def cpu(monkeypatch):
    """A machine without GPUs, and processes without a launcher."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in machine.COUNT_VARIABLES:
        monkeypatch.delenv(name, raising=False)


DDP = {"devices": "1", "num_nodes": 1, "strategy": "ddp", "precision": 32}


@pytest.mark.parametrize("options", [DDP, {"max_epochs": -1, "precision": "bf16-mixed"}])
def test_one_process_is_torchs(options, cpu):
    machine = build_machine(options)
    assert machine.fabric is None
    assert machine.device == torch.device("cpu")
    with machine.forward_context():
        assert torch.is_autocast_enabled("cpu") == ("bf16" in str(options["precision"]))


@pytest.mark.parametrize("options", [{"devices": 2}, {"num_nodes": 2}, {"accelerator": "gpu"}])
def test_several_processes_and_other_devices_are_fabrics(options, cpu):
    assert device_of_one_process(options) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logger": "CSVLogger"}, "trainer.logger has no meaning for solved probes"),
        ({"precision": "64-true"}, "must be 32-true or bf16-mixed, got 64-true"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message, cpu):
    with pytest.raises(ValueError, match=message):
        build_machine(options)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_processes_of_a_launcher_are_fabrics(variable, cpu, monkeypatch):
    monkeypatch.setenv(variable, "2")
    assert device_of_one_process({"devices": 1}) is None
    monkeypatch.setenv(variable, "1")
    assert device_of_one_process({"devices": 1}) is not None


def test_all_gpus_of_a_machine_are_used(cpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count in (1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        first_device = device_of_one_process({})
        assert first_device == (torch.device("cuda", 0) if count == 1 else None)
        assert device_of_one_process({"devices": 1}).type == "cuda"
        assert device_of_one_process({"accelerator": "cpu"}).type == "cpu"


def test_both_machines_solve_the_same_probes_to_the_last_bit(
    checkpoints, segmentation, tmp_path, monkeypatch, caplog
):
    """And each knows the run of the other as its own."""
    own, other = (
        solving.arguments(checkpoints["causal"], segmentation, tmp_path / name)
        for name in ("torch", "fabric")
    )
    main(own)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "device_of_one_process", lambda options: None)
        start = Machine.processes
        used = []
        patch.setattr(Machine, "processes", lambda self: used.append(self) or start(self))
        main(other)
    assert len(used) == 1 and used[0].fabric is not None
    for name in ("probes", "counts", "effects"):
        files = [load_file(tmp_path / kind / f"{name}.safetensors") for kind in ("torch", "fabric")]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(x, files[1][key]) for key, x in files[0].items()), name
    main([*other, "--ckpt_path", "last"])
    assert "this run is finished; nothing to do" in caplog.text


@pytest.mark.slow
def test_a_study_runs_without_lightning(segmentation, tmp_path):
    """Imports that wait in functions, too: of probes that are solved, their analyses and the report."""
    words = ["study", f"{own_modules.__file__}:build", segmentation, "--out", tmp_path / "study"]
    words += "--folds 2 --strengths 1e-1 --arms trained random0 --trainer.accelerator cpu".split()
    words += ["--model.sites", "[layer_00,layer_03]"]
    done = run_command([sys.executable, "-c", RUN, *words], env=os.environ | {"COLUMNS": "80"})
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert "torch" in loaded and (tmp_path / "study/report/index.html").is_file()
    assert not HEAVY & loaded
