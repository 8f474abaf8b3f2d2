"""What the report shows of answers: right ones beside probes, and effects of cut routes, also of random LLMs."""

from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llava_bidir.common.errors import UserError
from probes.analyses.base import Section
from probes.analyses.sinks import describe_sinks, layers_with_sinks, meets_sink, sinks_of
from probes.analyses.style import COLOURS, FigureData, ReportFigure, curves
from probes.runs.formatting import Rows, bounds
from probes.runs.probe_run import ProbeRun
from probes.runs.study import CONTROLS, StudyRuns
from probes.score.estimate import estimate_text

from .cuts import TARGETS

KEYS = ("questions", "images", "layers", "accuracy", "sites", "effects")  # of routes.json
SINK_COLOUR = "#eeeeee"
DRAWN = ("image", "object", "random")  # sources, with the colours of COLOURS


def section(study: StudyRuns) -> Section:
    """Return the section of a study: a figure for each mask."""
    routes = study_routes(study)
    figures = [
        ReportFigure(
            f"routes_{mask}", f"Routes of answers, {mask}",
            "Change of the right answer's log-probability when no token of the target attends to the source, in "
            "windows of layers (points, at the middle of the window) and in all layers (right). object: the patches "
            "that the question is about; random: as many others. Dotted: random LLMs, one line per draw. Bands: 95% "
            "intervals over images, for all windows of a route together."
            + " Grey: layers in which image tokens attend to an attention sink among them."
            * bool(layers_with_sinks(of_mask["sinks"])),
            routes_figure(of_mask), "wide",)
        for mask, of_mask in routes.items()
    ]  # fmt: skip
    by_mask = {"routes": {mask: routes.get(mask) for mask in study.main_runs}}
    sentences = []
    for mask, of_mask in routes.items():
        sentences += [describe_answers(mask, of_mask), summarize(mask, of_mask)]
        if text := describe_sinks(mask, of_mask["sinks"]):
            sentences.append(f"{text} Grey in the figure.")
    tables = {"answer_accuracy": accuracy_rows(routes)}
    return Section(figures, sentences, tables, by_mask=by_mask)


def study_routes(study: StudyRuns) -> dict[str, dict[str, Any]]:
    """Return the results by mask, of the solved run if it has some, else of the main one; masks without are missing.

    Returns:
        {mask: `KEYS` of routes.json, "sinks", "peak_site": best decoder layer by mIoU, "random": [{"draw", `KEYS` and
        "sinks"}]}.

    Raises:
        UserError: A random LLM was asked other questions than the trained one.
    """
    by_mask = {}
    for mask, run, random_runs in _analysed(study):
        for other in random_runs:
            _check_same_questions(run, other)
        random = [{"draw": other.draw} | _select(other) for other in random_runs]
        by_mask[mask] = _select(run) | {"peak_site": run.peak_layer, "random": random}
    return by_mask


def _analysed(study: StudyRuns) -> Iterator[tuple[str, ProbeRun, list[ProbeRun]]]:
    """Yield the trained run and the random LLMs that have routes.json, by mask; masks without are left out.

    The trained run is the solved one if it has the result, else the main one.
    """
    for mask, main in study.main_runs.items():
        runs = [study.solved.get(mask), main]
        run = next((run for run in runs if run and run.analysis("routes.json")), None)
        if run is not None:
            draws = study.draws(*CONTROLS["llm"], solved=run.is_solved)
            random = [draw[mask] for draw in draws if mask in draw]
            yield mask, run, [other for other in random if other.analysis("routes.json")]


def _check_same_questions(run: ProbeRun, draw: ProbeRun) -> None:
    one = run.analysis("routes.json")
    other = draw.analysis("routes.json")
    alike = ("questions_sha256", "limit", "window", "stride", "seed")
    if any(one["options"][key] != other["options"][key] for key in alike):
        raise UserError(
            f"{run.path} and {draw.path} were asked different questions; run `probes routes` alike"
        )


def _select(run: ProbeRun) -> dict[str, Any]:
    results = run.analysis("routes.json")
    return {key: results[key] for key in KEYS} | {"sinks": sinks_of(run)}


