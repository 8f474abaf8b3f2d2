"""What an analysis of a finished run is, and how it is run.

An analysis says its options, `measure(run, options) -> Result`, and what reports show. `run_analysis` does the rest: it
locks the result, refuses to replace that of other options, keeps finished batches, and writes

    NAME.json                  image_attention, untrained, runs, options, and the rows of the result
    NAME.safetensors           its tensors, if any
    NAME_effects.safetensors   its effects, if any: what claims are made from (claims.py)
    NAME.partial/              finished batches, removed at the end

Imported by `probes --help`, so nothing heavy is imported here or at the top of an analysis.
"""

import inspect
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_bidir.common.cli import positional
from llava_bidir.common.errors import NothingToMeasure, UserError
from llava_bidir.common.files import exclusive_run_lock, read_json, to_json, write_files
from llava_bidir.common.imports import check_returned, is_ours, name_of
from probes.models.sites import ADAPTER, is_layer

if TYPE_CHECKING:
    from torch import Tensor

    from probes.runs.read import ProbeRun
    from probes.runs.study import StudyRuns
    from probes.score.estimate import Estimate

    from .charts import Chart, Figure

Row = dict[str, Any]
EFFECTS_SUFFIX = "_effects.safetensors"  # of a file of effects, after the name of the analysis


class Claim(NamedTuple):
    """A statement as one number: by default the effect of a run that has the claim's name.

    Args:
        sign: Sign of the number if the claim holds.
        text: A title of at most eight words, ":", and what is subtracted from what.
        between_masks: The effect "NAME@SITE" of which the claim is the difference: each other mask minus the first one,
            at this one's best layer; the text names them by {first} and {second}.
        against_tokens: At the optimum and beyond random the claim is judged by another number than the paper's: the
            effect "CLAIM@random", against random tokens.
        reads_probes: The number depends on the run's probes; else on the model alone.
        unlearned: The conclusion if it holds, but of random models as much.
        applies: Whether the claim is made of a study with these runs of the trained model, by mask; None: always.
    """

    sign: int
    text: str
    between_masks: str = ""
    against_tokens: bool = False
    reads_probes: bool = True
    unlearned: str = "not learned"
    applies: Callable[[Mapping[str, "ProbeRun"]], bool] | None = None


class PlannedRun(NamedTuple):
    """A run of a study before it is made: what its config and options say."""

    name: str
    mask: str
    sites: list[str]  # to be probed
    model_sites: list[str]  # all sites of the model
    has_llm: bool = True  # False for a bare vision encoder


