"""What the report shows of answers: right ones beside probes, and effects of cut routes, also of random LLMs."""

from collections.abc import Iterator
from typing import TypedDict

from llava_bidir.common.errors import UserError
from probes.analyses.analysis import Section
from probes.analyses.charts import Chart, Curve, Figure, Point
from probes.analyses.sinks import Sinks, describe_sinks, layers_with_sinks, meets_sink, sinks_of
from probes.runs.formatting import Rows, bounds
from probes.runs.read import ProbeRun
from probes.runs.study import CONTROLS, StudyRuns
from probes.score.estimate import EstimateEntry, estimate_text

from .blank import describe_regimes
from .cuts import TARGETS, RouteEffect, SiteAnswers

KEYS = ("questions", "images", "layers", "accuracy", "sites", "effects")  # of routes.json
# sources with their colours; the last one is on top
DRAWN = {"random": "grey", "image": 1, "object": 0}


class ModelRoutes(TypedDict, total=False):
    """What was measured of a model: `KEYS` of routes.json, and its sinks."""

    draw: int  # of a random LLM
    questions: int
    images: int
    layers: int
    accuracy: EstimateEntry
    sites: list[SiteAnswers]
    effects: list[RouteEffect]
    regimes: dict[str, dict]
    sinks: Sinks


class MaskRoutes(ModelRoutes):
    """What was measured of the trained model under a mask, and of random LLMs."""

    peak_site: str  # best decoder layer by mIoU
    random: list[ModelRoutes]


def section(study: StudyRuns) -> Section:
    """Return the section of a study: a figure for each mask."""
    routes = study_routes(study)
    by_mask = {"routes": {mask: routes.get(mask) for mask in study.main_runs}}
    figures = []
    sentences = []
    for mask, of_mask in routes.items():
        figures.append(routes_figure(mask, of_mask))
        sentences += [describe_answers(mask, of_mask), summarize(mask, of_mask)]
        if of_mask["regimes"]:
            sentences.append(describe_regimes(mask, of_mask["regimes"]))
        if text := describe_sinks(mask, of_mask["sinks"]):
            sentences.append(f"{text} Grey in the figure.")
    tables = {"answer_accuracy": accuracy_rows(routes)}
    results = {}
    if routes:
        results["routes"] = next(iter(routes.values()))["regimes"]
    return Section(figures, sentences, tables, results=results, by_mask=by_mask)


