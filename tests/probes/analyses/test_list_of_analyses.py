"""The list of analyses, and what is generated from it."""

from pathlib import Path

import pytest

from probes.analyses import ANALYSES, NAMES
from probes.analyses.__main__ import README, updated
from probes.analyses.base import function_of


def test_the_table_of_the_readme_is_that_of_the_list():
    text = README.read_text(encoding="utf-8")
    assert text == updated(text), "run python -m probes.analyses"


def test_every_folder_is_in_the_list():
    assert (
        {file.parent.name for file in README.parent.glob("*/__init__.py")}
        == set(NAMES)
        == set(ANALYSES)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_has_its_command_document_and_section(name):
    assert callable(function_of(name, "run"))
    assert (README.parent / name / "README.md").is_file()
    assert bool(ANALYSES[name].title) == Path(README.parent / name / "section.py").is_file()
    assert not ANALYSES[name].title or callable(function_of(name, "section"))