def lacks_layers(run: PlannedRun) -> str:
    """Return which of the adapter and all decoder layers a run will have no probes at; "" if none."""
    needed = [site for site in run.model_sites if site == ADAPTER or is_layer(site)]
    missing = [site for site in needed if site not in run.sites]
    if not missing:
        return ""
    sites = ", ".join(missing[:2])
    if len(missing) > 2:
        sites += f" and {len(missing) - 2} more"
    return f"no probes at {sites}; it reads the adapter and every decoder layer (model.sites)"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of an analysis of a run.

    Args:
        probes: Folder of a finished probe run.
        out: Output folder (default: the run's folder).
        overwrite: Replace a result that other options or runs have made.
        trust: Run the code of a run's model, FILE.py:FUNCTION or a mask of its own; read it first.
    """

    probes: Path = positional()
    out: Path | None = None
    overwrite: bool = False
    trust: bool = False

    @property
    def folder(self) -> Path:
        """Folder of the result."""
        return self.out or self.probes

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on, beside the run, as JSON has it."""
        settings = asdict(self)
        for name in ("probes", "out", "overwrite", "trust"):
            del settings[name]
        return json.loads(json.dumps(settings, default=str))


class Result(NamedTuple):
    """What an analysis has measured of a run.

    Args:
        rows: Entries of NAME.json.
        tensors: Content of NAME.safetensors.
        effects: By name, under the resamplings of `run.weights`, which all runs on the same images share.
    """

    rows: Mapping[str, Any]
    tensors: Mapping[str, "Tensor"] = {}
    effects: Mapping[str, "Estimate"] = {}


@dataclass(frozen=True)
class Analysis:
    """An analysis of finished runs: what the command line, studies, the report and the README say about it.

    One of a file of your own is registered by :func:`probes.register_analysis`.

    Args:
        name: Name of its command and of its files, an identifier.
        question: The question that it answers.
        help: What the command does.
        options: Dataclass of its options, a kind of :class:`RunOptions`.
        measure: Returns the result of a run. Without it there is no command: the report measures it.
        complete: Returns the options with what is their default for a run; raises a UserError if they do not fit it.
        lines: Returns what the command prints of NAME.json.
        title: Heading of its section in the report; "" for none.
        table: Returns the rows of the section's table from NAME.json.
        figure: Returns the section's chart from NAME.json.
        section: Returns the section of a study, in place of table and figure: a function, or "module:function", which
            is imported when a report is made.
        paper: Where the paper has it.
        in_study: Options that have other defaults in a study; `--add` sets others.
        arms: The arms of a study that it is run on; that of a user's with claims also on those these are compared with.
        default: It runs unasked.
        reads: Analyses before it whose results it reads where there are some.
        of_encoders: It can be run on a bare vision encoder, too.
        of_any_task: It can be run on probes of any task, not of segmentation only.
        every_task: A study runs it on the runs of its other tasks, too.
        beside_data: Options with the file that stands beside the folder of the data, and what it contains; the
            analysis does not run without them.
        claims: What is claimed about its numbers, by name: effects of the result, which the report judges in three
            columns (probes/report/claims.py).
        rows: Returns rows of the study's table from NAME.json.
        lacks: Returns why it cannot be run on a planned run with its options in a study, "" if it can. A study then
            leaves it out before any work.
    """

    name: str
    question: str = ""
    help: str = ""
    options: type[RunOptions] = RunOptions
    measure: Callable[["ProbeRun", Any], Result] | None = None
    complete: Callable[["ProbeRun", Any], Any] = lambda run, options: options
    lines: Callable[[dict[str, Any]], Iterable[str]] = lambda results: ()
    title: str = ""
    table: Callable[[dict[str, Any]], Iterable[Row]] | None = None
    figure: Callable[[dict[str, Any]], "Chart"] | None = None
    section: Callable[["StudyRuns"], "Section"] | str = ""
    paper: str = ""
    in_study: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] = ("trained",)
    default: bool = False
    reads: tuple[str, ...] = ()
    of_encoders: bool = False
    of_any_task: bool = False
    every_task: bool = False
    beside_data: Mapping[str, tuple[str, bytes]] = field(default_factory=dict)
    claims: Mapping[str, Claim] = field(default_factory=dict)
    rows: Callable[[dict[str, Any]], Iterator[Row]] = lambda results: iter(())
    lacks: Callable[[PlannedRun, Mapping[str, Any]], str] = lambda run, options: ""

    @property
    def result(self) -> str:
        """The file that says that it is done."""
        return f"{self.name}.json"

    @property
    def file(self) -> Path | None:
        """The file of a user's that it is in; None of ours."""
        if is_ours(self.measure):
            return None
        return Path(inspect.getfile(self.measure))

    def section_of(self, study: "StudyRuns") -> "Section":
        """Return what it adds to the report of a study; by default its table and its figure under each mask.

        Raises:
            UserError: A function of a user's returned something else.
        """
        make = self.section or self._section_of_results
        if isinstance(make, str):
            make = resolve_name(make)
        return check_returned(make, make(study), Section)

    def _section_of_results(self, study: "StudyRuns") -> "Section":
        from .charts import Chart, Figure

        results = {
            mask: study.solved.get(mask, run).analysis(self.result)
            for mask, run in study.main_runs.items()
        }
        figures = []
        for mask, of_run in results.items():
            if not (of_run and (self.figure or self.table)):
                continue
            charts = []
            if self.figure:
                charts.append(check_returned(self.figure, self.figure(of_run), Chart))
            shown = Figure(
                name=f"{self.name}_{mask}",
                title=f"{self.title}, {mask}",
                caption="",
                panels=charts,
                rows=[*self.table(of_run)] if self.table else (),
                shows_rows=True,
            )
            figures.append(shown)
        return Section(figures, by_mask={self.name: results})

    def why_left_out(self, run: PlannedRun, options: Mapping[str, Any]) -> str:
        """Return why a study leaves the analysis of this run out, "" if it does not."""
        if not (self.of_encoders or run.has_llm):
            return "the model is a vision encoder, and it needs an LLM"
        return self.lacks(run, options)

    def in_batches(
        self,
        run: "ProbeRun",
        options: RunOptions,
        items: Sequence,
        size: int,
        compute: Callable[[Sequence], dict[str, "Tensor"]],
    ) -> dict[str, "Tensor"]:
        """Return compute(items[:size]), compute(items[size : 2 * size]), ... concatenated.

        Finished batches are kept in NAME.partial, so that a killed analysis resumes after the last one. `compute` must
        depend on nothing but the run and the options.
        """
        import torch
        from tqdm import tqdm

        from probes.runs.files import read_tensors

        folder = options.folder / f"{self.name}.partial"
        file = folder / "made_from.json"
        made_from = _made_from(run, options)
        if not (file.is_file() and json.loads(file.read_text()) == made_from):
            shutil.rmtree(folder, ignore_errors=True)
            write_files({file: made_from})
        parts: dict[str, list[Tensor]] = {}
        for start in tqdm(range(0, len(items), size), desc=self.name, mininterval=5):
            path = folder / f"{start // size:06d}.safetensors"
            try:
                batch = read_tensors(path)
            except (FileNotFoundError, ValueError):  # not computed yet, or damaged since
                write_files({path: compute(items[start : start + size])})
                batch = read_tensors(path)
            for key, value in batch.items():
                parts.setdefault(key, []).append(value)
        return {key: torch.cat(values) for key, values in parts.items()}


