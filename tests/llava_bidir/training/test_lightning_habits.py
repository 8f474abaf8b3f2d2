"""What a user of LightningCLI types: it works, or one sentence says what there is instead."""

import csv
import os
from dataclasses import replace

import pytest
import tiny_models
from run_bytes import assert_same_export

from llava_bidir.cli import main

KEYS = {  # of a config: the option that is wrong, and the end of the error
    "optimizer: {class_path: Adam}": ("optimizer", ""),
    "modelx: {learning_rate: 1}": ("modelx.learning_rate", "; did you mean 'model.learning_rate'?"),
    "model: {learning_rate: .inf}": (
        "model.learning_rate",
        "inf does not conform to restriction v>=0.0 and v<inf",
    ),
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
    more = "--trainer.logger CSVLogger --trainer.log_every_n_steps 1 --trainer.logger.save_dir"
    tiny_models.fit(parts, conversations, tmp_path / "run", *more.split(), str(tmp_path / "logs"))
    (file,) = tmp_path.rglob("metrics.csv")
    rows = [*csv.DictReader(file.read_text().splitlines())]
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1", "2"]


def test_a_run_without_a_logger_and_lines_of_progress_trains(parts, conversations, tmp_path):
    more = "--trainer.logger false --trainer.log_every_n_steps 0"
    run = tiny_models.fit(parts, conversations, tmp_path / "run", *more.split())
    assert (run / "hf/training.json").is_file()
    assert not [*run.glob("events*")]


ACCUMULATION = (
    "--trainer.callbacks+=GradientAccumulationScheduler|--trainer.callbacks.scheduling={0: 2}"
)
REFUSED = {  # words: the callback that they add, and what there is instead
    "--trainer.callbacks+=EMAWeightAveraging": "EMAWeightAveraging .* not with averages",
    ACCUMULATION: "GradientAccumulationScheduler .*; set data.batch_size",
    "--trainer.max_time=00:00:00:01": "Timer .*; set trainer.max_steps",
    "--trainer.callbacks+=LearningRateFinder": "LearningRateFinder .*; set model.learning_rate",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_run_cannot_record_or_resume_is_refused(words, parts, conversations, tmp_path):
    """The scheduler trained with batches of 32, recorded 16, and its rate ended at 65% of the peak.

    Lightning counts the epoch in which a timer stops as complete: the run was exported, and could not be resumed.
    """
    name, _, instead = REFUSED[words].partition(" ")
    with pytest.raises(SystemExit, match=f"{name} is not supported: {instead}"):
        tiny_models.fit(parts, conversations, tmp_path / "run", *words.split("|"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        "--trainer.check_val_every_n_epoch 2 --trainer.max_epochs 3",
        "--trainer.val_check_interval 2 --trainer.callbacks+=ModelCheckpoint "
        "--trainer.callbacks.save_last=true --trainer.callbacks.every_n_train_steps=1",
    ],
)
def test_the_final_step_has_a_checkpoint(options, parts, conversations, tmp_path, monkeypatch):
    """Lightning saves after validations, where there are any: `export RUN` wrote older weights than RUN/hf.

    The folder of the training may be another one than that of the export.
    """
    encoder, llm = parts
    parts = replace(encoder, path=os.path.relpath(encoder.path)), os.path.relpath(llm)
    run = tiny_models.fit(parts, conversations, tmp_path / "run", *options.split())
    monkeypatch.chdir(tmp_path)
    main(["export", str(run), "exported"])
    with pytest.raises(SystemExit, match="hf is an exported model; expected the folder of a run"):
        main(["export", "run/hf", "again"])
    assert_same_export(run / "hf", tmp_path / "exported")
