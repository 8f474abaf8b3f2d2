"""Figures of mIoU by site that compare several models, datasets and masks (Figs. 3, 8, 9, 10)."""

from matplotlib.lines import Line2D

from probes.analyses.style import (
    COLOURS,
    FigureData,
    Figures,
    ReportFigure,
    caption,
    curves,
    has_depth,
    label_sites,
    mask_colour,
    new_panels,
    site_depth,
    spread_labels,
)
from probes.models.sites import ADAPTER, is_layer, layer_number
from probes.runs.formatting import Rows
from probes.runs.probe_run import ProbeRun
from probes.runs.study import CONTROLS, MASKS, StudyRuns, runs_to_compare

from .layer_curves import (
    MIOU,
    POINTS,
    TRAINED,
    mark_best,
    peak_caption,
    points_of,
    score_rows,
    sites_of,
)

MARKERS = "os^Dv"  # of encoders


def models_by_dataset(
    studies: list[StudyRuns], mask: str, over_adapter: bool = False
) -> FigureData:
    """Draw the curves of models with a run under the mask, one panel per dataset (Figs. 3, 9), and their random LLMs.

    `over_adapter` draws mIoU minus the adapter's instead (Fig. 10).
    """
    runs = [of_study[mask] for of_study in runs_to_compare(*studies)]
    names = [f"{s.model}{kind}" for s, kind in zip(studies, _kinds_of_probes(runs), strict=True)]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}
    datasets = list(dict.fromkeys(study.dataset for study in studies))
    figure, axes = new_panels(len(datasets), height=3.6 if len(datasets) == 1 else 2.9, columns=2)
    panels = dict(zip(datasets, axes, strict=True))
    rows: Rows = []
    for study, run, name in zip(
        studies,
        runs,
        names,
        strict=True,
    ):
        about = {
            "model": study.model,
            "dataset": study.dataset,
        }
        ax = panels[study.dataset]
        look = {"color": colours[name]}
        scores = score_rows([run])
        if over_adapter:
            scores = _over_adapter(scores)
            points = _over_adapter(points_of(name, run))
            curves(
                ax,
                points,
                {name: look | {"lw": 1.8}},
                y="over_adapter",
                scale=100,
            )
        else:
            curves(
                ax,
                points_of(name, run),
                {name: TRAINED | look},
                **MIOU,
            )
            mark_best(ax, run, colours[name])
            for draw in study.draws(*CONTROLS["llm"], solved=run.is_solved):
                if mask in draw:
                    points = points_of(name, draw[mask], is_layer)
                    curves(
                        ax,
                        points,
                        {name: POINTS | look},
                        **MIOU,
                    )
        rows += [about | row for row in scores]
    for dataset, ax in panels.items():
        if over_adapter:
            ax.axhline(0, color="black", lw=0.8)
        sites = {row["site"] for row in rows if row["dataset"] == dataset}
        label_sites(ax, sorted(filter(has_depth, sites), key=site_depth), 8)
        ax.set_title(dataset, fontsize=10)
    lines = [
        Line2D(
            [],
            [],
            color=colour,
            label=name,
        )
        for name, colour in colours.items()
    ]
    figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=2,
        fontsize=8,
    )
    axes[0].set_ylabel("mIoU minus the adapter's (pp)" if over_adapter else "mIoU (%)")
    spread_labels(figure, axes)
    return FigureData(figure, rows)


def encoders_by_dataset(studies: list[StudyRuns]) -> FigureData:
    """Draw the curves of bare encoders over the depth of their layers, one panel per dataset.

    Depths are fractions of the last layer's, so that encoders with other numbers of layers can be compared; the table
    has the layers.
    """
    models = list(dict.fromkeys(study.model for study in studies))
    looks = {
        model: TRAINED
        | {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        for i, model in enumerate(models)
    }
    datasets = list(dict.fromkeys(study.dataset for study in studies))
    figure, axes = new_panels(len(datasets), height=3.6 if len(datasets) == 1 else 2.9, columns=2)
    runs = [next(iter(by_mask.values())) for by_mask in runs_to_compare(*studies)]
    names = [study.model for study in studies]
    kinds = dict(zip(names, _kinds_of_probes(runs), strict=True))
    rows: Rows = []
    for dataset, ax in zip(datasets, axes, strict=True):
        points: Rows = []
        for study, run in zip(studies, runs, strict=True):
            if study.dataset == dataset:
                last = layer_number(run.last_layer)
                points += [
                    row | {"depth": row["depth"] / last} for row in points_of(study.model, run)
                ]
                about = {
                    "model": study.model,
                    "dataset": dataset,
                }
                rows += [about | row for row in score_rows([run])]
        curves(
            ax,
            points,
            looks,
            **MIOU,
        )
        ax.set_title(dataset, fontsize=10)
        ax.set_xlabel("depth: layer / last layer")
    lines = [
        Line2D(
            [],
            [],
            color=look["color"],
            marker=look["marker"],
            label=model + kinds[model],
        )
        for model, look in looks.items()
    ]
    figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=2,
        fontsize=8,
    )
    axes[0].set_ylabel("mIoU (%)")
    return FigureData(figure, rows)


