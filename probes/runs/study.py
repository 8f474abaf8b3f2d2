"""Group the runs of a report by task, model and dataset, then by attention mask, trained and untrained.

Runs of `probes solve` are "solved": their probes minimise the loss at every strength of regularisation. Runs of
`probes fit` train theirs with AdamW. Where a study has both, the page shows the trained probes and compares the solved
ones along the path of strengths; the main runs of all masks have probes of one kind. Controls have random weights:
the "untrained" one is the model before training, "random" ones are further draws of it, random adapters, and LLMs that
resemble the trained one (probes/models/random_weights.py).
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from llava_bidir.common.errors import UserError
from probes.config import POINTS, split_label
from probes.heads import LINEAR
from probes.steps.record import read_record
from probes.tasks import SEGMENTATION, TASKS

from .compare import check_same_images, check_seeds_differ, check_study
from .formatting import file_name
from .read import ProbeRun, finished_runs

PAPER_MASKS = ("causal", "bidirectional")  # which come first
# Arms with random weights, by the part that is random: a claim must hold beyond each of them.
CONTROLS = {"llm": ("random", "permuted"), "adapter": ("adapter",)}
# arms that are the model, or its LLM, before training
UNTRAINED_ARMS = ("untrained", "random, unmatched")

log = logging.getLogger(__name__)


def by_mask(runs: Iterable[ProbeRun]) -> dict[str, ProbeRun]:
    """Return the first of these runs under each mask."""
    found: dict[str, ProbeRun] = {}
    for run in runs:
        found.setdefault(run.mask, run)
    return found


class StudyRuns:
    """One model on one dataset: its runs of one task, the paper's masks first. What a run is says its metrics.json.

    Three choices by mask: `main_runs` are those of the trained model with the kind of probes that more masks have
    (trained ones, if as many). `solved` are those with solved probes, which can be the main ones. `untrained` is the
    model, or its LLM, as it is before training, with trained probes if there are such. Trained probes are left out of
    `members` where more masks have solved ones.

    Args:
        name: Of the model.
        dataset: Name of the images.
        seed: Of the training, None if the report has one only.
        members: The runs.

    Attributes:
        model: Name of the model, with the seed if the report has several.
        title: Heading of the study on the page, with its task unless that is the paper's.
        first: The first trained run, whose dataset and settings stand for the study.
        is_solved: Whether the probes of the main runs are solved.
        task: Task of all runs.
        cuts: Its runs under cuts of attention, by cut.

    Raises:
        UserError: Two runs are the same arm, or none is of the trained model.
    """

    has_other_heads = False  # trained beside its linear probes, in other studies
    with_context: "StudyRuns | None" = (
        None  # of a study under a cut of the encoder: the same without this cut
    )

    def __init__(self, name: str, dataset: str, seed: int | None, members: list[ProbeRun]):
        self.name = name
        self.dataset = dataset
        self.seed = seed
        self.model = name if seed is None else f"{name}, seed {seed}"
        self.members = members
        self.cuts: dict[str, StudyRuns] = {}
        task = members[0].task_name
        self.title = f"{self.model}, {dataset}" + f", {task}" * (task != SEGMENTATION)
        self._check_differ()
        masks = [*PAPER_MASKS, *sorted({run.mask for run in self.members})]
        # the model that is untrained as a whole before those that are in part, then by draw
        self.members.sort(
            key=lambda run: (masks.index(run.mask), -len(run.metrics["untrained"]), run.draw)
        )
        trained = [self.where(arm="trained", solved=solved) for solved in (False, True)]
        main = max(trained, key=len)
        if not main:
            raise UserError(
                f"only untrained controls were passed for {self.title}; add a run of the trained model"
            )
        self.main_runs = by_mask(main)
        self.first = next(iter(self.main_runs.values()))
        self.is_solved = self.first.is_solved
        self.task = self.first.task
        for run in self.where(arm="trained", solved=not self.is_solved):
            if self.is_solved or run.mask not in self.main_runs:
                text = "%s is left out of curves and claims: the probes of %s under another mask were only %s"
                log.warning(text, run.path, self.title, self.first.probe_kind)
        if self.is_solved:
            self.members = [run for run in self.members if run.is_solved or run.arm != "trained"]
        self.solved = by_mask(self.where(arm="trained", solved=True))
        untrained = self.where(arm=UNTRAINED_ARMS)
        self.untrained = by_mask(sorted(untrained, key=lambda run: run.is_solved))

    def where(
        self, *, arm: str | Iterable[str], mask: str | None = None, solved: bool | None = None
    ) -> list[ProbeRun]:
        """Return the runs of one or several arms, in the order of the arms, then of masks and draws.

        Args:
            arm: Names as in :attr:`ProbeRun.arm`.
            mask: The mask, None for all.
            solved: True for runs with solved probes, False for trained ones, None for both.
        """
        return [
            run
            for name in ([arm] if isinstance(arm, str) else arm)
            for run in self.members
            if run.arm == name and mask in (None, run.mask) and solved in (None, run.is_solved)
        ]

    def draws(self, *controls: str, solved: bool) -> list[dict[str, ProbeRun]]:
        """Return the draws of the first of these `CONTROLS` that has any: per draw, the runs by mask.

        Untrained models have a random adapter, too; of the same draw it has the same weights.
        """
        for control in controls:
            arms = ("adapter", "untrained") if control == "adapter" else (control,)
            by_draw: dict[tuple[int, int], list[ProbeRun]] = {}
            for run in self.where(arm=arms, solved=solved):
                by_draw.setdefault((run.draw, run.metrics["seed"]), []).append(run)
            if by_draw:
                return [by_mask(by_draw[key]) for key in sorted(by_draw)]
        return []

    def compared_layers(self, run: ProbeRun) -> list[str]:
        """Return the layers of a run that all random LLMs or encoders have: what is judged beyond these is of them."""
        draws = self.where(arm=CONTROLS["llm"], solved=run.is_solved)
        return [site for site in run.layers if all(site in draw.sites for draw in draws)]

    @property
    def slug(self) -> str:
        """Folder name of the study."""
        return file_name(f"{self.model}_{self.dataset}")

    def pairs(self) -> list[tuple[ProbeRun, ProbeRun]]:
        """Return the run under the first mask, with that under each other one."""
        first, *others = self.main_runs.values()
        return [(first, other) for other in others]

    def _check_differ(self) -> None:
        """Raise if two runs are the same arm under the same mask with the same kind of probes."""
        seen: dict[tuple, ProbeRun] = {}
        for run in self.members:
            key = (
                run.probe_kind,
                run.mask,
                run.arm,
                run.draw,
                run.metrics["seed"],
                *run.metrics["untrained"],
            )
            other = seen.setdefault(key, run)
            if other is not run:
                raise UserError(
                    f"{other.path} and {run.path} are both the {run.arm} run of draw {run.draw} under {run.mask!r} of "
                    f"{self.title}; pass only one, name the model of each, NAME={run.path}, or make a control again "
                    "with another --model.draw"
                )


def read_studies(
    texts: Iterable[str], labels: Sequence[str] = (), margin: float | None = None
) -> list[StudyRuns]:
    """Read the runs of studies, of any task, and group them; see :func:`group_runs`.

    Args:
        texts: Folders of studies; NAME=FOLDER names the model.
        labels: Labels of a study's models in the order of the report (default: those that it was given); others follow.
        margin: Points of a class score that count as nothing (default: those that the studies were given).

    Raises:
        UserError: A folder is no study, its runs do not fit together, or the studies' margins differ.
    """
    runs = [run for text in texts for run in read_study(text, labels)]
    task = TASKS[SEGMENTATION].with_margin((margin or stated_margin(runs)) / 100)
    for run in runs:
        if run.task_name == SEGMENTATION:
            run.task = task
    return group_runs(runs)


def stated_margin(runs: Iterable[ProbeRun]) -> float:
    """Return the points of a class score that count as nothing in the studies of runs.

    Raises:
        UserError: They were given different ones.
    """
    stated = {}
    for folder in dict.fromkeys(folder for run in runs for folder in run.path.parents[:2]):
        if options := report_options(folder):
            stated[folder] = options.get("margin", POINTS)
    if len({*stated.values()}) > 1:
        given = ", ".join(f"{margin:g} in {folder}" for folder, margin in stated.items())
        raise UserError(f"points that count as nothing differ, {given}: give --margin P for all")
    return next(iter(stated.values()), POINTS)


def read_study(text: str, labels: Sequence[str] = ()) -> list[ProbeRun]:
    """Return the runs of [NAME=]FOLDER, with those of studies in this folder; each knows the name of its model.

    Raises:
        UserError: There is none, or probes are not those that a run wrote.
    """
    name, path = split_label(text)
    folder = Path(path)
    if (folder / "metrics.json").is_file():  # a run by itself
        run = ProbeRun(folder, name or None)
        _ = run.content
        return [run]
    runs = [ProbeRun(path) for path in finished_runs(folder)]
    if not runs:
        raise UserError(
            f"{folder} is no study: expected a folder that holds finished runs, of a model and its controls "
            "(`probes study MODEL DATA --out DIR`)"
        )
    given = labels or given_labels(folder)
    names = labels_of_models(folder, runs, given)
    by_folder = {run.path: run.path.relative_to(folder).parts[0] for run in runs}
    if not name and {*by_folder.values()} == {*given} and len(given) == 1:
        names = by_folder
    if names and not name:
        order = {label: i for i, label in enumerate(given)}
        runs.sort(key=lambda run: order.get(names[run.path], len(order)))
    for run in runs:
        label = by_folder[run.path]
        if not names and len(given) > 1 and label in given:
            run.label = f"{name} {label}".strip()
        run.model = " ".join(filter(None, (name, names.get(run.path)))) or None
        _ = run.content  # damaged probes are an error, though a report reads only their scores
    return runs


def group_runs(runs: Sequence[ProbeRun]) -> list[StudyRuns]:
    """Group runs into studies of one task, model and data set, in the order in which these first appear.

    Those of segmentation come first.

    Raises:
        UserError: A run is of two models, two runs are the same case, runs do not fit together, or two studies have
            one folder.
    """
    _check_runs_differ(runs)
    keys = [(run.task_name, model_name(run), run.metrics["dataset"]) for run in runs]
    seeds: dict[tuple, set[int]] = {}  # of trained runs
    for key, run in zip(keys, runs, strict=True):
        seeds.setdefault(key, set()).update([run.metrics["seed"]] * (run.arm == "trained"))
    members: dict[tuple, list[ProbeRun]] = {}
    for key, run in zip(keys, runs, strict=True):
        seed = run.metrics["seed"] if len(seeds[key]) > 1 else None
        members.setdefault((*key, seed), []).append(run)
    studies = [
        StudyRuns(*key[1:], of_study)
        for key, of_study in members.items()
        if _has_trained_run(of_study)
    ]
    studies.sort(key=lambda study: study.task.name != SEGMENTATION)
    for study in studies:
        if end := head_suffix(study.first):
            for linear in studies:
                linear.has_other_heads |= linear.name == study.name.removesuffix(end)
    _check_studies(studies)
    return _join_cuts(studies)


def _join_cuts(studies: Sequence[StudyRuns]) -> list[StudyRuns]:
    """Return the studies of models as they are, each with its runs under cuts, and the cuts that have no such study."""
    by_cut = {}
    for study in studies:
        cut = study.first.cut
        name = study.name.removesuffix(cut_suffix(cut))
        by_cut[name, study.dataset, study.seed, study.task.name, cut] = study
    joined = []
    for (*key, cut), study in by_cut.items():
        intact = by_cut.get((*key, None))
        if cut is None or intact is None:
            joined.append(study)
            continue
        intact.cuts[cut] = study
        if cut != "llm":
            only_encoder_differs = "llm" if cut.startswith("both") else None
            study.with_context = by_cut.get((*key, only_encoder_differs))
    return joined


def _check_runs_differ(runs: Sequence[ProbeRun]) -> None:
    for path, count in Counter(run.path.resolve() for run in runs).items():
        if count > 1:
            raise UserError(
                f"{path} is passed twice, and would be compared with itself. Pass each model once; a study with "
                "several models, NAME=STUDY, has them all, and NAME=STUDY/MODEL is one of them"
            )


def _check_studies(studies: list[StudyRuns]) -> None:
    """Raise a UserError unless each study has a folder of its own, and runs that are compared fit together."""
    for (_, slug), count in Counter((study.task.name, study.slug) for study in studies).items():
        if count > 1:
            raise UserError(
                f"{count} studies have the folder {slug} in the report; name the models otherwise, NAME=STUDY"
            )
    # by task, dataset and seed: the run whose images all others must share
    reference: dict[tuple, ProbeRun] = {}
    for study in studies:
        for run in study.members:
            compared = reference.setdefault((study.task.name, study.dataset, study.seed), run)
            check_same_images(study.first, run)
            check_same_images(compared, run, settings=["dtype"])  # models may resize otherwise
        check_study(study.first, study.members)
    for of_model in studies_by_model(studies):
        for mask in dict.fromkeys(mask for study in of_model for mask in study.main_runs):
            check_seeds_differ(
                [study.main_runs[mask] for study in of_model if mask in study.main_runs]
            )


def _has_trained_run(runs: list[ProbeRun]) -> bool:
    """Return False, with a warning, for controls of another task than the paper's without a trained model's run."""
    if runs[0].task_name == SEGMENTATION or any(run.arm == "trained" for run in runs):
        return True
    for run in runs:
        log.warning("%s is left out: no run of the trained model has its task and data", run.path)
    return False


def studies_by_model(studies: Iterable[StudyRuns]) -> list[list[StudyRuns]]:
    """Return the studies of each task, model and dataset, one per seed."""
    groups: dict[tuple[str, str, str], list[StudyRuns]] = {}
    for study in studies:
        groups.setdefault((study.task.name, study.name, study.dataset), []).append(study)
    return list(groups.values())


def model_name(run: ProbeRun) -> str:
    """Return the name of a run's model in a report, where another head of its probes, or a cut, is another model.

    It is the name that the run was told, else that of its checkpoint: what this records of itself ("as trained"), its
    encoder and LLM ("clip + vicuna-7b"), or its folder.
    """
    training = run.training
    name = Path(run.metrics["mllm"]).name
    if run.model:
        name = run.model
    elif "name" in training:
        name = training["name"]
    elif "encoder" in training and "llm" in training:
        name = f"{training['encoder']['name']} + {Path(training['llm']).name}"
    return name + head_suffix(run) + cut_suffix(run.cut)


def head_suffix(run: ProbeRun) -> str:
    """Return the end of the name of a model whose probes have another head than the paper's, "" with this one."""
    return "" if run.head == LINEAR else f", {run.head}"


