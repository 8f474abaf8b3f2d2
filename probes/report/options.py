"""Options of `probes report`. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path

from llava_bidir.common.cli import positional


@dataclass(
    frozen=True,
    kw_only=True,
)
class ReportOptions:
    """Options of `probes report`.

    Args:
        studies: Folders of studies; NAME=STUDY names the model. Of several models on the same photos, each is compared
            with the first.
        out: Folder for index.html, results.json, *.csv, *.pdf and *.png.
        labels: Labels of a study's models, in the order in which they are compared (default: those that the study was
            given).
    """

    studies: tuple[str, ...] = positional()
    out: Path
    labels: tuple[str, ...] = ()
