"""A run is resumed, called finished and replaced only as its identity allows; one that was interrupted ends as another.

tests/slurm has the signals of a cluster.
"""

import json
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny_models
import torch
from PIL import Image
from run_bytes import assert_same_export, run_bytes
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import points

from llava_bidir.cli import main
from llava_bidir.common.checkpoints import INTERRUPTED
from llava_bidir.common.identity import run_identity
from llava_bidir.training.cli import TrainingCLI, build_cli
from llava_bidir.training.module import LlavaTraining

# Two epochs of three steps of two micro-batches
OPTIONS = "--trainer.max_epochs 2 --data.micro_batch_size 2 --trainer.log_every_n_steps 1".split()
UNASKED = ["--data.val_annotations", "null"]
# Settings that change no result beyond rounding
HARMLESS = "--model.max_new_tokens 2 --model.attn_implementation eager --data.num_workers 1".split()
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def copied_parts(folder: Path, parts, conversations) -> list[str]:
    """Return the options of a run on copies of its models and data, which a test may change."""
    encoder, llm = parts
    data = shutil.copytree(conversations, folder / "data")
    shutil.copytree(encoder.path, folder / "encoder")
    shutil.copytree(llm, folder / "llm")
    more = f"--model.encoder.path {folder}/encoder --model.llm {folder}/llm"
    return [*tiny_models.training_arguments(parts, data), *more.split(), *OPTIONS, *UNASKED]


@pytest.fixture(scope="module")
def finished(parts, conversations, tmp_path_factory) -> tuple[Path, list[str]]:
    """Return the folder of a finished run and its command."""
    folder = tmp_path_factory.mktemp("finished")
    command = ["fit", *copied_parts(folder, parts, conversations), "--out", str(folder / "run")]
    main(command)
    return folder / "run", command


@pytest.fixture
def unfinished(finished, tmp_path) -> tuple[Path, list[str]]:
    """Return a copy of the run without its export, and the command that resumes it."""
    run, command = finished
    shutil.copytree(run / "checkpoints", tmp_path / "run/checkpoints")
    return tmp_path / "run", [*command, "--out", str(tmp_path / "run")]


def checkpoint(run: Path) -> str:
    (file,) = (run / "checkpoints").iterdir()
    return str(file)