def _over_adapter(rows: Rows) -> Rows:
    """Return the rows of a run with the column "over_adapter", mIoU minus the adapter's."""
    adapter = next(row["miou"] for row in rows if row["site"] == ADAPTER)
    return [row | {"over_adapter": row["miou"] - adapter} for row in rows]


def _kinds_of_probes(runs: list[ProbeRun]) -> list[str]:
    """Return the kind of probes of each run for a label; empty if all are of one kind."""
    mixed = len({run.is_solved for run in runs}) > 1
    return [f", {run.probe_kind} probes" if mixed else "" for run in runs]


def masks_by_model(studies: list[StudyRuns]) -> FigureData:
    """Draw causal and bidirectional curves, one panel per model and dataset (Fig. 8)."""
    figure, axes = new_panels(len(studies))
    solved = all(study.solved.keys() >= set(MASKS) for study in studies)
    pairs = [
        [study.solved[mask] for mask in MASKS] if solved else study.pair() for study in studies
    ]
    kinds = _kinds_of_probes([pair[0] for pair in pairs])
    looks = {mask: TRAINED | {"color": mask_colour(mask)} for mask in MASKS}
    rows: Rows = []
    for ax, study, pair, kind in zip(
        axes,
        studies,
        pairs,
        kinds,
        strict=True,
    ):
        points = [row for run in pair for row in points_of(run.mask, run)]
        curves(
            ax,
            points,
            looks,
            **MIOU,
        )
        for run in pair:
            mark_best(ax, run, mask_colour(run.mask))
        label_sites(
            ax,
            sites_of(points),
            5,
            fontsize=8,
        )
        ax.set_xlabel("")
        ax.set_title(f"{study.model}\n{study.dataset}{kind}", fontsize=9)
        rows += [
            {
                "model": study.model,
                "dataset": study.dataset,
            }
            | row
            for row in score_rows(pair)
        ]
    axes[0].legend(fontsize=8)
    axes[0].set_ylabel("mIoU (%)")
    figure.supxlabel("encoder, adapter (0), LLM layer", fontsize=9)
    spread_labels(figure, axes)
    return FigureData(figure, rows)


def overview_figures(studies: list[StudyRuns]) -> Figures:
    """Yield the figures that compare several models and datasets; the first one has the mask of most models."""
    encoders = [study for study in studies if not study.first.has_llm]
    studies = [study for study in studies if study.first.has_llm]
    if encoders:
        yield ReportFigure(
            "encoders", "All encoders",
            caption("mIoU by depth, one line per encoder: 0 are the patch embeddings, 1 is the last layer.",
                    _kinds_caption(encoders), "Bands: 95% intervals, of each encoder by itself; the table has the "
                    "differences."),
            encoders_by_dataset(encoders),)  # fmt: skip
    by_mask = {mask: [study for study in studies if mask in study.main_runs] for mask in MASKS}
    for mask, with_mask in sorted(by_mask.items(), key=lambda entry: -len(entry[1])):
        with_adapter = [study for study in with_mask if ADAPTER in study.main_runs[mask].sites]
        if with_mask:
            random = [x for s in with_mask for x in s.where(arm=CONTROLS["llm"], solved=True)]
            yield ReportFigure(
                f"models_{mask}", f"All models, {mask}",
                caption("mIoU by site, one line per model (Figs. 3 and 9).", peak_caption(*with_mask),
                        "Diamonds: its random LLMs." if random else "",
                        _kinds_caption(with_mask), "Bands: 95% intervals.",),
                models_by_dataset(with_mask, mask),)  # fmt: skip
        if with_adapter:
            yield ReportFigure(
                f"over_adapter_{mask}", f"Recovery of all models, {mask}",
                caption("The same curves minus their value at the adapter (Fig. 10), to compare models with different "
                        "depths and encoders.", _kinds_caption(with_adapter)),
                models_by_dataset(with_adapter, mask, over_adapter=True),)  # fmt: skip
    both = [study for study in studies if study.pair()]
    if both:
        yield ReportFigure(
            "masks", "Causal and bidirectional attention",
            caption("Both masks of every model (Fig. 8).", peak_caption(*both), _kinds_caption(both),
                    "Bands: 95% intervals.",),
            masks_by_model(both),)  # fmt: skip


def _kinds_caption(studies: list[StudyRuns]) -> str:
    runs = [run for by_mask in runs_to_compare(*studies) for run in by_mask.values()]
    if len({run.is_solved for run in runs}) == 1:
        return ""
    return "Probes of some models are solved, of others trained: their heights cannot be compared."
