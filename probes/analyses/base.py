"""What an analysis is: a folder here, and its name in the list of `__init__.py`.

__init__.py   its options, a dataclass, and ANALYSIS, a description; they import nothing heavy
run.py        run(options): the command
section.py    section(study): what the report shows, for analyses with a title
README.md     question, method, controls, limits
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_bidir.common.errors import UserError
from probes.models.sites import ADAPTER, is_layer

if TYPE_CHECKING:  # this module answers `probes --help`
    from probes.runs.finished_run import FinishedRun

    from .style import ReportFigure

Row = dict[str, Any]


class Claim(NamedTuple):
    """A statement as one number: by default the effect of a run that has the claim's name.

    Args:
        sign: Sign of the number if the claim holds.
        text: The statement, ":", and what the number is.
        name: Name in figures.
        between_masks: The effect "NAME@SITE" of which the claim is the difference: bidirectional minus causal, at the
            causal run's best layer.
        against_tokens: At the optimum and beyond random the claim is judged by another number than the paper's: the
            effect "CLAIM@random", against random tokens.
        reads_probes: The number depends on the run's probes; else on the model alone.
        unlearned: The conclusion if it holds, but of random models as much.
        applies: Whether the claim is made of a study with these runs of the trained model, by mask; None: always.
    """

    sign: int
    text: str
    name: str
    between_masks: str = ""
    against_tokens: bool = False
    reads_probes: bool = True
    unlearned: str = "not learned"
    applies: Callable[[Mapping[str, "FinishedRun"]], bool] | None = None


class PlannedRun(NamedTuple):
    """A run of a study before it is made: what its config and options say."""

    name: str
    mask: str
    sites: list[str]  # to be probed
    model_sites: list[str]  # all sites of the model
    has_llm: bool = True  # False for a bare vision encoder


def lacks_nothing(runs: Sequence[PlannedRun], options: Mapping[str, Any]) -> str:
    """Return "": an analysis that can be run on any run."""
    return ""


def lacks_layers(run: PlannedRun) -> str:
    """Return which of the adapter and all decoder layers a run will have no probes at; "" if none."""
    needed = [site for site in run.model_sites if site == ADAPTER or is_layer(site)]
    missing = [site for site in needed if site not in run.sites]
    if not missing:
        return ""
    rest = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
    return f"no probes at {', '.join(missing[:2])}{rest}; it reads the adapter and every decoder layer (model.sites)"


@dataclass(frozen=True)
class Analysis:
    """An analysis of finished runs: what the command line, studies, the report and the README say about it.

    Args:
        help: What the command does.
        question: The question that it answers.
        options: Dataclass of its options (llava_bidir/common/cli.py), of which `run` takes an instance.
        result: The file that it writes: into the run's folder; of a pair, into that of the second run.
        title: Heading of its section in the report; "" for none.
        paper: Where the paper has it.
        of: What one command reads: a "run", or a "pair" of two models.
        in_study: Options that have other defaults in a study; `--add` sets others.
        arms: The arms of a study that it is run on.
        default: It runs unasked.
        beside_data: Options with the file that stands beside the folder of the data, and what it contains; the
            analysis does not run without them.
        claims: What the paper claims about its numbers, by name; the report judges it (probes/report/claims.py).
        rows: Returns rows of the study's table from its result.
        reads: Analyses before it whose results it reads where there are some.
        of_encoders: It can be run on a bare vision encoder, too.
        lacks: Returns why it cannot be run on planned runs with its options in a study, "" if it can. A study then
            leaves it out before any work.
    """

    help: str
    question: str
    options: type
    result: str
    title: str = ""
    paper: str = ""
    of: str = "run"
    in_study: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] = ("trained",)
    default: bool = False
    reads: tuple[str, ...] = ()
    of_encoders: bool = False
    beside_data: Mapping[str, tuple[str, bytes]] = field(default_factory=dict)
    claims: Mapping[str, Claim] = field(default_factory=dict)
    rows: Callable[[dict[str, Any]], Iterator[Row]] = lambda result: iter(())
    lacks: Callable[[Sequence[PlannedRun], Mapping[str, Any]], str] = lacks_nothing

    def why_left_out(self, runs: Sequence[PlannedRun], options: Mapping[str, Any]) -> str:
        """Return why a study leaves the analysis of these runs out, "" if it does not."""
        if not self.of_encoders and not all(run.has_llm for run in runs):
            return "the model is a vision encoder, and it needs an LLM"
        return self.lacks(runs, options)


def check_has_llm(run: "FinishedRun", command: str) -> None:
    """Raise a UserError if a run is of a bare vision encoder, for a command that needs an LLM."""
    if not run.has_llm:
        raise UserError(
            f"{run.path} is of a vision encoder, and probes {command} needs an LLM; probes maps, umap, segment and lab "
            "read encoders, and `mllm.states(pixels, knockout=...)` blocks patches"
        )


class Section(NamedTuple):
    """What an analysis adds to the page, the files and results.json of a study."""

    figures: Iterable["ReportFigure"] = ()
    sentences: Iterable[str] = ()
    tables: Mapping[str, list[Row]] = {}  # CSV files by name
    shown: Mapping[str, list[dict[str, str]]] = {}  # tables of text on the page, by caption
    results: Mapping[str, Any] = {}  # entries of results.json
    # entries of results.json["masks"][MASK], by key and mask
    by_mask: Mapping[str, Mapping[str, Any]] = {}


def function_of(name: str, module: str) -> Callable:
    """Return the function `module` of the module of that name in an analysis, "run" or "section"."""
    return getattr(import_module(f"{__package__}.{name}.{module}"), module)


def table_row(
    site: str | None,
    metric: str,
    value: float | None,
    interval: list | None = None,
    **more: str | float,
) -> Row:
    """Return a row of a study's table."""
    low, high = interval or (None, None)
    return {
        "site": site,
        "metric": metric,
        "value": value,
        "low": low,
        "high": high,
    } | more


def check_image(image: int, images: int) -> None:
    """Raise a UserError if there is no image of that index."""
    if not 0 <= image < images:
        raise UserError(f"image {image} is out of range; the split has images 0..{images - 1}")
