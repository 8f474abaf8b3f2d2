"""Catalogue of the page's figures: file name, section, title and caption of each, and when it appears."""

from collections.abc import Iterator
from statistics import mean
from typing import Any

import numpy as np

from probes.analyses.knockout.effects import read_cases
from probes.data.palette import palette_of
from probes.models.sites import ADAPTER, ENCODER
from probes.report import tables
from probes.report.answers import answers_by_mask
from probes.report.beyond_classes import group_by_seed, is_control
from probes.report.probe_sensitivity import one_per_value, read_variants, select_variants
from probes.report.study import MASKS, Study, is_solved
from probes.report.summary_text import ANSWERS_SECTION, MASKS_SECTION, PATH_SECTION, SCALE_SECTION, SEEDS_SECTION
from probes.results.probe_run import ProbeRun
from probes.results.task_run import TaskRun

from . import answers as answer_figures
from . import (
    beyond_classes,
    claims,
    confusion,
    feature_statistics,
    knockout,
    knockout_controls,
    layer_curves,
    maps,
    mask_comparison,
    patching,
    path,
    probe_sensitivity,
    starvation,
    training_budget,
)
from .style import ReportFigure

Figures = Iterator[ReportFigure]

CLAIMS = "Claims beside controls"
STARVATION, KNOCKOUT, MAPS = "Context starvation", "Attention knockout", "Predicted segmentation maps"
PATCHING, TASKS_SECTION = "Activation patching", "Beyond classes"
BUDGET, OVERVIEW = "Probe training budget", "Across models and datasets"
INTERVALS = "Lines: 95% intervals."


def study_figures(study: Study, results: dict[str, Any]) -> Figures:
    """Yield all figures of a study, in the order of the page; `results` is its part of results.json."""
    palette = palette_of(study.first.dataset())
    solved_main = is_solved(study.first)
    if study.solved and not solved_main:
        yield _layer_figure(study, "layers_solved", "Segmentation quality by layer, probes at their optimum", True)
    yield _layer_figure(study, "layers", "Segmentation quality by layer", solved_main)
    if any("by_draw" in claim["verdicts"]["beyond_random"] for claim in results["claims"]):
        yield ReportFigure(
            "claims", CLAIMS, "Trained and random models",
            "The number of each claim. Look for circles that lie beyond the diamonds: what random LLMs that change the "
            "states as much show as well (the adapter's drop: random adapters) need not be learned. Diamonds were "
            f"probed at the optimum, like filled circles. {INTERVALS}",
            claims.claim_values(results["claims"]))  # fmt: skip
    if results["paired"]:
        yield ReportFigure(
            "paired_sites", MASKS_SECTION, "Difference by site",
            "mIoU under bidirectional minus causal attention on the same images (Fig. 8). Look for layers whose "
            "interval excludes zero. Lines: paired 95% intervals. Filled: significant in a permutation test, corrected "
            f"for {len(results['paired']['sites'])} sites.",
            mask_comparison.mask_difference(results["paired"]))  # fmt: skip
    if results["starvation"]:
        yield from _starvation_figures(results["starvation"], study.pair()[1].analysis("starvation.json"))
    yield from _knockout_figures(study, results["knockout_inference"])
    for mask, run in study.trained.items():
        yield from _knockout_control_figures(mask, run)
    if answers := answers_by_mask(results):
        yield ReportFigure(
            "answers", ANSWERS_SECTION, "Answers and probes at the same places",
            "Left: accuracy of the model's answers to questions about places (bands), and of the probes there "
            "(points). Right: change of the right answer's log-probability among the class names when the tokens of a "
            "class are hidden from other image tokens, as means over classes. Grey: random LLMs that change the states "
            "as much as the trained one. Exploratory: the paper makes no claim about answers. Lines and bands: 95% "
            "intervals over images, and over classes on the right.",
            answer_figures.answers_and_probes(answers), "wide")  # fmt: skip
    for mask, patched in ((mask, entry["patching"]) for mask, entry in results["masks"].items()):
        if patched:
            yield ReportFigure(
                f"patching_{mask}", PATCHING, f"Replaced states, {mask}",
                "Change of the log-odds of the right class at patches whose own states are not replaced, as read at "
                f"{patched['site']}, when the states of a set of tokens are replaced at one layer. Look for the layers "
                "from which on a set's states change nothing elsewhere: by then it has passed on what others take. "
                "Dotted: as many random tokens. Exploratory: the paper makes no claim about it. Bands: 95% intervals "
                "over images, for all layers together.",
                patching.patching_effects(patched), "wide")  # fmt: skip
    for mask, pairs in results["confusion"].items():
        yield ReportFigure(
            f"confusion_{mask}", "Confused classes by layer", f"Most confused classes, {mask}",
            "Share of a class's pixels that are predicted as another class, for the pairs confused most at the "
            "adapter (Sec. 3.3). Look for rows that fade to the right. Green bar: from this layer on, at least half of "
            "the adapter's confusion is gone; rows without a bar keep more than half.",
            confusion.confusion_map(study.trained[mask], pairs), "wide")  # fmt: skip
    yield from _map_figures(study, palette)
    yield from _path_figures(study, results)
    yield from _variant_figures(study, results["scale"])
    yield from _probe_figures(study)


