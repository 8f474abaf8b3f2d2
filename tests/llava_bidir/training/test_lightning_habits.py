"""What a user of LightningCLI types: it works, or one sentence says what there is instead."""

import csv
import json

import probe_runs
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from llava_bidir.cli import main
from llava_bidir.training.module import LlavaTraining

KEYS = {  # of a config: the option that is wrong, and the end of the error
    "optimizer: {class_path: Adam}": ("optimizer", ""),
    "modelx: {learning_rate: 1}": ("modelx.learning_rate", "; did you mean 'model.learning_rate'?"),
    "model: {learning_rate: fast}": ("model.learning_rate", "Got value: fast"),
}


@pytest.fixture
def usage_error(parts, conversations, tmp_path, capsys):
    """Return a function that runs `fit` with more words and returns the lines of its usage error."""

    def run(*words: str) -> list[str]:
        with pytest.raises(SystemExit) as stop:
            tiny_models.fit(parts, conversations, tmp_path / "run", *words)
        assert stop.value.code == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err.strip().splitlines()

    return run


@pytest.mark.parametrize("text", KEYS)
def test_an_error_in_a_config_names_the_option_and_what_was_meant(text, usage_error, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    (error,) = usage_error("-c", str(file))
    option, end = KEYS[text]
    assert error.startswith("llava-bidir fit: ")
    assert option in error
    assert error.endswith(f"{end} (see --help)")


def test_csv_logger_has_each_step(parts, conversations, tmp_path):
    more = "--trainer.logger CSVLogger --trainer.log_every_n_steps 1".split()
    more += ["--trainer.logger.save_dir", str(tmp_path / "logs")]
    tiny_models.fit(parts, conversations, tmp_path / "run", *more)
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as stream:
        rows = [*csv.DictReader(stream)]
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1", "2"]


def test_a_run_without_a_logger_trains(parts, conversations, tmp_path):
    """LearningRateMonitor refused it."""
    run = tiny_models.fit(parts, conversations, tmp_path / "run", "--trainer.logger", "false")
    assert (run / "hf/training.json").is_file()
    assert not [*run.glob("events*")]


# ---------------------------------------------------------------------------------------------------- callbacks
SCHEDULER = ["GradientAccumulationScheduler", "--trainer.callbacks.scheduling={0: 2}"]
REFUSED = [  # callback, its options
    SCHEDULER,
    ["BatchSizeFinder"],
    ["LearningRateFinder"],
    ["StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.1"],
    ["EMAWeightAveraging"],
]


@pytest.mark.parametrize("words", REFUSED)
def test_callbacks_that_a_run_cannot_record_or_resume_are_refused(
    words, parts, conversations, tmp_path
):
    """The scheduler trained with batches of 32, recorded 16, and its rate ended at 65% of the peak."""
    name, *options = words
    more = [f"--trainer.callbacks+={name}", *options]
    with pytest.raises(SystemExit, match=f"{name} is not supported"):
        tiny_models.fit(parts, conversations, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


VALIDATIONS = [  # three steps an epoch
    "--trainer.val_check_interval 2",
    "--trainer.check_val_every_n_epoch 2 --trainer.max_epochs 3",
    "--trainer.check_val_every_n_epoch 2",
    "--trainer.max_steps 2",
    "--trainer.val_check_interval 2 --trainer.callbacks+=ModelCheckpoint "
    "--trainer.callbacks.save_last=true --trainer.callbacks.every_n_train_steps=1",
]


@pytest.mark.parametrize("options", [VALIDATIONS[1], *VALIDATIONS[3:]])
def test_the_final_step_has_a_checkpoint(options, parts, conversations, tmp_path, caplog):
    """Lightning saves after validations, where there are any: `export RUN` wrote older weights than RUN/hf."""
    run = tiny_models.fit(parts, conversations, tmp_path / "run", *options.split())
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    training = json.loads((run / "hf/training.json").read_text())
    assert saved["global_step"] == training["steps"]
    main(["export", str(run), str(tmp_path / "exported")])
    trained = load_file(run / "hf/model.safetensors")
    for name, weight in load_file(tmp_path / "exported/model.safetensors").items():
        assert weight.equal(trained[name]), name
    with caplog.at_level("INFO"):
        words = [*options.split(), "--ckpt_path", "last"]
        tiny_models.fit(parts, conversations, tmp_path / "run", *words)
    assert "this run is finished; nothing to do" in caplog.text


@pytest.mark.parametrize("options", VALIDATIONS[:2])
def test_the_final_step_of_probes_has_a_checkpoint(options, checkpoints, segmentation, tmp_path):
    words = [*options.split(), "--data.batch_size", "2"]
    probe_runs.fit(checkpoints["causal"], segmentation, tmp_path / "run", *words)
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3 * (3 if "max_epochs" in options else 1)


EXCEPTION = "--trainer.callbacks+=OnExceptionCheckpoint --trainer.callbacks.dirpath={}"


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_on_exception_checkpoint_is_resumed_exactly_or_refused(
    micro_batch, parts, conversations, tmp_path, monkeypatch
):
    """It was an AttributeError, and a checkpoint within a step lacks the gradients of the step's beginning."""
    words = "--data.micro_batch_size 2 --data.val_annotations null".split()
    undisturbed = tiny_models.fit(parts, conversations, tmp_path / "undisturbed", *words)
    words += EXCEPTION.format(tmp_path / "exception").split()
    step = LlavaTraining.training_step

    def fails(self, batch, batch_idx):
        if batch_idx == 2 + micro_batch:
            raise MemoryError
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(LlavaTraining, "training_step", fails)
        tiny_models.fit(parts, conversations, tmp_path / "run", *words)
    words += ["--ckpt_path", str(tmp_path / "exception/on_exception.ckpt")]
    if micro_batch:
        with pytest.raises(SystemExit, match="saved within a step, .*; resume another one"):
            tiny_models.fit(parts, conversations, tmp_path / "run", *words)
        return
    run = tiny_models.fit(parts, conversations, tmp_path / "run", *words)
    trained = load_file(undisturbed / "hf/model.safetensors")
    for name, weight in load_file(run / "hf/model.safetensors").items():
        assert weight.equal(trained[name]), name
