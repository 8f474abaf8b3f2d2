"""CONTRIBUTING.md is carried out as it is written: each example is applied to a copy of the repository and tested.
What no longer applies, or whose test fails, fails here."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# "An encoder": its block of changes, and the command that tests them
WALKS = {
    title: (diff, command)
    for title, diff, command in re.findall(
        r"^### (.+?)\n.*?^```diff\n(.*?)^```\n.*?^```bash\n(.*?)^```", TEXT, re.M | re.S
    )
}


@pytest.fixture
def copy(tmp_path) -> Path:
    """The repository's files, changes that are not committed included, as a repository of their own."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    run(["git", "init", "-q"], tmp_path)
    return tmp_path


def run(command: list[str], folder: Path, **kwargs) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def files_of(diff: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(.+)$", diff, re.M)


def test_there_are_six_examples_each_with_a_test():
    assert list(WALKS) == ["An encoder", "A mask", "A data set", "An MLLM family", "A probe head", "An analysis"]
    for diff, command in WALKS.values():
        tests = [name for name in files_of(diff) if name.startswith("tests/")]
        assert len(tests) == 1 and len(files_of(diff)) <= 3 and command.startswith("python -m pytest tests/")


@pytest.mark.parametrize("walk", WALKS)
def test_example_applies_to_the_code_as_it_is(walk, copy):
    run(["git", "apply", "--check", "-"], copy, input=WALKS[walk][0])


@pytest.mark.slow
@pytest.mark.parametrize("walk", WALKS)
def test_example_works_as_written(walk, copy):
    diff, command = WALKS[walk]
    run(["git", "apply", "-"], copy, input=diff)
    python, *arguments = shlex.split(command)
    assert python == "python"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"OMP_NUM_THREADS": "1"}
    passed = run([sys.executable, *arguments, "-q", "-p", "no:cacheprovider"], copy, env=environment)
    assert re.search(r"^\d+ passed", passed, re.M) and "failed" not in passed
    for check in (["check"], ["format", "--check"]):
        run([sys.executable, "-m", "ruff", *check, *files_of(diff)], copy)


def test_files_that_are_named_exist():
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)
    named = set(re.findall(r"`((?:llava_bidir|probes|tests|configs|\.ci)/[\w./]*)`", prose))
    assert len(named) > 10 and all((ROOT / name).exists() for name in named), named


def test_every_promise_names_tests_that_exist():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) > 40
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"
