"""Claims about other tasks than segmentation, judged as those about classes are (claims.py, verdicts.py).

They are about the layers alone: drop and recovery of an MLLM, gains over layers of a bare encoder. Differences are
signed so that positive means better for a drop or gain, whether a high score is good or a low one. The paper makes no
claim about these tasks.
"""

from collections.abc import Iterable

from llava_bidir.common.errors import UserError
from probes.analyses.claims import CLAIMS
from probes.models.sites import ENCODER
from probes.runs.finished_run import FinishedRun
from probes.runs.formatting import Entry, Rows, bounds
from probes.runs.study import StudyRuns, read_studies, runs_to_compare
from probes.tasks import SEGMENTATION, TASKS, Task

from .claim_table import claim_notes, claim_text, verdict_reasons
from .claims import evaluate_claims
from .seeds import joint_studies

TEXTS = {  # of claims that are about classes in the paper's words
    "adapter_drop": "{task} drops at the adapter: how much worse its {score} is than the encoder's",
    "recovery": "LLM layers recover it after the adapter: how much better the best layer's {score} is than its",
    "layer_gain": "The encoder's layers make it readable: how much better the best layer's {score} is than that of the "
    "patch embeddings",
    "over_last": "A layer reads better than the last one: how much better the best layer's {score} is than the last's",
}


def read_task_studies(paths: Iterable[str]) -> list[StudyRuns]:
    """Return the studies of `probes report --tasks`: of folders, or NAME=FOLDER, which names the model.

    Raises:
        UserError: A run is of segmentation, or runs do not fit together, see :func:`read_studies`.
    """
    studies = read_studies(paths, FinishedRun)
    for study in studies:
        if study.task.name == SEGMENTATION:
            raise UserError(
                f"{study.first.path} is a run of {SEGMENTATION}; expected one of another task (--tasks)"
            )
    return studies


def task_results(studies: list[StudyRuns]) -> list[Entry]:
    """Return the entry "tasks" of results.json, one entry per study and mask.

    Each has the scores by site of the trained model, from solved probes where all masks have them, and of the models
    with "random" weights under the same mask; "claims" as :func:`evaluate_claims` returns them; and "unit", the site
    whose score is 1 in the figure, or None.
    """
    return [entry for study in studies for entry in _study_entries(study)]


def _study_entries(study: StudyRuns) -> list[Entry]:
    claims = evaluate_claims(study)
    task = study.task
    entries = []
    for mask, run in runs_to_compare(study)[0].items():
        of_mask = [claim for claim in claims if claim["image_attention"] == mask]
        entry = {
            "task": task.name,
            "model": study.name,
            "dataset": study.dataset,
            "score": task.score,
            "better": "higher" if task.sign > 0 else "lower",
            "image_attention": mask,
            "seed": run.metrics["seed"],
            "has_llm": run.has_llm,
            "unit": _unit_site(run),
            "sites": _sites(run),
            "random": _random_scores(study, run),
            "claims": [claim | {"text": _claim_text(claim["claim"], task)} for claim in of_mask],
        }
        entries.append(entry)
    return entries


def _claim_text(claim: str, task: Task) -> str:
    """Return what a claim says of a task."""
    text = TEXTS.get(claim, CLAIMS[claim].text)
    return text.replace("{task}", task.name.capitalize()).replace(
        "{score}", task.labels[task.score]
    )


def _unit_site(run: FinishedRun) -> str | None:
    """Return the encoder of an MLLM, or the last layer of a bare encoder, if probed."""
    unit = ENCODER if run.has_llm else run.last_layer
    return unit if unit in run.sites else None


def _sites(run: FinishedRun) -> list[Entry]:
    """Return the main score of a run at each site."""
    score = run.task.score
    return [
        {
            "site": site["site"],
            "value": site[score],
            "ci95": site[f"{score}_ci95"],
        }
        for site in run.metrics["sites"]
    ]


