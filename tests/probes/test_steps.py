"""Steps are done once, and again if what they were made from has changed."""

import os
import pickle
import shutil
from base64 import b85encode
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from llava_bidir.common.errors import NothingToMeasure, UserError, one_line_errors
from llava_bidir.common.runs import interrupt_says_how_to_resume
from probes.steps import (
    Step,
    command_now,
    find_missing,
    must_replace,
    read_record,
    run_steps,
)
from probes.worlds.steps import run_given


def chain(folder: Path, **options) -> list[Step]:
    """Return three trainings: b reads the model of a, and c that of b."""
    source = folder / "data.json"
    steps = []
    for name in "abc":
        words = ("llava-bidir", "fit", "--name", name, "--ckpt_path", "last")
        result = folder / name / "model"
        options |= {
            "kind": "fit",
            "reads": {source.name: source},
            "takes_overwrite": True,
        }
        steps.append(
            Step(
                name,
                words,
                result,
                **options,
            )
        )
        source = result
    return steps


@dataclass(frozen=True)
class Options:
    """Options of a call, as studies have them."""

    out: Path
    names: list[str]


class Commands(list):
    """Run a step by writing its result from what it reads, and keep the names."""

    failing: str = ""

    def __call__(self, step: Step) -> None:
        self.append(step.name)
        if step.name == self.failing:
            raise RuntimeError("a bug")
        step.result.parent.mkdir(exist_ok=True)
        (source,) = step.reads.values()
        step.result.write_text(f"{source.read_text()} {step.name}")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "data.json").write_text("first")
    return tmp_path


def run(steps: list[Step], folder: Path) -> list[str]:
    commands = Commands()
    run_steps(find_missing(steps, folder), folder, commands)
    return commands


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


@pytest.mark.parametrize("spelled", [Path, os.path.relpath])
def test_work_that_was_moved_or_copied_is_done(spelled, tmp_path, monkeypatch):
    """A copy of a finished demo was trained again: records had absolute paths."""
    monkeypatch.chdir(tmp_path)

    def steps(out: Path) -> list[Step]:
        out = Path(spelled(out))
        words = ("--out", f"{out}/b", "--data", f"{out}/data", "--same", "name", "--of", "/model")
        config = Options(out / "b", [f"{out}/a"])
        result = out / "b/result"
        return [
            Step(
                "b",
                words,
                result,
                kind="x",
            ),
            Step(
                "c",
                config,
                result,
                kind="x",
            ),
        ]

    out = tmp_path / "first/demo"
    out.mkdir(parents=True)

    def write(step: Step) -> None:
        step.result.parent.mkdir(exist_ok=True)
        step.result.write_text("made")

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
        Commands()(step)
        (folder / "data.json").write_text("second")

    run_steps([step], folder, run_beside_another_job)
    assert find_missing([step], folder) == [step]


def test_a_failed_step_and_one_that_is_left_out_keep_no_result_of_other_inputs(folder):
    step, *_ = chain(folder, optional=True)
    run([step], folder)
    (folder / "data.json").write_text("second")

    def fail(step: Step) -> None:
        raise RuntimeError("no memory")

    run_steps([step], folder, fail)
    assert "--overwrite" in command_now(step, folder), "the next call replaces the earlier result"
    run([step], folder)
    (folder / "data.json").write_text("third")

    def leave_out(step: Step) -> None:
        raise NothingToMeasure("no case")

    run_steps([step], folder, leave_out)
    assert not step.result.exists()


def test_a_result_of_other_options_is_replaced_on_no_try_unless_it_is_asked_for(folder):
    """A study's second call replaced what the first one had refused to."""
    step, *_ = chain(folder, optional=True)
    run([step], folder)
    other = Step(**vars(step) | {"config": ("llava-bidir", "fit", "--name", "other")})

    def refuse(step: Step) -> None:
        raise UserError("made with other options; --overwrite true replaces it")

    for _ in range(2):
        run_steps(find_missing([other], folder), folder, refuse)
        assert command_now(other, folder) == list(other.config)
    (folder / "data.json").write_text("second")
    run_steps(find_missing([other], folder), folder, refuse)
    assert command_now(other, folder) == list(other.config)
    assert "--overwrite" in command_now(step, folder), "its own options, of other inputs"