# ---------------------------------------------------------------------------------------------------- interruption
def set_default_handlers() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def requeued(tmp_path, monkeypatch):
    """Begin with the default handlers in a job of Slurm; return the file to which a fake scontrol writes its words."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    set_default_handlers()
    script = tmp_path / "bin/scontrol"
    calls = tmp_path / "calls"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    script.chmod(0o755)
    calls.touch()
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    ranks = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0"}
    for name, value in (ranks | {"JOB_ID": "77"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def disturbed(finished, tmp_path, monkeypatch, capsys):
    """Return a function that repeats the run into tmp_path/run and calls `do` in one of its micro-batches.

    It returns the exit status, what was said, and the number of micro-batches that were trained.
    """

    def run(do=None, micro_batch: int = -1, more=()) -> tuple[int, str, int]:
        step = LlavaTraining.training_step
        trained = []

        def disturbed_step(module, batch, batch_idx):
            if len(trained) == micro_batch:
                do()
            trained.append(batch["ids"])
            return step(module, batch, batch_idx)

        status = 0
        with monkeypatch.context() as patch:
            patch.setattr(LlavaTraining, "training_step", disturbed_step)
            try:
                main([*finished[1], "--out", str(tmp_path / "run"), *more])
            except SystemExit as stop:
                status = stop.code
        return status, capsys.readouterr().err, len(trained)

    return run


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def saved_step(run: Path) -> int:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize(("number", "micro_batch"), [(signal.SIGINT, 2), (signal.SIGUSR1, 9)])
def test_a_signal_is_heeded_after_its_step_and_the_rest_equals_an_undisturbed_run(
    number, micro_batch, disturbed, requeued, finished, tmp_path
):
    status, told, trained = disturbed(lambda: send(number), micro_batch)
    run = tmp_path / "run"
    step = micro_batch // 2 + 1
    assert saved_step(run) == step
    assert trained == 2 * step
    assert not (run / "hf").exists(), "the run is not finished"
    if number == signal.SIGINT:
        advice = "run the same command again with `--ckpt_path last` to go on"
        assert told.splitlines()[-1] == f"llava-bidir: interrupted; {advice}"
    assert status == (130 if number == signal.SIGINT else INTERRUPTED)
    assert requeued.read_text() == "requeue 77\n" * (number == signal.SIGUSR1)
    set_default_handlers()  # as in a new process
    status, _, rest = disturbed(more=["--ckpt_path", "last"])
    assert (status, trained + rest) == (0, 12)
    for tag in ("train/loss", "train/grad_norm", "lr-AdamW/adapter"):
        assert points(run, tag) == points(finished[0], tag)
        assert [step for step, _ in points(run, tag)] == [0, 1, 2, 3, 4, 5], tag
    assert_same_export(run / "hf", finished[0] / "hf")
    # at exit, Python restores the default handler, which kills, of signals that are not ignored
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("has_scontrol", [True, False])
def test_a_task_of_a_job_array_is_requeued_alone_and_ends_with_a_checkpoint_without_scontrol(
    has_scontrol, disturbed, requeued, tmp_path, monkeypatch, caplog
):
    """The id of the last task is that of the array; a container has no scontrol."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    if not has_scontrol:
        monkeypatch.setenv("PATH", str(tmp_path))
    status, _, _ = disturbed(lambda: send(signal.SIGUSR1), micro_batch=2)
    assert (status, saved_step(tmp_path / "run")) == (INTERRUPTED, 2)
    assert requeued.read_text() == "requeue 77_7\n" * has_scontrol
    assert ("77_7 is not requeued" in caplog.text) is not has_scontrol


@pytest.mark.parametrize(("micro_batch", "ended"), [(5, (INTERRUPTED, 8, 4)), (11, (0, 12, 6))])
def test_a_signal_at_the_end_of_an_epoch_waits_for_the_next_step(
    micro_batch, ended, disturbed, requeued, tmp_path
):
    """A checkpoint after the last batch would count the epoch as finished in one place and not in another."""
    status, _, trained = disturbed(lambda: send(signal.SIGTERM), micro_batch)
    assert (status, trained, saved_step(tmp_path / "run")) == ended
    assert not requeued.read_text(), (
        "Slurm itself requeues a preempted job; a cancelled one must not return"
    )


def test_ctrl_c_twice_ends_the_run_at_once(disturbed, requeued, monkeypatch):
    monkeypatch.setattr(
        LlavaTraining, "on_train_batch_start", lambda *_: [send(signal.SIGINT) for _ in "ab"]
    )
    status, told, trained = disturbed()
    assert (status, trained) == (130, 0)
    assert "`--ckpt_path last` to go on" in told