def models_of(of_mask: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what was measured of the trained model and of each random LLM, by name."""
    return {"trained": of_mask} | {
        f"random LLM, draw {entry['draw']}": entry for entry in of_mask["random"]
    }


def accuracy_rows(routes: dict[str, dict[str, Any]]) -> Rows:
    """Return the accuracy of answers, then of the probe at each site, at the same places."""
    rows = []
    for mask, of_mask in routes.items():
        for model, entry in models_of(of_mask).items():
            common = {"image_attention": mask, "model": model}
            rows.append(common | {"read_by": "answer"} | _numbers(entry["accuracy"], "accuracy"))
            rows += [
                common
                | {"read_by": f"probe at {site['site']}"}
                | _numbers(site["accuracy"], "accuracy")
                | _numbers(site["difference"], "answer_minus_probe")
                | {"agreement": site["agreement"]["value"]}
                for site in entry["sites"]
            ]
    return rows


def _numbers(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: entry["value"]} | bounds(entry["ci95"], f"{name}_")


def routes_figure(of_mask: dict[str, Any]) -> FigureData:
    """Draw a panel per target; the CSV file has all routes, windows and models."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    for ax, target in zip(figure.subplots(1, 3), TARGETS, strict=True):
        ax.axhline(0, color="black", lw=0.8)
        ax.set_title(f"to {target}", fontsize=9)
        ax.set_xlabel("layers that are cut", fontsize=8)
        ax.set_ylabel("right answer (nats)", fontsize=8)
        for layer in layers_with_sinks(of_mask["sinks"]):
            ax.axvspan(layer - 0.5, layer + 0.5, color=SINK_COLOUR, lw=0)
        for entry in of_mask["random"]:
            _draw(ax, entry, target, random=True)
        _draw(ax, of_mask, target)
        ax.legend(fontsize=7)
    return FigureData(figure, route_rows(of_mask))


def _draw(
    ax: Axes,
    entry: dict[str, Any],
    target: str,
    random: bool = False,
) -> None:
    effects = [effect for effect in entry["effects"] if effect["target"] == target]
    for number, source in enumerate(DRAWN):
        for effect in (effect for effect in effects if effect["source"] == source):
            windows = effect["windows"]
            middles = [sum(window["layers"]) / 2 for window in windows]
            end = windows[-1]["layers"][1] + 1
            colour = COLOURS[number % len(COLOURS)]
            values = [window["value"] for window in windows]
            if random:
                ax.plot(middles, values, ":", color=colour, lw=1)
                ax.plot(
                    [end],
                    [effect["all"]["value"]],
                    "x",
                    color=colour,
                    ms=4,
                )
                continue
            points = [
                {
                    "layer": middle,
                    "value": window["value"],
                    "curve": f"from {source}",
                }
                | bounds(window["ci95"])
                for middle, window in zip(middles, windows, strict=True)
            ]
            look = {
                "color": colour,
                "marker": "o",
                "ms": 3,
                "band": True,
            }
            curves(ax, points, {f"from {source}": look}, x="layer")
            shifted = end + 0.12 * number
            ax.plot([shifted] * 2, effect["all"]["ci95"], color=colour, lw=1.3)
            ax.plot(
                [shifted],
                [effect["all"]["value"]],
                "s",
                color=colour,
                ms=4,
            )


def route_rows(of_mask: dict[str, Any]) -> Rows:
    """Return the changes in nats and of answers, by model, route and layers."""
    rows = []
    for model, entry in models_of(of_mask).items():
        for effect in entry["effects"]:
            common = {
                "model": model,
                "source": effect["source"],
                "target": effect["target"],
            }
            pairs = [("all", [1, entry["layers"]], effect["all"], effect["changed"])]
            pairs += [
                ("{}-{}".format(*window["layers"]), window["layers"], window, changed)
                for window, changed in zip(
                    effect["windows"], effect["changed_windows"], strict=True
                )
            ]
            for layers, ends, right, changed in pairs:
                numbers = {"nats": right["value"]} | bounds(right["ci95"], "nats_")
                numbers |= {"changed": changed["value"]} | bounds(changed["ci95"], "changed_")
                if layers == "all":
                    numbers["right"] = effect["right"]["value"]
                if entry["sinks"]["layers"]:
                    numbers["can_cut_sink"] = meets_sink(
                        range(ends[0], ends[1] + 1), entry["sinks"]
                    )
                rows.append(common | {"layers": layers} | numbers)
    return rows


def describe_answers(mask: str, of_mask: dict[str, Any]) -> str:
    """Return one sentence per mask: how many answers are right, beside the probe at the same places."""
    sites = {site["site"]: site for site in of_mask["sites"]}
    site = sites.get(of_mask["peak_site"], of_mask["sites"][-1])
    text = (
        f"{mask.capitalize()}: at {_percent(of_mask['accuracy'])} of {of_mask['questions']} questions, the right class "
        f"is the model's most probable answer of all classes; at {_percent(site['accuracy'])}, it is that of the probe "
        f"at {site['site']} (both say the same in {site['agreement']['value']:.0%})"
    )
    for model, entry in models_of(of_mask).items():
        if entry is not of_mask:
            text += f"; {model}: {_percent(entry['accuracy'])}"
    return f"{text}."


def _percent(entry: dict[str, Any]) -> str:
    return estimate_text(entry, ".1%")


def summarize(mask: str, of_mask: dict[str, Any]) -> str:
    """Return one sentence per mask: what text reads from the object's patches."""
    effects = {(effect["source"], effect["target"]): effect for effect in of_mask["effects"]}
    own = _nats(effects["object", "text"])
    random = _nats(effects["random", "text"])
    more = _nats(effects["object - random", "text"])
    return (
        f"{mask.capitalize()}: if no text attends to the patches that a question is about, the right answer's "
        f"log-probability changes by {own}; without as many random patches by {random} (difference {more})."
    )


def _nats(effect: dict[str, Any]) -> str:
    low, high = effect["all"]["ci95"]
    return f"{effect['all']['value']:+.3f} nats [{low:+.3f}, {high:+.3f}]".replace("-", "−")