def _random_scores(study: StudyRuns, trained: FinishedRun) -> list[Entry]:
    """Return the scores of the models with random weights, with mask and kind of probes of the trained one."""
    return [
        {
            "weights": run.arm,
            "draw": run.draw,
            "sites": _sites(run),
        }
        for run in study.members
        if run.arm != "trained" and _mask_and_probes(run) == _mask_and_probes(trained)
    ]


def _mask_and_probes(run: FinishedRun) -> tuple[str, bool]:
    return run.mask, run.is_solved


def joint_tasks(studies: list[StudyRuns], entries: list[Entry]) -> list[Entry]:
    """Return the claims of each task over the seeds of a model, see :func:`joint_studies`, with its "task"."""
    joint = []
    for name in dict.fromkeys(study.task.name for study in studies):
        of_task = [study for study in studies if study.task.name == name]
        results = [{"claims": _claims_of(study, entries)} for study in of_task]
        joint += [{"task": name} | result for result in joint_studies(of_task, results)]
    return joint


def _claims_of(study: StudyRuns, entries: list[Entry]) -> list[Entry]:
    """Return the claims of a study, from the entries of its masks."""
    own = (study.task.name, study.name, study.dataset, study.first.metrics["seed"])
    return [
        claim
        for entry in entries
        if (entry["task"], entry["model"], entry["dataset"], entry["seed"]) == own
        for claim in entry["claims"]
    ]


def task_score_rows(entries: list[Entry]) -> Rows:
    """Return a row for each score: of the trained run at each site, and of models with random weights."""
    rows = []
    for entry in entries:
        common = {
            key: entry[key] for key in ("task", "model", "dataset", "seed", "image_attention")
        }
        trained = {
            "weights": "trained",
            "draw": None,
            "sites": entry["sites"],
        }
        for run in (trained, *entry["random"]):
            about = common | {"weights": run["weights"], "draw": run["draw"]}
            rows += [
                about
                | {
                    "site": row["site"],
                    "score": entry["score"],
                    "value": row["value"],
                }
                | bounds(row["ci95"])
                for row in run["sites"]
            ]
    return rows


def claim_texts(entries: list[Entry]) -> list[dict[str, str]]:
    """Return a row of text for each claim of entries of "tasks" or "joint_tasks", in the units of its score.

    They name the mask, unless no model has an LLM.
    """
    rows = []
    with_llm = any(entry["has_llm"] for entry in entries)
    for entry in entries:
        task = TASKS[entry["task"]]
        better = "higher" if task.sign > 0 else "lower"
        about = {
            "task": task.name,
            "model": entry["model"],
            "dataset": entry["dataset"],
            "score": f"{task.labels[task.score]}, {better} is better",
        }
        for claim in entry["claims"]:
            text = claim_text(claim, task.name)
            seed = {"seed": str(entry.get("seed"))}
            if "seeds" in entry:
                seed = {"seeds": f"{', '.join(map(str, entry['seeds']))} ({text.count})"}
            if with_llm:
                seed["attention"] = text.mask if entry["has_llm"] else "–"
            cells = {
                "claim": CLAIMS[claim["claim"]].name,
                "effect": text.effects[0],
                "beyond random": text.columns["beyond_random"].effect,
                "p (Holm)": text.p,
                "finding": text.finding,
            }
            rows.append(about | seed | cells)
    return rows


def task_notes(entries: list[Entry], joint: list[Entry]) -> list[str]:
    """Return from where on an effect counts, what else a reader must know, and why columns are untested.

    The column "paper" is left out: the paper has no such claims.
    """
    notes = []
    # p is corrected for the number of claims about all masks of a study
    studies: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        study = tuple(entry[key] for key in ("task", "model", "dataset", "seed"))
        studies.setdefault(study, []).extend(entry["claims"])
    corrected = [(study[0], claims) for study, claims in studies.items()]
    corrected += [(result["task"], result["claims"]) for result in joint]
    for name, claims in corrected:
        task = TASKS[name]
        notes += claim_notes(claims, f"{task.margin:g} of {task.labels[task.score]}")
    claims = [claim for entry in (*entries, *joint) for claim in entry["claims"]]
    reasons = verdict_reasons(claims, ("optimum", "beyond_random"))
    return [*dict.fromkeys([*notes, *reasons])]