def test_an_error_ends_the_work_unless_the_step_is_optional(folder):
    commands = Commands()
    commands.failing = "b"
    with pytest.raises(RuntimeError, match="a bug"):
        run_steps(chain(folder), folder, commands)
    assert commands == ["a", "b"]
    assert not read_record("b", folder)
    steps = [Step(**vars(step) | {"optional": True}) for step in chain(folder)]
    log = folder / "log"
    commands = Commands()
    commands.failing = "c"
    (failed,) = run_steps(
        find_missing(steps, folder),
        folder,
        commands,
        log=log,
    )
    assert commands == ["b", "c"]
    assert failed == f"c: RuntimeError: a bug (traceback in {log})"
    assert "Traceback" in log.read_text()
    assert [step.name for step in find_missing(steps, folder)] == ["c"], "it is tried again"


def test_a_step_is_left_out_with_the_one_that_it_follows(folder):
    result = folder / "result"
    steps = [
        Step("trained", ("knockout",), result, kind="knockout",),
        Step("random0", ("knockout",), result, kind="knockout", follows="trained",),
    ]  # fmt: skip
    ran = []

    def nothing(step: Step) -> None:
        ran.append(step.name)
        raise NothingToMeasure("no image has a wrong patch")

    run_steps(steps, folder, nothing)
    assert ran == ["trained"]
    assert read_record("random0", folder)["left_out"].startswith("so was trained")
    assert find_missing(steps, folder) == []


def test_steps_of_another_process_are_recorded_one_by_one(folder):
    """As after a kill: what was finished is not done again."""
    steps = chain(folder)
    given = b85encode(pickle.dumps((folder, steps, ["--import", "mine.py"]))).decode()
    ran = []

    def main(words: list[str]) -> None:
        name = words[words.index("--name") + 1]
        ran.append(name)
        assert words[-2:] == ["--import", "mine.py"]
        if name == "b":
            raise SystemExit("llava-bidir: no memory")
        (folder / name).mkdir()
        (folder / name / "model").write_text(name)

    with pytest.raises(SystemExit, match="no memory"):
        run_given(given, {"llava-bidir": main})
    assert ran == ["a", "b"]
    assert [step.name for step in find_missing(steps, folder)] == ["b", "c"]


def test_ctrl_c_advises_the_same_command(folder, capsys):
    """A study advised `--ckpt_path last`, which it does not have."""

    def interrupted(step: Step) -> None:
        with interrupt_says_how_to_resume():
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop, one_line_errors("probes", ["study"]):
        run_steps(chain(folder), folder, interrupted)
    assert stop.value.code == 130
    said = capsys.readouterr().err
    assert said == "probes: interrupted; run the same command again to go on\n"


def test_a_step_that_is_done_again_says_why(folder, capsys):
    first, second, third = chain(folder)
    second = replace(second, config=Options(folder, ["b"]))

    def said(*steps: Step) -> str:
        find_missing(steps, folder)
        return capsys.readouterr().out

    assert said(first, second) == "", "they were never done"
    run([first, second, third], folder)
    capsys.readouterr()
    assert said(first, second, third) == ""
    other = replace(second, config=Options(folder, ["x"]))
    assert said(first, other) == "b again: names was ['b'], and is ['x']\n"
    (folder / "data.json").write_text("second")
    expected = ["a again: data.json has changed", "b again: it reads the result of a"]
    assert said(first, second).splitlines() == expected
    first.result.unlink()
    assert said(first).startswith(f"a again: {first.result} is gone")
