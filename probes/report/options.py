"""Options of `probes report`. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path

from llava_bidir.common.options import positional


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `probes report`.

    Args:
        runs: Studies, or finished probe runs, one per model, dataset and mask, and their controls; NAME=RUN names the
            model.
        out: Folder for index.html, results.json, *.csv, *.png and *.pdf.
        tasks: Runs of other tasks than segmentation, and their controls with random weights; NAME=RUN names the model.
        timings: Log with lines "start end step", to report the wall time.
    """

    runs: tuple[str, ...] = positional()
    out: Path
    tasks: tuple[str, ...] = ()
    timings: Path | None = None