def cut_suffix(cut: str | None) -> str:
    """Return the end of the name of a model whose attention is cut, "" of one that is as it is."""
    return "" if cut is None else f", {cut} cut"


def labels_of_models(
    folder: Path, runs: Collection[ProbeRun], given: Sequence[str]
) -> dict[Path, str]:
    """Return the label in the study, DIR/LABEL/ARM, of each run by its folder if labels tell models apart.

    They do if two models have one name and one mask, or one name and another grid or depth, or if two labels have one
    mask and all were `given`; else two labels are one model under two masks, and {} is returned.
    """
    labels = {run.path: run.path.relative_to(folder).parts[0] for run in runs}
    all_given = {*labels.values()} <= {*given}
    models: dict[tuple, str] = {}
    shapes: dict[str, tuple] = {}
    for run in runs:
        if run.path.parent == folder:
            continue
        name = model_name(run)
        shape = run.metrics["grid"], run.last_layer
        keys = [(name, run.mask)]
        if all_given:
            keys.append(("", run.mask))  # whatever the models' names are
        is_known = [models.setdefault(key, labels[run.path]) == labels[run.path] for key in keys]
        if not all(is_known) or shapes.setdefault(name, shape) != shape:
            return labels
    return {}


def given_labels(folder: Path) -> tuple[str, ...]:
    """Return the labels that `probes study` was given for the models of its folder, in order; () of another folder."""
    return tuple(report_options(folder).get("labels", ()))


def report_options(folder: Path) -> dict[str, Any]:
    """Return the options of the report that `probes study` makes of its folder; {} of another folder."""
    record = read_record("report", folder)
    if record is None or not isinstance(record.tried.config, dict):
        return {}
    return record.tried.config


def runs_to_compare(*studies: StudyRuns) -> list[dict[str, ProbeRun]]:
    """Return the trained model's runs of each study by mask: solved ones if all masks of all studies have them.

    A model that is compared with one of another head, which is not solved, has trained ones.
    """
    are_solved = all(study.solved.keys() == study.main_runs.keys() for study in studies)
    if are_solved and not any(study.has_other_heads for study in studies):
        return [study.solved for study in studies]
    return [study.main_runs for study in studies]


def overridden_masks(study: StudyRuns) -> dict[str, str]:
    """Return, per mask of a run, the different mask that its model was trained with."""
    return {
        mask: own
        for mask, run in study.main_runs.items()
        if (own := run.metrics["own_image_attention"]) not in (None, mask)
    }
