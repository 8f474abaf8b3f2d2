"""Steps are done once, and again if what they were made from has changed."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from llava_bidir.common.errors import NothingToMeasure, UserError, one_line_errors
from llava_bidir.common.runs import interrupt_says_how_to_resume
from probes.steps.record import Outcome, Step, must_replace, read_record
from probes.steps.runner import command_now, find_missing, run_steps
from probes.worlds.steps import run_commands


def chain(folder: Path, optional: bool = False) -> list[Step]:
    """Return three trainings: b reads the model of a, and c that of b."""
    source = folder / "data.json"
    steps = []
    for name in "abc":
        step = Step(
            name,
            ("llava-bidir", "fit", "--name", name, "--ckpt_path", "last"),
            folder / name / "model",
            kind="fit",
            reads={source.name: source},
            takes_overwrite=True,
            optional=optional,
        )
        source = step.result
        steps.append(step)
    return steps


@dataclass(frozen=True)
class Options:
    """Options of a call, as studies have them."""

    out: Path
    names: list[str]


def write(step: Step) -> None:
    """Write the result of a step from what it reads."""
    step.result.parent.mkdir(exist_ok=True)
    text = "".join(source.read_text() for source in step.reads.values())
    step.result.write_text(f"{text} made")


def failing(error: Exception, name: str = ""):
    """Return a function that runs steps, of which one, or each, fails."""

    def run(step: Step) -> None:
        if name in ("", step.name):
            raise error
        write(step)

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "data.json").write_text("first")
    return tmp_path


def run(steps: list[Step], folder: Path) -> list[str]:
    """Run what is missing, and return the names of these steps."""
    missing = find_missing(steps, folder)
    run_steps(missing, folder, write)
    return [step.name for step in missing]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "data.json").write_text("second"), ["a", "b", "c"]),
        (lambda folder: (folder / "b/model").unlink(), ["b", "c"]),
        (lambda folder: (folder / "b/model").write_text("of another program"), ["b", "c"]),
        (lambda folder: (folder / "steps/c.json").unlink(), ["c"]),
        (lambda folder: (folder / "data.json").touch(), []),
    ],
)
def test_what_was_made_from_something_changed_is_made_again(change, expected, folder):
    steps = chain(folder)
    run(steps, folder)
    change(folder)
    assert run(steps, folder) == expected


def test_an_option_that_is_new_since_the_step_was_done_is_named(folder, capsys):
    step = Step("a", {"draws": 1}, folder / "a/model", kind="x")
    run([step], folder)
    newer = replace(step, config={"draws": 1, "prefix": ""})
    assert find_missing([newer], folder) == [newer]
    assert "prefix was None" in capsys.readouterr().out


@pytest.mark.parametrize("spelled", [Path, os.path.relpath])
def test_work_that_was_moved_or_copied_is_done(spelled, tmp_path, monkeypatch):
    """A copy of a finished demo was trained again: records had absolute paths."""
    monkeypatch.chdir(tmp_path)

    def steps(out: Path) -> list[Step]:
        out = Path(spelled(out))
        words = ("--out", f"{out}/b", "--data", f"{out}/data", "--same", "name", "--of", "/model")
        configs = {"b": words, "c": Options(out / "b", [f"{out}/a"])}
        result = out / "b/result"
        return [Step(name, config, result, kind="x") for name, config in configs.items()]

    out = tmp_path / "first/demo"
    out.mkdir(parents=True)
    for logs in ("logs", ""):  # of the demo, and of a study
        run_steps(steps(out), Path(spelled(out)) / logs, write)
        assert "first" not in (out / logs / "steps/b.json").read_text()
        shutil.copytree(out, tmp_path / "second/other", dirs_exist_ok=True)
        copy = tmp_path / "second/other"
        assert find_missing(steps(copy), Path(spelled(copy)) / logs) == []
    other = replace(steps(out)[0], config=("--out", "/elsewhere"))
    assert find_missing([other], out) == [other], "a path outside of the folder is an option"


def test_a_result_is_replaced_if_its_inputs_have_changed_and_else_resumed(folder):
    """A training that was killed has no record, and must go on from its checkpoint."""
    step, *_ = chain(folder)
    assert command_now(step, folder) == list(step.config)
    step.result.parent.mkdir()
    step.result.write_text("made, and killed before the record was written")
    assert command_now(step, folder) == list(step.config)
    run([step], folder)
    assert command_now(step, folder) == list(step.config)
    (folder / "data.json").write_text("second")
    replaced = ["llava-bidir", "fit", "--name", "a", "--overwrite", "true"]
    assert command_now(step, folder) == replaced
    (folder / "data.json").write_text("first")
    assert command_now(step, folder) == list(step.config)
    assert must_replace(step, folder, overwrite=True)


def test_an_input_that_changes_while_a_step_runs_was_not_read(folder):
    """As an arm that another job finishes while a report is written."""
    step, *_ = chain(folder)

    def run_beside_another_job(step: Step) -> None:
        write(step)
        (folder / "data.json").write_text("second")

    run_steps([step], folder, run_beside_another_job)
    assert find_missing([step], folder) == [step]


def test_a_failed_step_and_one_that_is_left_out_keep_no_result_of_other_inputs(folder):
    step, *_ = chain(folder, optional=True)
    run([step], folder)
    (folder / "data.json").write_text("second")
    run_steps([step], folder, failing(RuntimeError("no memory")))
    assert "--overwrite" in command_now(step, folder), "the next call replaces the earlier result"
    run([step], folder)
    (folder / "data.json").write_text("third")
    run_steps([step], folder, failing(NothingToMeasure("no case")))
    assert not step.result.exists()


def test_a_result_of_other_options_is_replaced_on_no_try_unless_it_is_asked_for(folder):
    """A study's second call replaced what the first one had refused to."""
    step, *_ = chain(folder, optional=True)
    run([step], folder)
    other = replace(step, config=("llava-bidir", "fit", "--name", "other"))
    refuse = failing(UserError("made with other options; --overwrite true replaces it"))
    for data in ("first", "first", "second"):
        (folder / "data.json").write_text(data)
        run_steps(find_missing([other], folder), folder, refuse)
        assert command_now(other, folder) == list(other.config)
    assert "--overwrite" in command_now(step, folder), "its own options, of other inputs"