def test_a_run_outside_of_the_main_thread_ends_as_usual(disturbed, requeued, tmp_path):
    """Only the main thread may set what a signal does; the run raised a ValueError after its last step."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(disturbed).result()[0] == 0
    assert (tmp_path / "run/hf/training.json").is_file()


class Killed(BaseException):
    """Ends a run at once, as SIGKILL would: nothing that is not written yet is written."""


def kill() -> None:
    raise Killed


def test_a_killed_run_ends_as_another_and_each_step_has_one_point(
    disturbed, finished, parts, conversations, tmp_path
):
    """With updates of LoRA and validation; a run killed between two saves had the steps after the first twice."""
    more = "--model.lora.r 2 --checkpoints.every_n_steps 2 --throughput.peak_tflops 1".split()
    more += ["--data.val_annotations", str(conversations / "data.json"), "--ckpt_path", "last"]
    undisturbed = tmp_path / "undisturbed"
    main([*finished[1], *more, "--out", str(undisturbed)])
    with pytest.raises(Killed):
        disturbed(kill, micro_batch=10, more=more)
    run = tmp_path / "run"
    assert saved_step(run) == 4, "inside an epoch, and one more step was logged"
    assert disturbed(more=more)[::2] == (0, 4)
    assert_same_export(run / "hf", undisturbed / "hf")
    same = "loss grad_norm supervised_tokens".split()
    timed = "samples_per_s tokens_per_s step_s mfu".split()
    for tag in ("lr-AdamW/adapter", "lr-AdamW/llm", *(f"train/{name}" for name in same + timed)):
        assert [step for step, _ in points(run, tag)] == [0, 1, 2, 3, 4, 5], tag
        assert tag.removeprefix("train/") in timed or points(run, tag) == points(undisturbed, tag)
    for tag in ("val/loss", "val/answer_accuracy"):
        assert [step for step, _ in points(run, tag)] == [2, 5]
        assert points(run, tag) == points(undisturbed, tag)
    events = EventAccumulator(str(run)).Reload()
    assert [image.step for image in events.Images("validation/images/0")] == [2, 5]
    assert points(run, "hp_metric") == [(6, points(run, "val/loss")[-1][1])]


def test_a_new_run_hides_what_one_without_a_checkpoint_has_logged(disturbed, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LlavaTraining, "on_save_checkpoint", Mock(side_effect=Killed))
        disturbed()
    assert disturbed()[0] == 0
    assert [step for step, _ in points(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("micro_batch", [8, 9])
def test_on_exception_checkpoint_is_resumed_exactly_or_refused(
    micro_batch, disturbed, finished, tmp_path
):
    """It was an AttributeError, and a checkpoint within a step lacks the gradients of the step's beginning."""
    more = "--trainer.callbacks+=OnExceptionCheckpoint --trainer.callbacks.dirpath".split()
    more += [str(tmp_path / "exception")]
    with pytest.raises(Killed):
        disturbed(kill, micro_batch, more)
    resuming = [*more, "--ckpt_path", str(tmp_path / "exception/on_exception.ckpt")]
    status, _, trained = disturbed(more=resuming)
    if micro_batch % 2:
        assert "saved within a step, " in status and "; resume another one" in status
        return
    assert (status, trained) == (0, 4)
    assert_same_weights(tmp_path / "run/hf", finished[0] / "hf")


def assert_same_weights(one: Path, other: Path) -> None:
    weights, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.equal(expected[name]), name


# ---------------------------------------------------------------------------------------------------- identity
def replace_answers(folder: Path) -> None:
    file = folder / "data/data.json"
    records = json.loads(file.read_text())
    records[0]["conversations"][1]["value"] = "another answer"
    file.write_text(json.dumps(records))


def replace_picture(folder: Path) -> None:
    file = sorted((folder / "data/pictures").iterdir())[0]
    Image.new("RGB", (5, 5)).save(file)


