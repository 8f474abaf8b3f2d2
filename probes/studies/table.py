"""All results of a folder of finished runs as one tidy table, and the verdicts of its report as another."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import atomic_write
from probes.analyses import MEASURED
from probes.analyses.analysis import Row, table_row
from probes.config import ReportOptions
from probes.runs.read import ProbeRun, finished_runs
from probes.runs.study import cut_suffix, given_labels, head_suffix, labels_of_models, model_name

if TYPE_CHECKING:  # pandas takes a second to import
    from matplotlib.figure import Figure
    from pandas import DataFrame

COLUMNS = (
    "run model mask weights draw probes task dataset seed site metric value low high "
    "class condition strength"
).split()


class Study:
    """The results in a folder.

    Args:
        path: Folder of :func:`probes.study`, or any folder of finished runs.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def table(self) -> "DataFrame":
        """Return a row for each number: see README.md for the columns."""
        return read_table(self.path, given_labels(self.path))

    def claims(self) -> "DataFrame":
        """Return a row for each claim, model, mask and task: conclusion, effect with interval, what is beyond random.

        Numbers are fractions; the models are those of the page. All columns of a verdict are in report/claims.csv.

        Raises:
            UserError: There is no report yet.
        """
        from pandas import read_csv

        from probes.report.tables import by_claim

        report = self.path / "report"
        if not (report / "results.json").is_file():
            raise UserError(f"{report / 'results.json'} does not exist; the study is not finished")
        models = read_csv(report / "models.csv").set_index("key")["label"]
        claims = by_claim(read_csv(report / "claims.csv"))
        claims.insert(0, "label", claims["model"].map(models))
        return claims

    def plot(self, metric: str = "miou", task: str = "segmentation") -> "Figure":
        """Draw a metric by site: each trained model in its own colour with its intervals, the random ones in grey.

        Colours are those of the masks if the study has one model.
        """
        from .plot import plot_table

        table = self.table().query("metric == @metric and task == @task")
        runs = {path: ProbeRun(path) for path in finished_runs(self.path)}
        given = given_labels(self.path)
        names = {path: model_name(run) for path, run in runs.items()}  # as in the report
        names |= labels_of_models(self.path, runs.values(), given)
        table = table.assign(model=[names[self.path / run] for run in table["run"]])
        encoders = {names[path] for path, run in runs.items() if not run.has_llm}
        return plot_table(table, ylabel=metric, order=given, encoders=encoders)

    def _repr_html_(self) -> str:
        return self.claims().to_html(index=False, float_format="{:.3f}".format)


def read_table(folder: Path, labels: tuple[str, ...]) -> "DataFrame":
    """Return :meth:`Study.table` of a folder whose models were given these labels.

    Raises:
        UserError: There is no finished run.
    """
    from pandas import DataFrame

    runs = [ProbeRun(path) for path in finished_runs(folder)]
    if not runs:
        raise UserError(f"{folder} holds no finished run")
    names = labels_of_models(folder, runs, labels)
    rows: list[Row] = []
    for run in runs:
        rows += _rows(run, str(run.path.relative_to(folder)), model=names.get(run.path))
    return DataFrame(rows, columns=COLUMNS)


def write_table(folder: Path, labels: tuple[str, ...]) -> None:
    """Write FOLDER/table.csv and FOLDER/table.parquet, of models with these labels."""
    table = read_table(folder, labels)
    for name, write in (("table.csv", table.to_csv), ("table.parquet", table.to_parquet)):
        with atomic_write(folder / name) as file:
            write(file, index=False)


def write_report(options: ReportOptions) -> None:
    """Write the report of a study, then the table, before the report counts as done."""
    from probes.report.page import run

    run(options)
    write_table(options.out.parent, options.labels)


def _rows(run: ProbeRun, name: str, model: str | None) -> Iterator[Row]:
    """Yield the rows of a run: its scores by site, its path of strengths, and its analyses.

    Args:
        run: The run.
        name: Its folder in the study.
        model: Label of its model, if labels tell models apart.
    """
    metrics = run.metrics
    of_run = {
        "run": name,
        "model": (model or Path(metrics["mllm"]).name) + cut_suffix(run.cut),
        "mask": run.mask,
        "weights": run.arm,
        "draw": run.draw,
        "probes": run.probe_kind + head_suffix(run),
        "task": run.task_name,
        "dataset": metrics["dataset"],
        "seed": metrics["seed"],
    }
    if run.arm == "trained":
        of_run["draw"] = None
    for row in chain(_score_rows(metrics), _path_rows(run), _analysis_rows(run)):
        yield of_run | row


def _score_rows(metrics: dict[str, Any]) -> Iterator[Row]:
    """Yield the scores of each site with their intervals, and the IoU of each class."""
    for site in metrics["sites"]:
        for key, interval in site.items():
            metric = key.removesuffix("_ci95")
            if metric != key:
                yield table_row(site["site"], metric, value=site[metric], interval=interval)
        classes = zip(metrics.get("classes", ()), site.get("iou_per_class", ()), strict=False)
        for name, iou in classes:
            yield table_row(site["site"], "iou", value=iou, **{"class": name})


def _path_rows(run: ProbeRun) -> Iterator[Row]:
    """Yield the scores of a run of solved probes at each strength of regularisation that was solved."""
    if not run.is_solved:
        return
    for site in run.strengths.sites:
        for key, values in site.items():
            if key not in ("cv_cross_entropy", "cv_loss", "miou", "pacc"):
                continue
            for strength, value in zip(site["strengths"], values, strict=True):
                if value is not None:
                    yield table_row(site["site"], f"path_{key}", value=value, strength=strength)


def _analysis_rows(run: ProbeRun) -> Iterator[Row]:
    """Yield the rows of the analyses of a run."""
    for analysis in MEASURED.values():
        if result := run.analysis(analysis.result):
            yield from analysis.rows(result)