def _caption(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _layer_figure(study: Study, name: str, title: str, solved: bool) -> ReportFigure:
    untrained = study.solved_untrained if solved else study.untrained
    return ReportFigure(
        name, "Drop-off and recovery", title,
        _caption(
            "Segmentation quality of the probe at each site (Figs. 3 and 8). Look for a drop from encoder to adapter "
            "and a rise over the LLM layers.", _peak_caption(study),
            "Dotted: the untrained model." if untrained else "",
            "Diamonds: random LLMs that change the states as much as the trained one; what they reach as well need "
            "not be learned." if study.random_draws("llm", solved) else "", "Bands: 95% intervals.",
        ),
        layer_curves.layer_curves(study, solved))  # fmt: skip


def _peak_caption(*studies: Study) -> str:
    runs = [run for study in studies for run in study.trained.values()]
    marked = any(ADAPTER in run.sites and len(run.layers) > 1 for run in runs)
    return "Dashed: the best layer, with its gain over the adapter in percentage points." if marked else ""


def _starvation_figures(result: dict[str, Any], analysis: dict[str, Any] | None) -> Figures:
    yield ReportFigure(
        "starvation", STARVATION, "Accuracy gap by patch",
        f"Accuracy under bidirectional minus causal attention at {result['site'].replace('_', ' ')}, for the first "
        "patches in raster order (Fig. 7). Look for a gap at the first patches, which attend to few other patches "
        f"under causal attention. {INTERVALS}",
        starvation.starvation_curve(result))  # fmt: skip
    yield ReportFigure(
        "starvation_grid", STARVATION, "Accuracy gap in the image",
        "The same gap at each patch's position in the image. Starvation predicts the largest gap at the top left.",
        starvation.starvation_grid(result), "half")  # fmt: skip
    if analysis and "by_class" in analysis:
        yield ReportFigure(
            "starvation_by_class", STARVATION, "Accuracy gap with equal class frequencies",
            "The gap of the first patches as measured, and reweighted so that every patch has the class frequencies of "
            f"the full split. Early patches often show only a few classes. {INTERVALS}",
            starvation.compare_gaps(
                analysis, analysis["by_class"], ("measured", "same class frequencies"), "standardised"
            ))  # fmt: skip
    if analysis and "by_position" in analysis:
        yield ReportFigure(
            "starvation_own_probe", STARVATION, "Accuracy gap with a probe for each position",
            "The gap of the first patches when one probe reads all positions, and when each position has its own. Both "
            "are solved in closed form from the same states, so the difference is due to the shared probe, not to "
            "missing information; a shared probe at the optimum of the loss may be closer to the points. At the "
            "adapter no mask has acted yet; a gap there comes from training. "
            f"{INTERVALS}",
            starvation.own_probe_gaps(analysis["by_position"]))  # fmt: skip
    if analysis and "dummy_tokens" in analysis:
        dummy = analysis["dummy_tokens"]
        changes = (
            f"{mask} {100 * change['patch_0']['value']:+.1f} [{low:+.1f}, {high:+.1f}] pp"
            for mask, change in dummy["change"].items()
            for low, high in [[100 * bound for bound in change["patch_0"]["ci95"]]]
        )
        yield ReportFigure(
            "starvation_dummy_tokens", STARVATION, "Accuracy gap with dummy tokens",
            "The gap of the first patches as measured, and with tokens without information before the image (number: "
            f"{dummy['tokens']}). If the gap shrinks because causal accuracy rises, early patches lacked an attention "
            "sink, not context. A fall can be the frozen probe's, which has never read states after such a prompt. "
            f"Change of accuracy at patch 0: {', '.join(changes)}. {INTERVALS}",
            starvation.compare_gaps(analysis, dummy, ("measured", "with dummy tokens"), "with_tokens"))  # fmt: skip
        if "by_position" in dummy:
            yield ReportFigure(
                "starvation_dummy_own_probe", STARVATION, "The same with probes solved after dummy tokens",
                "The gap of the first patches when the probes, too, are solved from states with the tokens before the "
                f"image: one for all positions, and one for each. {INTERVALS}",
                starvation.own_probe_gaps(dummy["by_position"]), "half")  # fmt: skip
    for flip in analysis.get("flips", []) if analysis else ():
        accuracies = (f"{mask} {mean(analysis[mask]):.0%} → {mean(flip[mask]):.0%}" for mask in MASKS)
        yield ReportFigure(
            f"starvation_{flip['flip']}", STARVATION, f"Position or content? ({flip['flip']})",
            "Left: the gap on upright images. Right: the gap on transformed images. A gap caused by position stays in "
            f"place; a gap caused by image content moves with the content. Result: {flip['follows']}. Mean accuracy, "
            f"upright → transformed: {', '.join(accuracies)}.",
            knockout_controls.flip_gaps(analysis, flip))  # fmt: skip


def _knockout_figures(study: Study, inference: dict[str, dict[str, Any]]) -> Figures:
    runs = {mask: run for mask, run in study.trained.items() if read_cases(run, 1)}
    for mask, run in runs.items():
        yield ReportFigure(
            f"knockout_{mask}", KNOCKOUT, f"Wrong patches left, {mask}",
            "Share of the adapter's wrong patches still wrong at each layer, over all images and classes (Fig. 11). "
            "The paper expects red (wrong class blocked) below grey (no blocking) and blue (correct class blocked) "
            "above it. Dotted: as many random patches blocked. Bands: 95% intervals over images.",
            knockout.knockout_curves(run), "half")  # fmt: skip
    for mask, of_mask in inference.items():
        yield from _inference_figures(mask, of_mask)
    for mask, run in runs.items():
        yield ReportFigure(
            f"knockout_classes_{mask}", KNOCKOUT, f"Wrong patches left by class, {mask}",
            "The same curves per wrongly predicted class: no blocking (grey), wrong class blocked (red), correct class "
            "blocked (blue).",
            knockout.knockout_by_class(run), "wide")  # fmt: skip


def _inference_figures(mask: str, inference: dict[str, Any]) -> Figures:
    by_table = tables.knockout_tables({mask: inference})
    if by_table["knockout_selection"]:
        yield ReportFigure(
            f"knockout_selection_{mask}", KNOCKOUT, f"Effect by image selection, {mask}",
            "The two effects in the later half of the layers, as means over classes, by the minimum number of wrong "
            "patches per image. On the left, single patches on boundaries dominate; on the right, entire regions "
            "predicted as another class, in fewer classes. The claims use the leftmost point. Lines: 95% t intervals "
            "over classes.",
            knockout.knockout_selection(by_table["knockout_selection"]), "half")  # fmt: skip
    if inference["criterion_shifts"]:
        yield ReportFigure(
            f"knockout_shifts_{mask}", KNOCKOUT, f"Criterion shifts, {mask}",
            "Of the patches of two look-alike classes that the adapter calls one of them: the change, when either "
            "class is hidden, in the share called the first minus the share called the second. Anchors predict "
            "opposite directions. Filled: both move the same way, so the probe's criterion has shifted, and the "
            "effects of these classes are no evidence of anchors. Lines: 95% intervals for all pairs together.",
            knockout.criterion_shifts(inference, by_table["knockout_shifts"]), "half")  # fmt: skip
    if by_table["knockout_classes"]:
        shifted = knockout.shifted_classes(inference)
        matched = any(row["effect"].endswith("_matched") for row in by_table["knockout_classes"])
        yield ReportFigure(
            f"knockout_effects_{mask}", KNOCKOUT, f"Effects by class, {mask}",
            _caption(
                "Effects in the later half of the layers, class by class. Green: as the paper claims. Red: the "
                "opposite. Hollow: not significant with Holm's correction for the number of classes. Diamonds: means "
                "over classes, and over pairs of look-alikes, with t intervals for classes in general. Other lines: "
                "95% intervals of each class alone.",
                "Squares: against tokens matched in distance and attention." if matched else "",
                "†: the probe's criterion shifts between this class and its look-alike." if shifted else "",
            ),
            knockout.class_effects(inference, by_table["knockout_classes"]), "wide")  # fmt: skip


def _knockout_control_figures(mask: str, run: ProbeRun) -> Figures:
    result, sweep = run.analysis("knockout.json"), run.analysis("knockout_windows.json")
    figures = []
    if result and result.get("effects"):
        labels = knockout_controls.CONTROL_LABELS
        controls = {entry["control"].split("_")[0] for entry in result["effects"] if entry["class"] == "all"}
        yield ReportFigure(
            f"knockout_controls_{mask}", KNOCKOUT, f"Effects against controls, {mask}",
            "Change in wrong patches left when a class is blocked, against no blocking and against blocking as many "
            f"{' or '.join(text for name, text in labels.items() if name in controls)} patches. Correct − wrong "
            f"measures how class-specific the effect is. Mean over the cases of all classes. {INTERVALS}",
            knockout_controls.control_effects(result))  # fmt: skip
        figures += [
            ("knockout_doses", "Effect by share of blocked patches", knockout_controls.dose_effects(result), "half",
             f"The same effects when only a random share of the class's patches is blocked. {INTERVALS}"),
            ("attention", "Attention of wrong patches", knockout_controls.attention_shares(result), "half",
             "Attention of wrong patches in the unmodified model, by what the adapter's probe predicts for the "
             "attended patch. Dashed: expected share under uniform attention."),
        ]  # fmt: skip
    if sweep:
        figures += [
            ("knockout_windows", "Effect by layers cut", knockout_controls.window_effects(sweep), "wide",
             "Effect against as many random patches when only some layers are cut. Rows: first layer cut (for up to "
             "layer, the last). Columns: layer read. Look for windows after which the effect persists: these "
             "layers correct patches."),
            ("knockout_heads", "Effect by attention head cut", knockout_controls.head_effects(sweep), "full",
             "Effect against as many random patches when a single head of a single layer is cut."),
        ]  # fmt: skip
    for name, title, data, width, caption in figures:
        if data is not None:
            yield ReportFigure(f"{name}_{mask}", KNOCKOUT, f"{title}, {mask}", caption, data, width)


def _map_figures(study: Study, palette: np.ndarray) -> Figures:
    for mask, run in study.trained.items():
        if not (result := run.analysis("maps.json")):
            continue
        yield ReportFigure(
            f"maps_{mask}", MAPS, f"Predictions by layer, {mask}",
            "Predictions from the encoder to the best layer (Figs. 4 and 13). Look for confusions that appear at the "
            "adapter and disappear over the layers.",
            maps.site_maps(run, palette), "wide")  # fmt: skip
        for case in result["knockout"]:
            wrong, correct = case["class"], case["correct_class"]
            how = f" ({case['how']})" if case.get("how") else ""
            yield ReportFigure(
                f"knockout_maps_{mask}_{wrong.replace(' ', '_')}", MAPS, f"{correct} predicted as {wrong}, {mask}",
                f"The image with the most patches wrongly predicted as {wrong!r} that also has patches correctly "
                f"predicted as {correct!r}, by layer (Figs. 6 and 12). Rows: no blocking, wrong class blocked, correct "
                f"class blocked{how}.",
                maps.knockout_maps(run, wrong, palette), "wide")  # fmt: skip
    for mask, run in study.trained.items():
        for image in (run.analysis("umap.json") or {"images": []})["images"]:
            yield ReportFigure(
                f"umap_{mask}_{image['image']}", "UMAP of patches", f"Patches of image {image['name']}, {mask}",
                "UMAP of the patches of one image, coloured by class (Fig. 5). UMAP exaggerates the gaps between "
                "clusters, so rely on the numbers above the panels: the share of a patch's ten nearest neighbours in "
                "the original space that have its class.",
                maps.umap_panels(image, run.metrics["classes"], palette))  # fmt: skip


def _path_figures(study: Study, results: dict[str, Any]) -> Figures:
    """Yield the figure of solved probes at every strength."""
    if not results["path"]:
        return
    claims = [claim for claim in results["claims"] if claim["claim"] in path.EFFECTS]
    by_sgd = {(claim["image_attention"], claim["claim"]): claim["value"] for claim in claims}
    by_sgd = {key: value for key, value in by_sgd.items() if not is_solved(study.trained[key[0]])}
    yield ReportFigure(
        "path", PATH_SECTION, "Drop-off and recovery at every strength",
        _caption(
            "Differences of mIoU and of cross-entropy between sites, all with probes of the same strength of "
            "regularisation; above zero, the first site is better. Lines: probes in closed form. Points: probes at the "
            "optimum of the loss. Where some losses explode, the axis is logarithmic away from zero.",
            "Hollow: not converged, not counted." if any(v["not_converged"] for v in results["path"]) else "",
            "Dotted: probes trained with SGD." if by_sgd else "",
            "Check whether a whole curve lies above zero. Bands and bars: 95% intervals that hold at all strengths "
            "together. The best layer is chosen by cross-validation over images.",
        ),
        path.path_effects(results["path"], by_sgd))  # fmt: skip


def _variant_figures(study: Study, scale: dict[str, dict[str, Any]]) -> Figures:
    """Yield the figures of norms and learning rates, heads, seeds and controls.

    Solved probes depend neither on learning rate nor on seed: with them, the path is shown instead.
    """
    runs, keys = study.runs_with_variants, ("feature_norm", "learning_rate")
    if scale and not study.solved:
        curves = {mask: (runs[mask], select_variants(runs[mask], *keys)) for mask in scale}
        yield ReportFigure(
            "scale_effects", SCALE_SECTION, "Drop-off and recovery by norm and learning rate",
            "The two effects by how the probe was trained. Check whether all intervals are on the same side of zero. "
            "Filled: the 95% interval is above zero.",
            probe_sensitivity.effects_by_variant(scale))  # fmt: skip
        yield ReportFigure(
            "scale_curves", SCALE_SECTION, "Curves by norm and learning rate",
            "mIoU by site per probe variant; thick: the main one. Curves that differ in shape, not only in height, "
            "show a dependence on the scale of the features.",
            probe_sensitivity.variant_curves(curves, *keys))  # fmt: skip
    with_labels = lambda run, labels: [v for v in read_variants(run) if v.settings["labels"] == labels]
    heads = {mask: (run, v) for mask, run in runs.items() if (v := one_per_value(with_labels(run, "true"), "head"))}
    if heads:
        yield ReportFigure(
            "heads", "Probe heads", "Linear and nonlinear heads",
            "The same states read by other probe heads, as the paper's limitations suggest. If a nonlinear head closes "
            "the drop-off, the information is present but not linearly readable; otherwise it is lost.",
            probe_sensitivity.variant_curves(heads, "head"))  # fmt: skip
    seeds = {mask: (run, v) for mask, run in runs.items() if (v := one_per_value(select_variants(run, "seed"), "seed"))}
    if seeds and not study.solved:
        yield ReportFigure(
            "seeds", SEEDS_SECTION, "Probes from several seeds",
            "One line per probe seed, and the main seed's interval over images, which does not include the randomness "
            "of probe training. Lines within the band add little to it.",
            probe_sensitivity.seed_curves(seeds))  # fmt: skip
    shuffled = {mask: with_labels(run, "shuffled") for mask, run in runs.items()}
    if any(shuffled.values()):
        yield ReportFigure(
            "controls", "Controls", "Scores without training",
            _caption(
                "Dotted: probes trained on shuffled labels, the score that the probe alone can reach.",
                "Dashed: the untrained model, the score from the architecture alone." if study.untrained else "",
                "Dash-dotted: the most common class everywhere. The rest of the trained curve comes from training.",
            ),
            probe_sensitivity.control_curves(study, shuffled))  # fmt: skip


def _probe_figures(study: Study) -> Figures:
    """Yield the figures of feature statistics and probe training."""
    with_statistics = any("states" in run.metrics["sites"][0] for run in study.untrained.values())
    if all("states" in run.metrics["sites"][0] for run in study.trained.values()):
        yield ReportFigure(
            "states", "Hidden-state statistics", "Scale, anisotropy, neighbourhoods",
            _caption(
                "Statistics of the hidden states, computed without a probe. Look for jumps in scale where mIoU moves.",
                "Dotted: the untrained model." if with_statistics else "",
            ),
            feature_statistics.state_statistics(study))  # fmt: skip
    if not all(entry["history"] for run in study.trained.values() for entry in run.metrics["sites"]):
        return
    yield ReportFigure(
        "budget", BUDGET, "Score by training length",
        _caption(
            f"mIoU by site after fewer epochs than the {study.first.metrics['probe']['epochs']} of the main curve.",
            "Dashed: longer-trained probes." if study.long_runs else "",
            "Under-trained probes show how easily a class can be read, converged ones whether it is present at all.",
        ),
        training_budget.probe_budget(study))  # fmt: skip
    if all("validated_at" in run.metrics["probe"] for run in study.trained.values()):
        yield ReportFigure(
            "budget_steps", BUDGET, "Score by optimiser step",
            "One line per site, from the encoder (light) to the last layer (dark). If a line still rises at the end, "
            "its probe had too few steps.",
            training_budget.score_by_step(study))  # fmt: skip


def task_figures(runs: list[TaskRun], tasks: dict[str, list[dict[str, Any]]]) -> Figures:
    """Yield the figures of other tasks than segmentation.

    Args:
        runs: Runs of tasks; those with `probes maps` have a figure.
        tasks: Entries "tasks", "tasks_starvation" and "joint_tasks_starvation" of results.json.
    """
    results, starved = tasks["tasks"], tasks["tasks_starvation"]
    with_encoder = [entry for entry in results if any(row["site"] == ENCODER for row in entry["sites"])]
    if with_encoder:
        yield ReportFigure(
            "tasks", TASKS_SECTION, "Other tasks by site",
            _caption(
                "The main score of each task in units of the encoder's; where lower is better, its inverse.",
                "Dashed: random weights." if any(entry["control"] for entry in with_encoder) else "",
                "Exploratory: the paper makes no claim about these tasks.", _bands_caption(with_encoder),
            ),
            beyond_classes.tasks_by_site(with_encoder), "wide")  # fmt: skip
    if starved:
        yield ReportFigure(
            "tasks_starvation", TASKS_SECTION, "Starvation of other tasks",
            _caption(
                "Mean error of the pixels under each of the first patches, causal minus bidirectional, at the causal",
                "run's best layer: positive where causal attention is worse. One probe is shared by all positions.",
                "Exploratory.", _bands_caption(starved),
            ),
            beyond_classes.starvation_by_task(starved, tasks["joint_tasks_starvation"]), "wide")  # fmt: skip
    for i, run in enumerate(run for run in runs if run.analysis("maps.json")):
        of = f"{run.task_name}, {run.metrics['image_attention']}, seed {run.metrics['seed']}"
        random = ", random weights" * is_control(run)
        yield ReportFigure(
            f"tasks_maps_{i}", TASKS_SECTION, f"Predictions by layer, {of}{random}",
            "Target and predictions of an image share their colours; black: no value. Single images are no evidence.",
            maps.task_maps(run), "wide")  # fmt: skip


def _bands_caption(entries: list[dict[str, Any]]) -> str:
    """Return what lines and bands are; with several seeds, the band is that of their mean."""
    several = [len(group) > 1 for group in group_by_seed(entries)]
    if not any(several):
        return "Bands: 95% intervals over images."
    alone = "" if all(several) else "; over images where there is one seed only"
    return f"Thin: one seed; thick: their mean. Bands: 95% intervals over seeds{alone}."


def overview_figures(studies: list[Study]) -> Figures:
    """Yield the figures that compare several models and datasets."""
    for mask in MASKS:
        with_mask = [study for study in studies if mask in study.trained]
        with_adapter = [study for study in with_mask if ADAPTER in study.trained[mask].sites]
        if with_mask:
            yield ReportFigure(
                f"models_{mask}", OVERVIEW, f"All models, {mask}",
                _caption("mIoU by site, one line per model (Figs. 3 and 9).", _peak_caption(*with_mask),
                         "Bands: 95% intervals."),
                layer_curves.models_by_dataset(with_mask, mask))  # fmt: skip
        if with_adapter:
            yield ReportFigure(
                f"over_adapter_{mask}", OVERVIEW, f"Recovery of all models, {mask}",
                "The same curves minus their value at the adapter (Fig. 10), to compare models with different depths "
                "and encoders.",
                layer_curves.models_by_dataset(with_adapter, mask, over_adapter=True))  # fmt: skip
    both = [study for study in studies if study.pair()]
    if both:
        yield ReportFigure(
            "masks", OVERVIEW, "Causal and bidirectional attention",
            _caption("Both masks of every model (Fig. 8).", _peak_caption(*both), "Bands: 95% intervals."),
            layer_curves.masks_by_model(both))  # fmt: skip
