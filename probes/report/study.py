"""Group the runs of a report by model and dataset, then by attention mask, trained and untrained.

Runs of `probes solve` are "solved": their probes minimise the loss at every strength of regularisation. Runs of
`probes fit` train theirs with AdamW. Where a study has both, the page shows the trained probes and compares the solved
ones along the path of strengths; the main runs of all masks have probes of one kind. Controls have random weights:
the "untrained" one is the model before training, "random" ones are further draws of it, random adapters, and LLMs that
resemble the trained one (probes/models/random_init.py).
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llava_bidir.common.errors import UserError, error_context
from probes.analyses.starvation.run import shared_layer, starvation
from probes.results.finished_run import FinishedRun
from probes.results.probe_run import ProbeRun

Rows = list[dict[str, Any]]  # rows of a table, each a dict of its columns

MASKS = ("causal", "bidirectional")
Run = TypeVar("Run", bound=FinishedRun)

log = logging.getLogger(__name__)


@dataclass
class Study:
    """One model on one dataset; all runs by mask.

    Solved runs are also in `trained` if more masks have them than others, and in `untrained` if no other run has their
    mask there.
    """

    name: str  # of the model
    dataset: str
    seed: int | None = None  # if the report has several
    trained: dict[str, ProbeRun] = field(default_factory=dict)
    untrained: dict[str, ProbeRun] = field(default_factory=dict)
    solved: dict[str, ProbeRun] = field(default_factory=dict)
    solved_untrained: dict[str, ProbeRun] = field(default_factory=dict)
    random: dict[str, list[ProbeRun]] = field(default_factory=dict)
    solved_random: dict[str, list[ProbeRun]] = field(default_factory=dict)

    @property
    def runs(self) -> list[ProbeRun]:
        """Trained and untrained runs."""
        return [*self.trained.values(), *self.untrained.values()]

    @property
    def runs_and_solved(self) -> list[ProbeRun]:
        """All these and the solved runs, each once."""
        solved = [*self.solved.values(), *self.solved_untrained.values()]
        random = [run for kind in (self.random, self.solved_random) for runs in kind.values() for run in runs]
        return self.runs + [run for run in solved + random if run not in self.runs]

    @property
    def first(self) -> ProbeRun:
        """The first trained run, whose dataset and settings stand for the study."""
        return next(iter(self.trained.values()))

    @property
    def model(self) -> str:
        """Name of the model, with the seed if the report has several."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"

    @property
    def title(self) -> str:
        """Heading of the study on the page."""
        return f"{self.model}, {self.dataset}"

    @property
    def slug(self) -> str:
        """Folder name of the study."""
        return "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{self.model}_{self.dataset}")

    def pair(self, untrained: bool = False) -> tuple[ProbeRun, ProbeRun] | None:
        """Return the causal and the bidirectional run; None unless both exist with the same kind of probes."""
        kinds = (self.untrained, self.solved_untrained) if untrained else (self.trained, self.solved)
        for runs in kinds:
            pair = [runs[mask] for mask in MASKS if mask in runs]
            if len(pair) == 2 and pair[0].is_solved == pair[1].is_solved:
                return pair[0], pair[1]
        return None

    def control(self, mask: str) -> ProbeRun | None:
        """Return the untrained run whose probes are of the same kind as those of the trained run, None without one."""
        if self.trained[mask].is_solved:
            return self.solved_untrained.get(mask)
        run = self.untrained.get(mask)
        return None if run is None or run.is_solved else run

    def random_draws(self, part: str, solved: bool) -> list[dict[str, ProbeRun]]:
        """Return the controls with a random "adapter" or "llm": per draw, the runs by mask.

        Random LLMs are those that change the states as much as the trained one, or permuted ones if there are no such.
        """
        random, untrained = (self.solved_random, self.solved_untrained) if solved else (self.random, self.untrained)
        runs = [run for runs in random.values() for run in runs]
        if part == "adapter":  # untrained models have one, too; of the same draw it has the same weights
            runs += [run for run in untrained.values() if run.is_solved == solved]
            runs = [run for run in runs if "adapter" in run.metrics["untrained"]]
        else:
            llms = [run for run in runs if run.metrics["untrained"] == ["llm"]]
            by_match = lambda match: [run for run in llms if run.metrics["match"] == match]
            runs = by_match("update") or by_match("permuted")
        draws: dict[tuple[int, int], dict[str, ProbeRun]] = {}
        for run in runs:
            draws.setdefault((run.metrics.get("draw", 0), run.metrics["seed"]), {}).setdefault(
                run.metrics["image_attention"], run
            )
        return [draws[key] for key in sorted(draws)]

    def starvation(self, untrained: bool = False) -> dict[str, Any] | None:
        """Return the accuracy per patch under both masks; None without both runs or the causal best layer."""
        pair = self.pair(untrained)
        return starvation(*pair) if pair and shared_layer(*pair) else None

    def starvation_analysis(self) -> dict[str, Any] | None:
        """Return the results of `probes starvation` on the two runs; None without, or of another causal run."""
        causal, bidirectional = self.pair()
        found = bidirectional.analysis("starvation.json")
        if found and causal.fingerprint not in found.get("runs", [causal.fingerprint]):
            text = "%s is left out, since it compares with another run than %s; run `probes starvation` on both again"
            log.warning(text, bidirectional.path / "starvation.json", causal.path)
            return None
        return found

    def _add(self, run: ProbeRun) -> None:
        kind, mask = "untrained" if run.metrics["untrained"] else "trained", run.metrics["image_attention"]
        runs = getattr(self, {"trained": "solved", "untrained": "solved_untrained"}[kind] if run.is_solved else kind)
        other = runs.get(mask)
        if kind == "untrained" and not _is_untrained_model(run):
            self._add_random(run)
        elif other is None:
            runs[mask] = run
        elif kind == "trained" or _control_order(run) == _control_order(other):
            raise UserError(
                f"{other.path} and {run.path} are both the {kind} run under {mask!r} of {self.title}; "
                f"pass only one, or name the model of each: NAME={run.path}"
            )
        else:  # in whatever order runs are passed
            runs[mask], further = sorted((run, other), key=_control_order)
            self._add_random(further)

    def _add_random(self, run: ProbeRun) -> None:
        runs = self.solved_random if run.is_solved else self.random
        others = runs.setdefault(run.metrics["image_attention"], [])
        key = lambda run: [run.metrics.get(name) for name in ("untrained", "match", "draw", "seed")]
        if same := [other for other in others if key(other) == key(run)]:
            raise UserError(
                f"{same[0].path} and {run.path} are the same draw of random weights; pass only one, or make the other "
                f"again with another --model.draw than {run.metrics['draw']}"
            )
        others.append(run)

    def _complete(self) -> None:
        """Make solved runs the main ones if more masks have them, and sort all runs by mask, the paper's first."""
        by_gradient, self.trained = self.trained, max(self.trained, self.solved, key=len)
        left_out = [run for mask, run in self.solved.items() if mask not in self.trained]
        for run in [*left_out, *(by_gradient.values() if self.trained is self.solved else ())]:
            kinds = ("solved", "trained") if run.is_solved else ("trained", "solved")
            text = "%s is left out of curves and claims: its probes were %s, those of another mask of %s only %s"
            log.warning(text, run.path, kinds[0], self.title, kinds[1])
        self.untrained = self.solved_untrained | self.untrained
        for kind in ("trained", "untrained", "solved", "solved_untrained", "random", "solved_random"):
            runs = getattr(self, kind)
            setattr(self, kind, {mask: runs[mask] for mask in dict.fromkeys((*MASKS, *sorted(runs))) if mask in runs})

    def _check(self) -> None:
        if not self.trained:
            raise UserError(f"only untrained controls were passed for {self.title}; add a run of the trained model")
        first: dict[bool, ProbeRun] = {}  # of the solved runs, and of the others
        for run in self.runs_and_solved:
            first.setdefault(run.is_solved, run).check_same_probes(run)


