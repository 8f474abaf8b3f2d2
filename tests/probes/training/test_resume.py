"""A run is resumed only with the settings it was started with."""

import json

import pytest

from probes.cli import main

SETTINGS = ["--trainer.accelerator", "cpu", "--data.num_workers", "0", "--data.batch_size", "4"]
SETTINGS += ["--trainer.enable_progress_bar", "false", "--model.sites", "[adapter]"]


@pytest.fixture(scope="module")
def stopped(checkpoints, segmentation, tmp_path_factory):
    """Arguments of a run that was stopped after one of two epochs, and its checkpoint."""
    out = tmp_path_factory.mktemp("stopped")
    arguments = ["--model.mllm", str(checkpoints["causal"]), "--data.root", str(segmentation), "--out", str(out)]
    main(["fit", *arguments, *SETTINGS, "--trainer.max_epochs", "1"])
    (out / "metrics.json").unlink()  # else the run counts as finished
    return [*arguments, *SETTINGS, "--trainer.max_epochs", "2"], out / "checkpoints/last.ckpt"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--model.image_attention", "bidirectional"], "model.image_attention=None.* 'bidirectional'"),
        (["--model.learning_rate", "0.5"], "model.learning_rate=0.001.* 0.5"),
        (["--data.batch_size", "3"], "data.batch_size=4.* 3"),
        (["--seed_everything", "7"], r"(model|data).seed=0.* 7"),
    ],
)
@pytest.mark.parametrize("path", ["last", "by name"])
def test_checkpoint_of_another_run_is_refused(stopped, changed, message, path):
    arguments, checkpoint = stopped
    path = str(checkpoint) if path == "by name" else path
    with pytest.raises(SystemExit, match=rf"^probes: the checkpoint .*{message}"):
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
    with pytest.raises(SystemExit, match="data.fingerprint of image and class names="):
        main(["fit", *arguments, "--data.root", str(tmp_path), "--ckpt_path", "last"])


def test_finished_run_is_left_alone_and_not_accepted_for_other_settings(stopped, tmp_path):
    arguments, _ = stopped
    arguments = ["fit", *arguments, "--trainer.max_epochs", "1", "--out", str(tmp_path)]
    main(arguments)
    written = (tmp_path / "metrics.json").stat().st_mtime_ns
    main([*arguments, "--ckpt_path", "last"])  # nothing to do
    with pytest.raises(SystemExit, match=r"metrics.json .*model.learning_rate=0.001.* 0.5"):
        main([*arguments, "--ckpt_path", "last", "--model.learning_rate", "0.5"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    config = manifest["config"]
    config |= {"image_aspect": "square", "mllm_dtype": config.pop("dtype")}
    del config["image_resize"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    main([*arguments, "--ckpt_path", "last"])  # a run of an earlier version
    assert (tmp_path / "metrics.json").stat().st_mtime_ns == written


def test_another_spelling_of_the_same_folder_is_accepted(stopped, checkpoints, monkeypatch):
    arguments, checkpoint = stopped
    monkeypatch.chdir(checkpoints["causal"])
    main(["fit", *arguments, "--model.mllm", ".", "--ckpt_path", "last"])
    assert (checkpoint.parents[1] / "metrics.json").is_file()


def test_custom_logger_replaces_tensorboard(stopped, tmp_path):
    arguments, _ = stopped
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", str(tmp_path)]
    main(["fit", *arguments, "--trainer.max_epochs", "1", "--out", str(tmp_path / "run"), *logger])
    assert list(tmp_path.rglob("metrics.csv")) and not list(tmp_path.rglob("events*"))
