"""Tables of answers, by mask as the report's section collects them."""

from typing import Any

from probes.results.formatting import Rows, bounds


def models_of(of_mask: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what was measured of the trained model and of each random LLM, by name."""
    return {"trained": of_mask} | {
        f"random LLM, draw {entry['draw']}": entry for entry in of_mask["random"]
    }


def accuracy_rows(answers: dict[str, dict[str, Any]]) -> Rows:
    """Return the accuracy of answers, then of the probe at each site, at the same places."""
    rows = []
    for mask, of_mask in answers.items():
        for model, entry in models_of(of_mask).items():
            common = {"image_attention": mask, "model": model}
            none = {"value": None, "ci95": None}
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
    return rows


def effect_rows(answers: dict[str, dict[str, Any]]) -> Rows:
    """Return the changes of the right answer's log-probability in nats, by class and as means over classes."""
    rows = []
    for mask, of_mask in answers.items():
        effects = [
            (model, effect)
            for model, entry in models_of(of_mask).items()
            for effect in entry["effects"]
        ]
        if of_mask["beyond_random"]:
            effects += [("beyond random", effect) for effect in of_mask["beyond_random"]["effects"]]
        for model, effect in effects:
            common = {"image_attention": mask, "model": model}
            common |= {key: effect[key] for key in ("condition", "control")}
            mean = effect["mean"]
            rows.append(
                common
                | {"class": "mean over classes", "value": mean["value"]}
                | bounds(mean["ci95"])
            )
            rows += [
                common
                | {key: row[key] for key in ("class", "value", "images", "p", "p_holm")}
                | bounds(row["ci95"])
                for row in effect.get("classes", ())
            ]
    return rows


def _numbers(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: entry["value"]} | bounds(entry["ci95"], f"{name}_")
