"""Studies as values, from the words of a command."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from probes.studies.config import StudyConfig
from probes.studies.parser import build_parser, probe_config


def study_of(
    models: Mapping[str, str | Path],
    data: str | Path,
    out: Path,
    options: Sequence[str] = (),
    **settings: Any,
) -> StudyConfig:
    """Return a study of models on a folder.

    Args:
        models: Paths by label.
        data: Folder of images and masks.
        out: Folder of the study.
        options: Words of options of the probe runs.
        **settings: Fields of `StudyOptions`.
    """
    parser = build_parser()
    paths = {label: str(path) for label, path in models.items()}
    probes = probe_config(parser, parser.read(options), str(data), paths)
    return StudyConfig(models=paths, probes=probes, out=out, **settings)
