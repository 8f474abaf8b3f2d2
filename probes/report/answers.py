"""Collect the answers of a study: of trained models and of random LLMs, beside the probes at the same places."""

from typing import Any

from probes.analyses.answers.inference import beyond_random
from probes.results.probe_run import ProbeRun

from .study import Rows, Study
from .tables import bounds

KEYS = ("questions", "images", "accuracy", "sites", "effects")  # of answers.json


def study_answers(study: Study) -> dict[str, dict[str, Any]]:
    """Return the answers by mask, of the solved run if it has some, else of the main one; masks without are missing.

    Returns:
        {mask: `KEYS` of answers.json, "peak_site": best decoder layer by mIoU, "random": [{"draw", and `KEYS`}],
        "beyond_random": see :func:`beyond_random`}}.
    """
    by_mask = {}
    for mask in study.trained:
        runs = [study.solved.get(mask), study.trained[mask]]
        run = next((run for run in runs if run and run.analysis("answers.json")), None)
        if run is None:
            continue
        draws = [draw[mask] for draw in study.random_draws("llm", run.is_solved) if mask in draw]
        draws = [draw for draw in draws if draw.analysis("answers.json")]
        random = [{"draw": draw.metrics.get("draw", 0)} | _select(draw) for draw in draws]
        more = {"peak_site": run.peak_layer, "random": random}
        by_mask[mask] = _select(run) | more | {"beyond_random": beyond_random(run, draws)}
    return by_mask


def answers_by_mask(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the answers in a study's part of results.json, by mask."""
    return {mask: entry["answers"] for mask, entry in results["masks"].items() if entry["answers"]}


def _select(run: ProbeRun) -> dict[str, Any]:
    results = run.analysis("answers.json")
    return {key: results[key] for key in KEYS}


def models_of(of_mask: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the answers of the trained model and of each random LLM, by name."""
    return {"trained": of_mask} | {f"random LLM, draw {entry['draw']}": entry for entry in of_mask["random"]}


def answer_tables(results: dict[str, Any]) -> dict[str, Rows]:
    """Return the table "answer_accuracy", from a study's part of results.json; none without answers.

    It has the accuracy of answers, then of the probe at each site, at the same places.
    """
    rows = []
    for mask, of_mask in answers_by_mask(results).items():
        for model, entry in models_of(of_mask).items():
            common = {"image_attention": mask, "model": model}
            none = {"value": None, "ci95": [None, None]}
            answer = common | {"read_by": "answer"} | _numbers(entry["accuracy"], "accuracy")
            rows.append(answer | _numbers(none, "answer_minus_probe") | {"agreement": None})
            rows += [
                common
                | {"read_by": f"probe at {site['site']}"}
                | _numbers(site["accuracy"], "accuracy")
                | _numbers(site["difference"], "answer_minus_probe")
                | {"agreement": site["agreement"]["value"]}
                for site in entry["sites"]
            ]
    return {"answer_accuracy": rows} if rows else {}


def effect_rows(answers: dict[str, dict[str, Any]]) -> Rows:
    """Return the changes of the right answer's log-probability in nats, by class and as means over classes."""
    rows = []
    for mask, of_mask in answers.items():
        effects = [(model, effect) for model, entry in models_of(of_mask).items() for effect in entry["effects"]]
        if of_mask["beyond_random"]:
            effects += [("beyond random", effect) for effect in of_mask["beyond_random"]["effects"]]
        for model, effect in effects:
            common = {"image_attention": mask, "model": model}
            common |= {key: effect[key] for key in ("condition", "control")}
            mean = effect["mean"]
            rows.append(common | {"class": "mean over classes", "value": mean["value"]} | _bounds(mean["ci95"]))
            rows += [
                common | {key: row[key] for key in ("class", "value", "images", "p", "p_holm")} | _bounds(row["ci95"])
                for row in effect.get("classes", ())
            ]
    return rows


def _bounds(ci95: list[float] | None) -> dict[str, Any]:
    return bounds(ci95 or [None, None])


def _numbers(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: entry["value"]} | bounds(entry["ci95"], f"{name}_")


def summarize_answers(answers: dict[str, dict[str, Any]]) -> list[str]:
    """Return two sentences per mask: who is right at the same places, and what knockouts change."""
    lines = []
    for mask, of_mask in answers.items():
        site = next((site for site in of_mask["sites"] if site["site"] == of_mask["peak_site"]), of_mask["sites"][-1])
        random = "".join(f"; {name}: {_percent(entry['accuracy'])}" for name, entry in _random(of_mask).items())
        lines.append(
            f"{mask.capitalize()}: at {_percent(of_mask['accuracy'])} of {of_mask['questions']} questions, the right "
            "class is the model's most probable answer of all classes; at "
            f"{_percent(site['accuracy'])}, it is that of the probe at {site['site']} "
            f"(answer minus probe {_points(site['difference'])}; both say the same in "
            f"{site['agreement']['value']:.0%}){random}."
        )
        changes = {effect["condition"]: effect for effect in of_mask["effects"] if effect["control"] != "none"}
        beyond = [e for e in (of_mask["beyond_random"] or {"effects": []})["effects"] if e["control"] != "none"]
        beyond = {effect["condition"]: f" (beyond random {_nats(effect['mean'])})" for effect in beyond}
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
    low, high = entry["ci95"]
    return f"{entry['value']:.1%} [{low:.1%}, {high:.1%}]".replace("-", "−")


def _points(entry: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in entry["ci95"])
    return f"{100 * entry['value']:+.1f} pp [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def _nats(mean: dict[str, Any]) -> str:
    if mean["value"] is None:
        return "an unknown amount (no class in enough images)"
    interval = "" if mean["ci95"] is None else " [{:+.3f}, {:+.3f}]".format(*mean["ci95"])
    return f"{mean['value']:+.3f} nats{interval}".replace("-", "−")
