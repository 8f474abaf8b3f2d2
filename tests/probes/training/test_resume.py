"""A run is gone on with as what it was, or not at all, and from the newest of its checkpoints that is whole."""

import os
from pathlib import Path

import pytest
import torch

from llava_bidir.common.checkpoint_io import find_defect, latest_valid_checkpoint, resolve_ckpt_path
from llava_bidir.common.checkpoint_io import verify_checksums as flipped_bits
from probes.cli import main

SETTINGS = ["--trainer.accelerator", "cpu", "--data.num_workers", "0", "--data.batch_size", "4"]
SETTINGS += ["--trainer.enable_progress_bar", "false", "--model.sites", "[adapter]"]


@pytest.fixture(scope="module")
def stopped(checkpoints, segmentation, tmp_path_factory):
    """Arguments of a run that was stopped after one of two epochs, and its checkpoint."""
    out = tmp_path_factory.mktemp("stopped")
    arguments = ["--model.mllm", str(checkpoints["causal"]), "--data.root", str(segmentation), "--out", str(out)]
    main(["fit", *arguments, *SETTINGS, "--trainer.max_epochs", "1"])
    (out / "metrics.json").unlink()  # a finished run would be left alone
    return [*arguments, *SETTINGS, "--trainer.max_epochs", "2"], out / "checkpoints/last.ckpt"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--model.image_attention", "bidirectional"], "model.image_attention=None, but this run has 'bidirectional'"),
        (["--model.learning_rate", "0.5"], "model.learning_rate=0.001, but this run has 0.5"),
        (["--data.batch_size", "3"], "data.batch_size=4, but this run has 3"),
        (["--seed_everything", "7"], r"(model|data).seed=0, but this run has 7"),
    ],
)
@pytest.mark.parametrize("path", ["last", "by name"])
def test_checkpoint_of_another_run_is_refused(stopped, changed, message, path):
    arguments, checkpoint = stopped
    path = str(checkpoint) if path == "by name" else path
    with pytest.raises(
        SystemExit, match=rf"^probes: the checkpoint belongs to a run with {message}; resume with the original"
    ):
        main(["fit", *arguments, *changed, "--ckpt_path", path])
    assert not (checkpoint.parents[1] / "metrics.json").exists()


def test_other_images_are_refused(stopped, segmentation, tmp_path):
    arguments, _ = stopped
    for part in ("images", "annotations"):
        for file in (segmentation / part).rglob("*.png"):
            other = tmp_path / file.relative_to(segmentation).with_stem(f"other_{file.stem}")
            other.parent.mkdir(parents=True, exist_ok=True)
            other.symlink_to(file)
    (tmp_path / "classes.json").symlink_to(segmentation / "classes.json")
    with pytest.raises(SystemExit, match="run with data.fingerprint of image and class names="):
        main(["fit", *arguments, "--data.root", str(tmp_path), "--ckpt_path", "last"])


def test_finished_run_is_not_taken_for_one_with_other_settings(stopped, tmp_path):
    arguments, _ = stopped
    arguments = ["fit", *arguments, "--trainer.max_epochs", "1", "--out", str(tmp_path)]
    main(arguments)
    written = (tmp_path / "metrics.json").stat().st_mtime_ns
    main([*arguments, "--ckpt_path", "last"])  # nothing to do
    with pytest.raises(
        SystemExit, match=r"metrics.json belongs to a run with model.learning_rate=0.001, but this run has 0.5"
    ):
        main([*arguments, "--ckpt_path", "last", "--model.learning_rate", "0.5"])
    assert (tmp_path / "metrics.json").stat().st_mtime_ns == written


def test_the_same_folder_spelled_otherwise_is_the_same(stopped, checkpoints, monkeypatch):
    arguments, checkpoint = stopped
    monkeypatch.chdir(checkpoints["causal"])
    main(["fit", *arguments, "--model.mllm", ".", "--ckpt_path", "last"])
    assert (checkpoint.parents[1] / "metrics.json").is_file()


def test_users_own_logger_takes_the_place_of_tensorboards(stopped, tmp_path):
    arguments, _ = stopped
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", str(tmp_path)]
    main(["fit", *arguments, "--trainer.max_epochs", "1", "--out", str(tmp_path / "run"), *logger])
    assert list(tmp_path.rglob("metrics.csv")) and not list(tmp_path.rglob("events*"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_last_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    """In the middle of the tensor."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [cut, cut_last_byte, empty, flip_a_bit]


@pytest.fixture
def three(tmp_path) -> list[Path]:
    """The newest last."""
    paths = [tmp_path / f"{name}.ckpt" for name in ("epoch=1", "epoch=2", "last")]
    for age, path in enumerate(paths):
        torch.save({"x": torch.rand(10_000)}, path)
        os.utime(path, (age, age))
    return paths


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_and_named(damage, three, caplog):
    assert latest_valid_checkpoint(three[0].parent) == three[-1] and not caplog.text
    times = three[-1].stat().st_mtime_ns
    damage(three[-1])
    os.utime(three[-1], ns=(times, times))
    assert find_defect(three[-1]) or flipped_bits(three[-1])
    assert resolve_ckpt_path("last", three[0].parent) == str(three[1])
    assert f"skipping checkpoint {three[-1]}" in caplog.text
    with pytest.raises(ValueError, match=rf"last.ckpt: .*The latest valid checkpoint .* is {three[1]}"):
        resolve_ckpt_path(str(three[-1]), three[0].parent)


def test_without_a_whole_one_there_is_none(three, tmp_path):
    for path in three:
        cut(path)
    assert latest_valid_checkpoint(tmp_path) is None and latest_valid_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="nothing.ckpt: no such file"):
        resolve_ckpt_path(str(tmp_path / "nothing.ckpt"), tmp_path)
    assert resolve_ckpt_path(None, tmp_path) is None
