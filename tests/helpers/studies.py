"""Studies as values, from the words of a command."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_bidir.common.cli import Parser
from probes.config import StudyOptions
from probes.studies.options import with_inputs


def study_of(
    models: Mapping[str, str | Path],
    data: str | Path,
    out: Path,
    options: Sequence[str] = (),
    **settings: Any,
) -> StudyOptions:
    """Return a study of models on a folder.

    Args:
        models: Paths by label.
        data: Folder of images and masks.
        out: Folder of the study.
        options: Words of options of the probe runs.
        **settings: Those of the study.
    """
    paths = {label: str(path) for label, path in models.items()}
    read = Parser(StudyOptions).read([*options, "--inputs=[]"], settings | {"out": out})
    return with_inputs(read, paths, str(data))
