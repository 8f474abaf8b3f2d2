"""What the report shows of answers: of trained models and of random LLMs, beside the probes at the same places."""

from typing import Any

from probes.analyses.base import Section
from probes.evaluation.estimate import estimate_text
from probes.results.probe_run import ProbeRun
from probes.results.study import StudyRuns

from .figures import answer_figures
from .inference import beyond_random
from .tables import accuracy_rows, models_of

KEYS = ("questions", "images", "accuracy", "sites", "effects")  # of answers.json


def section(study: StudyRuns) -> Section:
    """Return the section of a study."""
    answers = study_answers(study)
    by_mask = {"answers": {mask: answers.get(mask) for mask in study.main_runs}}
    tables = {"answer_accuracy": accuracy_rows(answers)}
    return Section([*answer_figures(answers)], summarize_answers(answers), tables, by_mask=by_mask)


def study_answers(study: StudyRuns) -> dict[str, dict[str, Any]]:
    """Return the answers by mask, of the solved run if it has some, else of the main one; masks without are missing.

    Returns:
        {mask: `KEYS` of answers.json, "peak_site": best decoder layer by mIoU, "random": [{"draw", and `KEYS`}],
        "beyond_random": see :func:`beyond_random`}}.
    """
    by_mask = {}
    for mask, run, random_runs in study.analysed("answers.json"):
        random = [{"draw": other.draw} | _select(other) for other in random_runs]
        more = {"peak_site": run.peak_layer, "random": random}
        by_mask[mask] = _select(run) | more | {"beyond_random": beyond_random(run, random_runs)}
    return by_mask


def _select(run: ProbeRun) -> dict[str, Any]:
    results = run.analysis("answers.json")
    return {key: results[key] for key in KEYS}


def summarize_answers(answers: dict[str, dict[str, Any]]) -> list[str]:
    """Return two sentences per mask: who is right at the same places, and what knockouts change."""
    lines = []
    for mask, of_mask in answers.items():
        site = next(
            (site for site in of_mask["sites"] if site["site"] == of_mask["peak_site"]),
            of_mask["sites"][-1],
        )
        random = "".join(
            f"; {name}: {_percent(entry['accuracy'])}" for name, entry in _random(of_mask).items()
        )
        lines.append(
            f"{mask.capitalize()}: at {_percent(of_mask['accuracy'])} of {of_mask['questions']} questions, the right "
            "class is the model's most probable answer of all classes; at "
            f"{_percent(site['accuracy'])}, it is that of the probe at {site['site']} "
            f"(answer minus probe {_points(site['difference'])}; both say the same in "
            f"{site['agreement']['value']:.0%}){random}."
        )
        changes = {
            effect["condition"]: effect
            for effect in of_mask["effects"]
            if effect["control"] != "none"
        }
        beyond = [
            e
            for e in (of_mask["beyond_random"] or {"effects": []})["effects"]
            if e["control"] != "none"
        ]
        beyond = {
            effect["condition"]: f" (beyond random {_nats(effect['mean'])})" for effect in beyond
        }
        lines.append(
            "Against matched tokens, hiding the right class changes the right answer's log-probability by "
            f"{_nats(changes['correct']['mean'])}{beyond.get('correct', '')}, hiding the wrong class by "
            f"{_nats(changes['incorrect']['mean'])}{beyond.get('incorrect', '')}, as means over classes."
            + f" No interval covers other draws of the random LLM (here {len(of_mask['random'])})."
            * bool(beyond)
        )
    return lines


def _random(of_mask: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: entry for name, entry in models_of(of_mask).items() if entry is not of_mask}


def _percent(entry: dict[str, Any]) -> str:
    return estimate_text(entry, ".1%").replace("-", "−")


def _points(entry: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in entry["ci95"])
    return f"{100 * entry['value']:+.1f} pp [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def _nats(mean: dict[str, Any]) -> str:
    if mean["value"] is None:
        return "an unknown amount (no class in enough images)"
    interval = "" if mean["ci95"] is None else " [{:+.3f}, {:+.3f}]".format(*mean["ci95"])
    return f"{mean['value']:+.3f} nats{interval}".replace("-", "−")
