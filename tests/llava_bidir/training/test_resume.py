"""A run resumes with the settings it was started with, or not at all."""

import json
import sys

import pytest
import tiny_models

import llava_bidir.cli


@pytest.fixture(scope="module")
def stopped(parts, conversations, tmp_path_factory):
    """Return the arguments of a run that was stopped after one of two epochs, and its checkpoint."""
    out = tmp_path_factory.mktemp("stopped")
    arguments = ["fit", *tiny_models.training_arguments(parts, conversations), "--out", str(out)]
    llava_bidir.cli.main([*arguments, "--trainer.max_epochs", "1"])
    (out / "hf").rename(out / "first")  # a finished run would be left alone
    (checkpoint,) = (out / "checkpoints").iterdir()
    return [*arguments, "--trainer.max_epochs", "2"], checkpoint


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            ["--model.image_attention", "bidirectional"],
            "model.image_attention='causal', but this run has 'bidirectional'",
        ),
        (["--model.adapter_learning_rate", "0.5"], "model.adapter_learning_rate=.*, but this run has 0.5"),
        (["--data.max_length", "100"], "data.max_length=.*, but this run has 100"),
        (["--seed_everything", "7"], "data.seed=0, but this run has 7"),
    ],
)
@pytest.mark.parametrize("path", ["last", "by name"])
def test_checkpoint_of_another_run_is_refused(stopped, changed, message, path):
    arguments, checkpoint = stopped
    path = str(checkpoint) if path == "by name" else path
    with pytest.raises(
        SystemExit, match=rf"^llava-bidir: the checkpoint belongs to a run with {message}; resume with the original"
    ):
        llava_bidir.cli.main([*arguments, *changed, "--ckpt_path", path])
    assert not (checkpoint.parents[1] / "hf").exists()


def test_settings_that_change_no_result_may_change(stopped):
    arguments, checkpoint = stopped
    changed = ["--model.max_new_tokens", "2", "--model.attn_implementation", "eager", "--data.num_workers", "1"]
    llava_bidir.cli.main([*arguments, *changed, "--ckpt_path", str(checkpoint)])
    assert (checkpoint.parents[1] / "hf").is_dir()


def test_finished_run_is_checked_for_other_settings(stopped):
    arguments, _ = stopped
    llava_bidir.cli.main([*arguments, "--ckpt_path", "last"])  # the test above may have finished the run
    with pytest.raises(SystemExit, match="hf belongs to a run with model.learning_rate=.*, but this run has 0.5"):
        llava_bidir.cli.main([*arguments, "--ckpt_path", "last", "--model.learning_rate", "0.5"])


def test_restarted_and_killed_run_is_not_finished(parts, conversations, tmp_path, monkeypatch):
    """A checkpoint newer than the exported model belongs to an unfinished run."""
    arguments = ["fit", *tiny_models.training_arguments(parts, conversations), "--out", str(tmp_path)]
    llava_bidir.cli.main([*arguments, "--trainer.max_epochs", "1"])
    first = json.loads((tmp_path / "hf/training.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr("llava_bidir.training.callbacks.export_hf", lambda *args: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            llava_bidir.cli.main([*arguments, "--trainer.max_epochs", "2"])
    assert json.loads((tmp_path / "hf/training.json").read_text()) == first
    llava_bidir.cli.main([*arguments, "--trainer.max_epochs", "2", "--ckpt_path", "last"])
    assert json.loads((tmp_path / "hf/training.json").read_text())["steps"] == 2 * first["steps"]
