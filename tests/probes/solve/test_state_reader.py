"""States of all images on the disk: `probes solve --disk-gb`."""

import errno
import logging
import os

import pytest
import torch
from run_bytes import run_bytes
from solving import arguments

from probes.cli import main
from probes.site_probes import SiteProbes
from probes.solve.by_passes import PassSolver
from probes.solve.state_reader import StateFile

CPU = torch.device("cpu")
# two sites of six images, of which four have their states in memory
PASSES = ["--model.sites", "[encoder, adapter]", "--sample-images", "4", "--passes", "3"]
BYTES = ("probes.safetensors", "effects.safetensors", "counts.safetensors")


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """Return a list to which each forward adds its number of images."""
    counted = []
    original = SiteProbes.states

    def count(self, batch):
        counted.append(len(batch["index"]))
        return original(self, batch)

    monkeypatch.setattr(SiteProbes, "states", count)
    return counted


@pytest.fixture
def command(checkpoints, segmentation, tmp_path):
    """Return the options of a run of three passes in a folder of the test."""

    def make(out: str, *more: str) -> list[str]:
        return arguments(checkpoints["causal"], segmentation, tmp_path / out, *PASSES, *more)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("can_reserve", [True, False])
def test_states_come_back_to_the_last_bit(tmp_path, dtype, can_reserve, monkeypatch):
    """Batches of any order and size, sites of different shapes and dtypes, numbers that are not finite."""
    if not can_reserve:  # as on macOS
        monkeypatch.delattr(os, "posix_fallocate")
    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(5, 6, 3, generator=generator)
    adapter = torch.randn(5, 4, 7, generator=generator).to(dtype)
    adapter[2, 0, 0] = torch.inf
    names = [11, 3, 7, 40, 5]  # indices of the images
    file = StateFile(tmp_path / "made", sorted(names))
    assert not file.has([11])
    for rows in ([3, 0], [4, 1, 2]):
        file.write([names[i] for i in rows], {"encoder": encoder[rows], "adapter": adapter[rows]})
    file.write([6], {"encoder": encoder[:1], "adapter": adapter[:1]})  # of another process
    assert not file.has([6])
    assert file.has(names)
    assert not file.has([11, 12])
    for rows in ([2, 4, 0], [1], [3, 0, 1, 2, 4]):
        states = file.read([names[i] for i in rows], CPU)
        assert list(states) == ["encoder", "adapter"]
        assert torch.equal(states["encoder"], encoder[rows])
        assert torch.equal(states["adapter"], adapter[rows])
        assert states["adapter"].dtype == dtype
    assert not list((tmp_path / "made").iterdir()), "the file has no name"


def test_a_process_without_images_keeps_none(tmp_path):
    """It has looked at those of others before the first pass."""
    file = StateFile(tmp_path, [])
    file.write([3], {"encoder": torch.zeros(1, 2, 2)})
    assert not file.has([3])


def test_later_passes_run_no_model_and_give_the_same_bytes(command, forwards, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    main(command("model"))
    every_pass = sum(forwards)
    forwards.clear()
    main(command("disk", "--disk-gb", "1"))
    assert every_pass == 4 * 6 + 5, "three passes, before them a look at the same six images"
    assert sum(forwards) == 6 + 5, "and the validation images"
    expected = run_bytes(tmp_path / "model")
    ours = run_bytes(tmp_path / "disk")
    for name in BYTES:
        assert ours[name] == expected[name], name
    assert not (tmp_path / "disk/checkpoints").exists()


def test_states_that_are_too_large_are_computed_in_every_pass(command, forwards):
    main(command("model"))
    every_pass = sum(forwards)
    forwards.clear()
    main(command("small", "--disk-gb", "1e-6"))
    assert sum(forwards) == every_pass


def test_a_killed_run_leaves_no_file_and_resumes_to_the_same_bytes(
    command, forwards, tmp_path, monkeypatch
):
    """A resumed run has no first pass: the model runs once more, in the pass that was killed."""
    main(command("model"))
    expected = run_bytes(tmp_path / "model")
    original = PassSolver._refine

    def refine(self) -> None:
        if self.passes == 2:
            raise KeyboardInterrupt
        original(self)

    killed = command("killed", "--disk-gb", "1")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(PassSolver, "_refine", refine)
        main(killed)
    left = [path.name for path in (tmp_path / "killed/checkpoints").iterdir()]
    assert left == ["passes.safetensors"]
    forwards.clear()
    main([*killed, "--ckpt_path", "last"])
    assert sum(forwards) == 6 + 5, "the third pass, and the validation images"
    ours = run_bytes(tmp_path / "killed")
    for name in BYTES:
        assert ours[name] == expected[name], name


def test_a_full_disk_is_an_error_before_the_first_step(command, monkeypatch):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SystemExit, match="does not have; choose fewer --model.sites"):
        main(command("full", "--disk-gb", "1"))