def study_routes(study: StudyRuns) -> dict[str, MaskRoutes]:
    """Return the results by mask, of the solved run if it has some, else of the main one; masks without are missing.

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
    options = run.analysis("routes.json")["options"]
    options_of_draw = draw.analysis("routes.json")["options"]
    alike = ("questions_sha256", "limit", "window", "stride", "seed")
    if any(options[key] != options_of_draw[key] for key in alike):
        raise UserError(
            f"{run.path} and {draw.path} were asked different questions; run `probes routes` alike"
        )


def _select(run: ProbeRun) -> ModelRoutes:
    results = run.analysis("routes.json")
    measured = {key: results[key] for key in KEYS}
    regimes = results.get("regimes", {})  # earlier results have none
    return measured | {"regimes": regimes, "sinks": sinks_of(run)}


def models_of(of_mask: MaskRoutes) -> dict[str, ModelRoutes]:
    """Return what was measured of the trained model and of each random LLM, by name."""
    return {"trained": of_mask} | {
        f"random LLM, draw {entry['draw']}": entry for entry in of_mask["random"]
    }


def accuracy_rows(routes: dict[str, MaskRoutes]) -> Rows:
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


def _numbers(entry: EstimateEntry, name: str) -> dict[str, float | None]:
    return {name: entry["value"]} | bounds(entry["ci95"], f"{name}_")


def routes_figure(mask: str, of_mask: MaskRoutes) -> Figure:
    """Return a panel per target; the CSV file has all routes, windows and models."""
    sinks = layers_with_sinks(of_mask["sinks"])
    caption = (
        "Change of the right answer's log-probability when no token of the target attends to the source, in "
        "windows of layers (points, at the middle of the window) and in all layers (right, with its interval). object: "
        "patches that the question is about; random: as many others. Thin: random LLMs. Bands: 95% intervals over "
        "images, for all windows of a route together."
    )
    if sinks:
        caption += " Grey ground: layers in which image tokens attend to an attention sink."
    return Figure(
        name=f"routes_{mask}",
        title=f"Routes of answers, {mask}",
        caption=caption,
        panels=[target_chart(of_mask, target, sinks) for target in TARGETS],
        rows=route_rows(of_mask),
    )


def target_chart(of_mask: MaskRoutes, target: str, sinks: list[int]) -> Chart:
    """Return the panel of a target."""
    random = [curve for entry in of_mask["random"] for curve in route_curves(entry, target)]
    curves = [Curve(curve.points, style="thin") for curve in random]
    curves += route_curves(of_mask, target)
    effects = of_target(of_mask, target)
    windows = effects[0]["windows"]
    ticks = {}
    for window in windows:
        first, last = window["layers"]
        ticks[(first + last) / 2] = f"{first}–{last}"
    end = windows[-1]["layers"][1] + 1
    ticks[end] = "all"
    for effect in effects:
        of_all = effect["all"]
        low, high = of_all["ci95"]
        point = Point(x=end, value=of_all["value"], low=low, high=high, title="all layers")
        colour = DRAWN[effect["source"]]
        curves.append(Curve([point], colour=colour, style="dots", mark="circle"))
    return Chart(
        curves,
        ticks,
        f"to {target}",
        "right answer, nats, by layers that are cut",
        scale=1,
        signed=True,
        shaded=sinks,
    )


def of_target(entry: ModelRoutes, target: str) -> list[RouteEffect]:
    """Return the effects of the sources that are drawn, in their order."""
    by_source = {}
    for effect in entry["effects"]:
        if effect["target"] == target:
            by_source[effect["source"]] = effect
    return [by_source[source] for source in DRAWN if source in by_source]


def route_curves(entry: ModelRoutes, target: str) -> list[Curve]:
    """Return a curve over the windows for each source of a target."""
    curves = []
    for effect in of_target(entry, target):
        points = [
            Point(sum(window["layers"]) / 2, window["value"], *window["ci95"])
            for window in effect["windows"]
        ]
        source = effect["source"]
        curves.append(Curve(points, f"from {source}", DRAWN[source], mark="circle", band=True))
    return curves


def route_rows(of_mask: MaskRoutes) -> Rows:
    """Return the changes in nats and of answers, by model, route and layers."""
    rows = []
    for model, entry in models_of(of_mask).items():
        for effect in entry["effects"]:
            common = {"model": model, "source": effect["source"], "target": effect["target"]}
            cuts = [("all", 1, entry["layers"], effect["all"], effect["changed"])]
            for window, changed in zip(effect["windows"], effect["changed_windows"], strict=True):
                first, last = window["layers"]
                cuts.append((f"{first}-{last}", first, last, window, changed))
            for layers, first, last, right, changed in cuts:
                numbers = {"nats": right["value"]} | bounds(right["ci95"], "nats_")
                numbers |= {"changed": changed["value"]} | bounds(changed["ci95"], "changed_")
                if layers == "all":
                    numbers["right"] = effect["right"]["value"]
                if entry["sinks"]["layers"]:
                    cut = range(first, last + 1)
                    numbers["can_cut_sink"] = meets_sink(cut, entry["sinks"])
                rows.append(common | {"layers": layers} | numbers)
    return rows


def describe_answers(mask: str, of_mask: MaskRoutes) -> str:
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


def _percent(entry: EstimateEntry) -> str:
    return estimate_text(entry, ".1%")


def summarize(mask: str, of_mask: MaskRoutes) -> str:
    """Return one sentence per mask: what text reads from the object's patches."""
    effects = {(effect["source"], effect["target"]): effect for effect in of_mask["effects"]}
    without_object = _nats(effects["object", "text"])
    without_random = _nats(effects["random", "text"])
    difference = _nats(effects["object - random", "text"])
    return (
        f"{mask.capitalize()}: if no text attends to the patches that a question is about, the right answer's "
        f"log-probability changes by {without_object}; without as many random patches by {without_random} "
        f"(difference {difference})."
    )


def _nats(effect: RouteEffect) -> str:
    return f"{estimate_text(effect['all'], '+.3f')} nats"
