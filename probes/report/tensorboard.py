"""The report's figures for TensorBoard: OUT/tensorboard, beside which the runs' own curves and projectors show up."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from probes.report.figures.style import ReportFigure


def write_events(pictures: Iterable[tuple[str, ReportFigure]], folder: Path) -> None:
    """Writes every figure of (study, picture) as an image "study: section/name" into an event file, the only one in
    `folder`: one more would show each figure twice.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(folder) as board:
        for study, picture in pictures:
            board.add_figure(f"{study}: {picture.section}/{picture.name}", picture.drawn.figure, close=False)