def run_analysis(analysis: Analysis, options: RunOptions) -> None:
    """Measure a finished run, write the files named above, and print what the analysis says of them.

    The same call resumes after a kill, and makes the same files again.

    Raises:
        UserError: The options do not fit the run, or the result of other options or runs may not be replaced.
        NothingToMeasure: The run has no case.
    """
    from probes.runs.read import ProbeRun

    run = ProbeRun(options.probes, trust=options.trust)
    if not analysis.of_any_task:
        run.check_classes()
    if not (run.has_llm or analysis.of_encoders):
        raise UserError(
            f"{run.path} is of a vision encoder, and probes {analysis.name} needs an LLM; probes maps, umap, segment "
            "and lab read encoders, and `mllm.states(pixels, knockout=...)` blocks patches"
        )
    options = analysis.complete(run, options)
    with exclusive_run_lock(options.folder, analysis.result):
        file = options.folder / analysis.result
        partial = options.folder / f"{analysis.name}.partial"
        if file.is_file() and not options.overwrite:
            _check_made_from(file, _made_from(run, options))
        try:
            result = analysis.measure(run, options)
        except NothingToMeasure:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        check_returned(analysis.measure, result, Result)
        header = {key: run.metrics[key] for key in ("image_attention", "untrained")}
        results = header | _made_from(run, options) | result.rows
        try:
            to_json(results)
        except TypeError as error:
            raise UserError(f"the rows of {name_of(analysis.measure)}: {error}") from None
        files: dict[Path, Any] = {}
        if result.tensors:
            files[file.with_suffix(".safetensors")] = result.tensors
        if result.effects:
            files |= effects_files(
                run, analysis=analysis.name, effects=result.effects, folder=options.folder
            )
        write_files(files | {file: results})
        shutil.rmtree(partial, ignore_errors=True)
    for line in analysis.lines(results):
        print(line)
    print(file)


def effects_files(
    run: "ProbeRun", analysis: str, effects: Mapping[str, "Estimate"], folder: Path
) -> dict[Path, Any]:
    """Return the content of the file of effects of an analysis, by its path.

    Raises:
        UserError: An effect is no estimate, or has another number of resamplings than the run's weights.
    """
    from probes.score.effects import effect_file

    for name, estimate in effects.items():
        resampled = getattr(estimate, "resampled", ())
        if len(resampled) != len(run.weights):
            raise UserError(
                f"effect {name!r} of {analysis} is a {type(estimate).__name__} with {len(resampled)} resamplings; "
                f"expected a probes.Estimate with {len(run.weights)}, one for each row of run.weights"
            )
    return {folder / f"{analysis}{EFFECTS_SUFFIX}": effect_file(effects, run.fingerprint)}


def _made_from(run: "ProbeRun", options: RunOptions) -> dict[str, Any]:
    return {"runs": [run.fingerprint], "options": options.settings}


def _check_made_from(file: Path, made_from: dict[str, Any]) -> None:
    """Raise a UserError if a finished result was made with other options or from other runs."""
    results = read_json(file)
    advice = "--overwrite true replaces it, --out DIR writes elsewhere"
    if results.get("runs") != made_from["runs"]:
        raise UserError(f"{file} is finished and was made from other runs; {advice}")
    for name, value in made_from["options"].items():
        finished_with = results["options"].get(name)
        if finished_with != value:
            text = json.dumps(finished_with)
            raise UserError(f"{file} is finished and was made with {name} {text}; {advice}")


class Section(NamedTuple):
    """What an analysis adds to the page, the files and results.json of a study."""

    figures: Iterable["Figure"] = ()
    sentences: Iterable[str] = ()
    tables: Mapping[str, list[Row]] = {}  # CSV files by name
    results: Mapping[str, Any] = {}  # entries of results.json
    # entries of results.json["masks"][MASK], by key and mask
    by_mask: Mapping[str, Mapping[str, Any]] = {}


def table_row(
    site: str | None,
    metric: str,
    value: float | None,
    interval: list | None = None,
    **more: str | float,
) -> Row:
    """Return a row of a study's table."""
    low, high = interval or (None, None)
    return {"site": site, "metric": metric, "value": value, "low": low, "high": high} | more


def check_images(images: Sequence[int], count: int) -> None:
    """Raise a UserError if an image is not one of the split's `count`."""
    for image in images:
        if image >= count:
            raise UserError(f"image {image} is out of range; the split has images 0..{count - 1}")
