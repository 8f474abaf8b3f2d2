"""Options of `probes report`. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path

from llava_bidir.common.options import positional


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `probes report`.

    Args:
        runs: Studies, or finished probe runs, one per model, dataset and mask, and their controls; NAME=STUDY and
            NAME=RUN name the model. Of several models on the same photos, each is compared with the first.
        out: Folder for index.html, results.json, *.csv, *.png and *.pdf.
        tasks: Runs of other tasks than segmentation, and their controls with random weights; NAME=RUN names the model.
        labels: Labels of a study's models, in the order in which they are compared (default: those that the study was
            given).
    """

    runs: tuple[str, ...] = positional()
    out: Path
    tasks: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
