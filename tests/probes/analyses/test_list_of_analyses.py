"""The list of analyses."""

from pathlib import Path

from probes import analyses
from probes.analyses import ANALYSES, NAMES

README = Path(analyses.__file__).with_name("README.md")


def test_every_folder_is_in_the_list():
    assert (
        {file.parent.name for file in README.parent.glob("*/__init__.py")} | {"sinks"}
        == set(NAMES)
        == set(ANALYSES)
    )
