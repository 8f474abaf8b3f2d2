"""What a user of LightningCLI types: it works, or one sentence says what there is instead."""

import csv
import shlex

import pytest
import tiny_models
from run_bytes import assert_same_export
from safetensors.torch import load_file

from llava_bidir.cli import main
from llava_bidir.training.module import LlavaTraining

KEYS = {  # of a config: the option that is wrong, and the end of the error
    "optimizer: {class_path: Adam}": ("optimizer", ""),
    "modelx: {learning_rate: 1}": ("modelx.learning_rate", "; did you mean 'model.learning_rate'?"),
    "model: {learning_rate: -1}": ("model.learning_rate", ""),
    "data: {template: llama3}": ("data.template", "Got value: llama3"),
}


@pytest.mark.parametrize("text", KEYS)
def test_an_error_in_a_config_names_the_option_and_what_was_meant(
    text, parts, conversations, tmp_path, capsys
):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit, match="^2$"):
        tiny_models.fit(parts, conversations, tmp_path / "run", "-c", str(file))
    (error,) = capsys.readouterr().err.strip().splitlines()
    option, end = KEYS[text]
    assert error.startswith("llava-bidir fit: ")
    assert option in error
    assert error.endswith(f"{end} (see --help)")
    assert not (tmp_path / "run").exists()


def test_csv_logger_has_each_step(parts, conversations, tmp_path):
    more = "--trainer.logger CSVLogger --trainer.log_every_n_steps 1".split()
    more += ["--trainer.logger.save_dir", str(tmp_path / "logs")]
    tiny_models.fit(parts, conversations, tmp_path / "run", *more)
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as stream:
        rows = [*csv.DictReader(stream)]
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1", "2"]


def test_a_run_without_a_logger_trains(parts, conversations, tmp_path):
    run = tiny_models.fit(parts, conversations, tmp_path / "run", "--trainer.logger", "false")
    assert (run / "hf/training.json").is_file()
    assert not [*run.glob("events*")]


REFUSED = {  # options: message
    "--trainer.callbacks+=GradientAccumulationScheduler --trainer.callbacks.scheduling='{0: 2}'": (
        "GradientAccumulationScheduler is not supported"
    ),
    "--trainer.callbacks+=BatchSizeFinder": "BatchSizeFinder is not supported",
    "--trainer.callbacks+=LearningRateFinder": "LearningRateFinder is not supported",
    "--trainer.callbacks+=EMAWeightAveraging": "EMAWeightAveraging is not supported",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_a_run_cannot_record_or_resume_is_refused(options, parts, conversations, tmp_path):
    """The scheduler trained with batches of 32, recorded 16, and its rate ended at 65% of the peak."""
    with pytest.raises(SystemExit, match=REFUSED[options]):
        tiny_models.fit(parts, conversations, tmp_path / "run", *shlex.split(options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        "--trainer.check_val_every_n_epoch 2 --trainer.max_epochs 3",
        "--trainer.max_steps 2",
        "--trainer.val_check_interval 2 --trainer.callbacks+=ModelCheckpoint "
        "--trainer.callbacks.save_last=true --trainer.callbacks.every_n_train_steps=1",
    ],
)
def test_the_final_step_has_a_checkpoint(options, parts, conversations, tmp_path):
    """Lightning saves after validations, where there are any: `export RUN` wrote older weights than RUN/hf."""
    run = tiny_models.fit(parts, conversations, tmp_path / "run", *options.split())
    main(["export", str(run), str(tmp_path / "exported")])
    assert_same_export(run / "hf", tmp_path / "exported")


EXCEPTION = "--trainer.callbacks+=OnExceptionCheckpoint --trainer.callbacks.dirpath={}"


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_on_exception_checkpoint_is_resumed_exactly_or_refused(
    micro_batch, parts, conversations, tmp_path, monkeypatch
):
    """It was an AttributeError, and a checkpoint within a step lacks the gradients of the step's beginning."""
    words = "--data.micro_batch_size 2 --data.val_annotations null".split()
    words += EXCEPTION.format(tmp_path / "exception").split()
    out = tmp_path / "run"
    step = LlavaTraining.training_step

    def fails(self, batch, batch_idx):
        if batch_idx == 2 + micro_batch:
            raise MemoryError
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(LlavaTraining, "training_step", fails)
        tiny_models.fit(parts, conversations, out, *words)
    resuming = [*words, "--ckpt_path", str(tmp_path / "exception/on_exception.ckpt")]
    if micro_batch:
        with pytest.raises(SystemExit, match="saved within a step, .*; resume another one"):
            tiny_models.fit(parts, conversations, out, *resuming)
        return
    tiny_models.fit(parts, conversations, out, *resuming)
    undisturbed = tiny_models.fit(parts, conversations, tmp_path / "undisturbed", *words)
    trained = load_file(undisturbed / "hf/model.safetensors")
    for name, weight in load_file(out / "hf/model.safetensors").items():
        assert weight.equal(trained[name]), name