def _is_untrained_model(run: ProbeRun) -> bool:
    """Return whether a control is the model, or its LLM, as it is before training."""
    return "llm" in run.metrics["untrained"] and run.metrics.get("match", "none") == "none"


def _control_order(run: ProbeRun) -> tuple[int, int]:
    """Return the order of untrained models: the one that is untrained as a whole first, then by draw."""
    return -len(run.metrics["untrained"]), run.metrics.get("draw", 0)


def read_studies(paths: Iterable[str]) -> list[Study]:
    """Read finished runs and group them into studies, in the order in which these first appear.

    Args:
        paths: Run folders; NAME=FOLDER names the model if :func:`model_name` cannot tell.

    Raises:
        UserError: A folder is not a finished run, two runs are the same case, two studies have the same folder in the
            report, or runs do not fit together.
    """
    runs, studies = [read_run(path, ProbeRun) for path in paths], {}
    key_of = study_keys(runs)
    for run in runs:
        key = key_of(run)
        studies.setdefault(key, Study(*key))._add(run)
    _check_folders_differ(studies.values())
    reference: dict[tuple, ProbeRun] = {}  # by dataset and seed: the run whose images all others must share
    for study in studies.values():
        study._complete()
        for run in study.runs_and_solved:
            reference.setdefault((study.dataset, study.seed), run).check_same_images(run)
        study._check()
    return list(studies.values())


