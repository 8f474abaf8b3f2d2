"""mIoU over the stack: encoder, adapter, LLM layers (Figs. 3, 8, 9, 10)."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from probes.evaluation.metrics import peak_layer
from probes.models.frozen_mllm import ADAPTER, FINAL_NORM
from probes.report.study import MASKS, Study
from probes.results.probe_run import ProbeRun

from .style import COLOURS, FigureData, colour_of, label_sites, new_axes, panels, position, score_row


def curve_of(entries: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Depth and mIoU in percent of a run's or recipe's sites, without `final_norm`, the last layer once more."""
    shown = [entry for entry in entries if entry["site"] != FINAL_NORM]
    return [position(entry["site"]) for entry in shown], [100 * entry["miou"] for entry in shown]


def draw_run(ax: Axes, run: ProbeRun, colour: str, label: str, marker: str | None = None, gain: bool = True) -> None:
    """A trained run's curve with its intervals, and its best layer with what that gains over the adapter."""
    entries = [entry for entry in run.metrics["sites"] if entry["site"] != FINAL_NORM]
    x, y = curve_of(entries)
    low, high = zip(*(entry["miou_ci95"] for entry in entries), strict=True)
    ax.plot(x, y, "-", color=colour, lw=1.8, marker=marker, ms=4, label=label)
    ax.fill_between(x, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.12, lw=0)
    miou = {entry["site"]: entry["miou"] for entry in entries}
    peak = peak_layer(miou)
    if gain and peak is not None and ADAPTER in miou:
        ax.axvline(position(peak), color=colour, ls="--", lw=0.9, alpha=0.7)
        ax.annotate(f"{100 * (miou[peak] - miou[ADAPTER]):+.1f}", (position(peak), 100 * miou[peak]), (4, 5),
                    color=colour, textcoords="offset points", fontsize=9)  # fmt: skip


def shown_sites(*runs: ProbeRun) -> list[str]:
    """All sites that lie on the axis of depth, of the deepest run too."""
    found = {site for run in runs for site in run.sites if site != FINAL_NORM}
    return sorted(found, key=position)


def layer_curves(study: Study) -> FigureData:
    """MIoU at every site under both masks, with the untrained control (Figs. 3, 8)."""
    figure, ax = new_axes(6.4, 3.9)
    _draw_masks(ax, study)
    label_sites(ax, shown_sites(*study.runs))
    ax.set(ylabel="mIoU (%)")
    ax.legend(fontsize=9)
    return FigureData(figure, _rows(study))


def _draw_masks(ax: Axes, study: Study) -> None:
    for mask, run in study.trained.items():
        draw_run(ax, run, colour_of(mask), mask, marker="os"[mask == "bidirectional"] if len(run.sites) < 20 else None)
    for mask, run in study.untrained.items():
        label = f"{mask}, untrained"
        ax.plot(*curve_of(run.metrics["sites"]), ":", color=colour_of(mask), alpha=0.6, lw=1.8, label=label)


def _rows(study: Study) -> list[dict[str, Any]]:
    return [
        {"image_attention": run.metrics["image_attention"], "untrained": bool(run.metrics["untrained"])}
        | score_row(entry)
        for run in study.runs
        for entry in run.metrics["sites"]
    ]


def models_by_dataset(studies: list[Study], mask: str, over_adapter: bool = False) -> FigureData:
    """The curves of several models under one mask, a panel a dataset (Figs. 3, 9).

    Args:
        studies: Those with a run under the mask are drawn.
        mask: The image attention.
        over_adapter: mIoU minus that at the adapter instead (Fig. 10).
    """
    models = list(dict.fromkeys(study.model for study in studies))
    datasets = {study.dataset: [s for s in studies if s.dataset == study.dataset] for study in studies}
    figure, axes = panels(len(datasets), height=3.6 if len(datasets) == 1 else 2.9, columns=2)
    rows = []
    for ax, (dataset, found) in zip(axes, datasets.items(), strict=True):
        runs = {study.model: study.trained[mask] for study in found}
        for model, run in runs.items():
            colour = COLOURS[models.index(model) % len(COLOURS)]
            if over_adapter:
                adapter = next(entry["miou"] for entry in run.metrics["sites"] if entry["site"] == ADAPTER)
                x, y = curve_of(run.metrics["sites"])
                ax.plot(x, [v - 100 * adapter for v in y], color=colour, lw=1.8, label=model)
                more = lambda entry, adapter=adapter: {"over_adapter": entry["miou"] - adapter}
            else:
                draw_run(ax, run, colour, model)
                more = lambda entry: {}
            rows += [
                {"model": model, "dataset": dataset, "image_attention": mask} | score_row(entry) | more(entry)
                for entry in run.metrics["sites"]
            ]
        if over_adapter:
            ax.axhline(0, color="black", lw=0.8)
        label_sites(ax, shown_sites(*runs.values()), 8)
        ax.set_title(dataset, fontsize=10)
    lines = [Line2D([], [], color=COLOURS[i % len(COLOURS)], label=model) for i, model in enumerate(models)]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=8)
    axes[0].set_ylabel("mIoU over the adapter's (pp)" if over_adapter else "mIoU (%)")
    return FigureData(figure, rows)


def masks_by_model(studies: list[Study]) -> FigureData:
    """Causal against bidirectional, a panel a model and dataset (Fig. 8)."""
    figure, axes = panels(len(studies))
    for ax, study in zip(axes, studies, strict=True):
        for mask in MASKS:
            draw_run(ax, study.trained[mask], colour_of(mask), mask)
        label_sites(ax, shown_sites(*study.trained.values()), 5, fontsize=8)
        ax.set_xlabel("")
        ax.set_title(f"{study.model}\n{study.dataset}", fontsize=9)
    axes[0].legend(fontsize=8)
    axes[0].set_ylabel("mIoU (%)")
    figure.supxlabel("encoder, adapter (0), LLM layer", fontsize=9)
    return FigureData(figure, [{"model": s.model, "dataset": s.dataset} | row for s in studies for row in _rows(s)])