def replace_encoder(folder: Path) -> None:
    file = folder / "encoder/model.safetensors"
    weights = {name: weight + 1 for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


def replace_llm_config(folder: Path) -> None:
    file = folder / "llm/config.json"
    config = json.loads(file.read_text()) | {"rms_norm_eps": 0.1}
    file.write_text(json.dumps(config))


CHANGES = {  # key of the identity that changes: options, or a change of files
    "settings.model.image_attention": ["--model.image_attention", "bidirectional"],
    "settings.model.adapter_learning_rate": ["--model.adapter_learning_rate", "0.5"],
    "settings.data.micro_batch_size": ["--data.micro_batch_size", "4"],
    "settings.trainer.max_epochs": ["--trainer.max_epochs", "3"],
    "settings.trainer.precision": ["--trainer.precision", "bf16-mixed"],
    "data.annotations": replace_answers,
    "data.images": replace_picture,
    "model.encoder/model.safetensors": replace_encoder,
    "model.llm/config.json": replace_llm_config,
}


def identity(options: list[str]) -> dict[str, object]:
    """Return the identity of a run with these options by "SECTION.KEY"."""
    cli = build_cli(options, run=False)
    made_from = run_identity(cli.trainer, cli.model, cli.datamodule)
    return {
        f"{section}.{key}": value
        for section, entries in made_from.items()
        for key, value in entries.items()
    }


def test_a_change_of_settings_data_or_models_changes_its_key_of_the_identity_and_no_other(
    parts, conversations, tmp_path
):
    options = copied_parts(tmp_path, parts, conversations)
    before = identity(options)
    assert identity([*options, *HARMLESS]) == before
    for key, change in CHANGES.items():
        if callable(change):
            change(tmp_path)
            after = identity(options)
        else:
            after = identity([*options, *change])
        different = {name for name in before | after if before.get(name) != after.get(name)}
        assert different == {key}
        if callable(change):
            before = after


LENGTHS = "trainer.max_epochs=2, but this run has 3; resume with the original setting"
IMAGES = r"data.images='10, sha256 \w{16}', .*'10, sha256 \w{16}'"


@pytest.mark.parametrize(
    ("key", "message"), [("settings.trainer.max_epochs", LENGTHS), ("data.images", IMAGES)]
)
def test_a_run_of_another_identity_is_neither_resumed_nor_called_finished(
    key, message, finished, unfinished, parts, conversations, tmp_path
):
    run, command = finished
    copy, resuming = unfinished
    before = run_bytes(run)
    options = CHANGES[key]
    if callable(options):
        options = copied_parts(tmp_path / "copies", parts, conversations)
        CHANGES[key](tmp_path / "copies")
    for words, source in ((command, r"\S*json"), (resuming, "the checkpoint")):
        expected = f"^llava-bidir: {source} belongs to a run with {message}"
        with pytest.raises(SystemExit, match=expected):
            main([*words, *options, "--ckpt_path", "last"])
    assert not (copy / "hf").exists()
    assert not (copy / "config.yaml").exists()
    assert run_bytes(run) == before


def test_a_finished_run_has_nothing_to_do_also_with_settings_that_change_no_result(
    finished, caplog
):
    with caplog.at_level("INFO"):
        main([*finished[1], *HARMLESS, "--ckpt_path", "last"])
    assert "this run is finished; nothing to do" in caplog.text


def test_a_run_is_trained_on_from_its_export(unfinished, tmp_path, caplog):
    """Here with a rate of 0, after which its weights are those of the export."""
    run, command = unfinished
    export = tmp_path / "exported"
    main(["export", str(run), str(export)])
    options = f"--model.adapter {export} --model.llm {export} --model.learning_rate 0"
    options += f" --model.adapter_learning_rate 0 --trainer.max_steps 1 --out {tmp_path}/new"
    with caplog.at_level("INFO"):
        main([*command, *options.split()])
    assert f"{export} is a llava, whose LLM is taken; its encoder and adapter" in caplog.text
    assert_same_weights(tmp_path / "new/hf", export)


def test_a_checkpoint_is_validated_as_the_model_that_it_is_of(
    finished, parts, conversations, tmp_path
):
    run, _ = finished
    options = [*copied_parts(tmp_path, parts, conversations), "--ckpt_path", checkpoint(run)]
    options += ["--data.val_annotations", str(tmp_path / "data/data.json")]
    command = ["validate", *options, "--out", str(tmp_path / "run")]
    main([*command, "--model.learning_rate", "0.5"])
    with pytest.raises(SystemExit, match="belongs to a run with model.image_attention='causal'"):
        main([*command, "--model.image_attention", "bidirectional"])
    replace_encoder(tmp_path)
    with pytest.raises(SystemExit, match="belongs to a run with model.encoder/model.safetensors="):
        main(command)


def test_stage_2_refuses_an_adapter_of_another_encoder(finished, parts, conversations, tmp_path):
    """Of the same shape, as CLIP's and DINOv2's are."""
    run, _ = finished
    command = ["fit", *copied_parts(tmp_path, parts, conversations), "--out", str(tmp_path / "run")]
    command += ["--model.adapter", str(run / "hf")]
    replace_encoder(tmp_path)
    with pytest.raises(SystemExit, match="was trained with another encoder .*safetensors differs"):
        main(command)
    assert not (tmp_path / "run/hf").exists()


# ---------------------------------------------------------------------------------------------------- refusals
REFUSED = {  # options: message
    "--trainer.fast_dev_run true": "fast_dev_run must be False, got .*; for a trial, use",
    "--trainer.accumulate_grad_batches 3": "accumulate_grad_batches must be 1, got 3: it follows",
    "--ckpt_path last --overwrite true": "give one of them",
    "--trainer.max_epochs 0": "trainer.max_epochs is 0, so nothing would be trained",
    "--trainer.max_steps 0": "trainer.max_steps is 0, so nothing would be trained",
    "--trainer.limit_train_batches 0": "trainer.limit_train_batches is 0, so nothing",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_contradict_each_other_or_the_record_are_refused(
    options, parts, conversations, tmp_path
):
    """A trial would count as finished; micro-batches follow from the data's sizes."""
    with pytest.raises(SystemExit, match=REFUSED[options]):
        tiny_models.fit(parts, conversations, tmp_path / "run", *options.split())
    assert not (tmp_path / "run/hf").exists()


@pytest.mark.parametrize("words", [[], ["--ckpt_path", "last"]])
@pytest.mark.parametrize("command", ["validate", "test"])
def test_the_last_checkpoint_of_the_run_is_validated_if_there_is_one(
    command, words, finished, tmp_path, monkeypatch
):
    """The weights before training were validated as if they were the last ones."""
    run, (_, *options) = finished
    scored = Mock()
    monkeypatch.setattr(TrainingCLI, command, scored, raising=False)
    main([command, *options, *words])
    assert scored.call_args.kwargs["ckpt_path"] == run / "checkpoints/last.ckpt"
    with pytest.raises(SystemExit, match="there is no checkpoint in .*run/checkpoints"):
        main([command, *options, *words, "--out", str(tmp_path / "run")])


def test_an_llm_is_trained_with_a_new_adapter_only_if_that_is_said(finished, tmp_path):
    """A forgotten `--model.adapter` trained from a random one, without a word."""
    command = [*finished[1], "--out", str(tmp_path / "run")]
    given = command.index("--model.adapter")
    del command[given : given + 2]
    with pytest.raises(SystemExit, match="model.adapter is not given, .* `--model.adapter null`"):
        main(command)
    assert not (tmp_path / "run").exists()
    assert build_cli(command[1:], run=False).model.hparams.adapter is None, "as of verify-data"
    with pytest.raises(SystemExit, match="/nowhere"):  # an adapter alone
        main([*command, "--model.trainable", "[adapter]", "--model.llm", "/nowhere"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"a finished run \(hf/training.json\); add `--ckpt_path last`.*`--overwrite true`"),
        (["--overwrite", "true", "--model.adapter", "/nowhere"], "/nowhere"),
    ],
)
def test_repeating_a_command_changes_no_byte_of_a_finished_run(finished, options, message):
    run, command = finished
    before = run_bytes(run)
    with pytest.raises(SystemExit, match=message):
        main([*command, *options])
    assert run_bytes(run) == before


def test_a_run_that_replaces_another_and_is_killed_is_not_finished(
    finished, unfinished, monkeypatch
):
    folder, command = unfinished
    with pytest.raises(SystemExit, match="run holds an unfinished run .checkpoints/"):
        main(command)
    shutil.copytree(finished[0] / "hf", folder / "hf")
    with monkeypatch.context() as patch:
        export = "llava_bidir.training.read_checkpoint.export_hf"
        patch.setattr(export, lambda *args, **kwargs: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            main([*command, "--overwrite", "true"])
    assert not (folder / "hf").exists()
    assert checkpoint(folder), "one of the new run, none of the other"
    main([*command, "--ckpt_path", "last"])
    assert_same_export(folder / "hf", finished[0] / "hf")