def _check_folders_differ(studies: Iterable[Study]) -> None:
    """Raise if two studies would be written to the same folder, as "a b" and "a_b" or "a, seed 1" and seed 1 of "a"."""
    by_slug: dict[str, Study] = {}
    for study in studies:
        if (other := by_slug.setdefault(study.slug, study)) is not study:
            raise UserError(
                f"{other.title!r} and {study.title!r} would be written to the same folder, {study.slug}; "
                "give the model of one another name: NAME=RUN"
            )


def study_keys(runs: list[FinishedRun]) -> Callable[[FinishedRun], tuple[str, str, int | None]]:
    """Return the key of a run's study: model, dataset, and the seed if trained runs of the model have several."""
    seeds: dict[tuple[str, str], set[int]] = {}
    for run in runs:
        if not run.metrics["untrained"]:
            seeds.setdefault((model_name(run), run.metrics["dataset"]), set()).add(run.metrics["seed"])

    def key_of(run: FinishedRun) -> tuple[str, str, int | None]:
        model, dataset, seed = model_name(run), run.metrics["dataset"], run.metrics["seed"]
        return model, dataset, seed if len(seeds.get((model, dataset), ())) > 1 else None

    return key_of


def read_run(path: str, kind: type[Run]) -> Run:
    """Return the run of a folder, or of NAME=FOLDER, which names the model.

    Raises:
        UserError: The folder is not a finished run, or its probes are not those that the run wrote.
    """
    name, separator, folder = str(path).partition("=")
    run = kind(folder, name) if separator and not Path(path).is_dir() else kind(path)
    run.check_probes()  # a report reads only their scores
    return run


def model_name(run: FinishedRun) -> str:
    """Return the name that the run was told, else encoder and LLM ("clip + vicuna-7b") or the checkpoint's name."""
    training = run.training
    if run.model:
        return run.model
    if "encoder" in training and "llm" in training:
        return f"{training['encoder']['name']} + {Path(training['llm']).name}"
    return Path(run.metrics["mllm"]).name


def overridden_masks(study: Study) -> dict[str, str]:
    """Return, per mask of a run, the different mask that its model was trained with."""
    trained_with = {mask: run.metrics.get("own_image_attention") for mask, run in study.trained.items()}
    return {mask: own for mask, own in trained_with.items() if own not in (None, mask)}


def total_wall_s(timings: Path) -> float:
    """Return the wall time of a log of lines "start end step": the length of the union of its intervals.

    Raises:
        UserError: The log does not exist, or has other lines.
    """
    with error_context(timings):
        lines = [line.split()[:2] for line in timings.read_text().splitlines() if line.strip()]
        intervals = sorted((float(start), float(end)) for start, end in lines)
    total, until = 0.0, 0.0
    for start, end in intervals:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