def test_an_error_ends_the_work_unless_the_step_is_optional(folder):
    with pytest.raises(RuntimeError, match="a bug"):
        run_steps(chain(folder), folder, failing(RuntimeError("a bug"), "b"))
    steps = chain(folder, optional=True)
    missing = find_missing(steps, folder)
    assert [step.name for step in missing] == ["b", "c"]
    log = folder / "log"
    (failed,) = run_steps(missing, folder, failing(RuntimeError("a bug"), "c"), log=log)
    assert failed == f"c: RuntimeError: a bug (traceback in {log})"
    assert "Traceback" in log.read_text()
    assert find_missing(steps, folder) == steps[2:], "it is tried again"


def test_a_step_is_left_out_with_the_one_that_it_follows(folder):
    trained = Step("trained", ("knockout",), folder / "result", kind="knockout")
    steps = [trained, replace(trained, name="random0", follows="trained")]
    run_steps(steps, folder, failing(NothingToMeasure("no image has a wrong patch"), "trained"))
    assert not trained.result.exists()
    record = read_record("random0", folder)
    assert record.outcome is Outcome.LEFT_OUT and record.reason.startswith("so was trained")
    assert find_missing(steps, folder) == []


def test_steps_of_another_process_are_recorded_one_by_one(folder):
    """As after a kill: what was finished is not done again."""
    steps = chain(folder)

    def main(words: list[str]) -> None:
        assert words[-2:] == ["--import", "mine.py"]
        if "b" in words:
            raise SystemExit("llava-bidir: no memory")
        write(steps[0])

    with pytest.raises(SystemExit, match="no memory"):
        imports = ["--import", "mine.py"]
        run_commands(steps, folder=folder, imports=imports, programs={"llava-bidir": main})
    assert find_missing(steps, folder) == steps[1:]


def test_ctrl_c_advises_the_same_command(folder, capsys):
    """A study advised `--ckpt_path last`, which it does not have."""

    def interrupted(step: Step) -> None:
        with interrupt_says_how_to_resume():
            raise KeyboardInterrupt

    with pytest.raises(SystemExit), one_line_errors("probes", ["study"]):
        run_steps(chain(folder), folder, interrupted)
    said = capsys.readouterr().err
    assert said == "probes: interrupted; run the same command again to go on\n"
