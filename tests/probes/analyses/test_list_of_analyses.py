"""The list of analyses, and what is generated from it."""

from pathlib import Path

import pytest

from probes import analyses
from probes.analyses import ANALYSES, NAMES
from probes.analyses.base import function_of

README = Path(analyses.__file__).with_name("README.md")


def test_the_table_of_the_readme_is_that_of_the_list():
    rows = [
        f"| [`{name}`]({name}/README.md) | {analysis.question} | {analysis.paper or '–'} |"
        for name, analysis in ANALYSES.items()
    ]
    lines = README.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("| [`")] == rows


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
