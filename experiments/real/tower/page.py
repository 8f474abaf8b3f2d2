"""The tables and the figure of tower.md, from the CSVs that `tower` has written.

    python -m experiments.real.tower.page [FOLDER]

FOLDER has differences.csv, claims.csv, sites.csv and models.csv; by default it is this one. Prints Markdown.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from probes.report.words import interval, number
from probes.worlds.steps import MASKS

from .tower import SEEDS

HERE = Path(__file__).parent
DECIDES, SECOND = "msrc", "labelmefacade"
RATES = {"llm_rate": "causal, 0, at 3e-4", "published_rate": "causal, 0, at 2e-6"}
TOWERS = {f"{mask}_{seed}": f"{mask}, {seed}" for seed in SEEDS for mask in MASKS} | RATES
BETTER, WORSE = ("better",), ("worse",)
KEPT = ("no effect", "negligible")
LAYERS = (1, 2, 3, 4, 5, 7, 9, 11)
COLOURS = {"causal": "tab:blue", "bidirectional": "tab:orange"}


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """Return a gathered table with the names of models in place of their letters."""
    table = pd.read_csv(folder / f"{name}.csv", keep_default_na=False, na_values=[""])
    models = pd.read_csv(folder / "models.csv").set_index(["study", "key"])["name"]
    for column in ("first", "second", "model"):
        if column in table:
            keys = pd.MultiIndex.from_arrays([table["study"], table[column]])
            table[column] = models.reindex(keys).to_numpy()
    return table


def conclude(decides: Sequence[str], second: Sequence[str]) -> str:
    """Return what the findings of both seeds say of a mask, by the plan's rule.

    Args:
        decides: Findings of the seeds on MSRC, of trained minus untrained.
        second: Those on LabelMeFacade; none if it was not measured.
    """
    if len(decides) < len(SEEDS):
        return "not measured"
    for word, shown, opposite in (("gains", BETTER, WORSE), ("loses", WORSE, BETTER)):
        if all(finding in shown for finding in decides):
            if not any(finding in opposite for finding in second):
                return word
    if all(finding in KEPT for finding in decides):
        return "keeps"
    return "undecided"


def difference(
    table: pd.DataFrame, study: str, pair: tuple[str, str], site: str
) -> pd.Series | None:
    """Return the row of the second minus the first of a pair at a site, or at the best layers; None without one."""
    is_of_site = (table["of"] == "site") & (table["site"] == site)
    if site == "best layer":
        is_of_site = table["of"] == site
    rows = table[
        (table["study"] == study)
        & (table["first"] == pair[0])
        & (table["second"] == pair[1])
        & is_of_site
    ]
    return None if rows.empty else rows.iloc[0]


def describe(row: pd.Series | None) -> str:
    """Return a difference in points with its interval and finding."""
    if row is None:
        return "not measured"
    value = number(row["difference"], has_sign=True)
    return f"{value} {interval(row['low'], row['high'])} {row['finding']}"


def tower_lines(folder: Path) -> Iterator[str]:
    """Yield the rows of the first question: a trained tower minus the published one."""
    table = read_table(folder, "differences")
    for data in (DECIDES, SECOND):
        for tower, text in TOWERS.items():
            cells = [
                describe(difference(table, f"{data}/encoders", ("published", tower), site))
                for site in ("best layer", "layer_11")
            ]
            yield f"| {data} | {text} | {' | '.join(cells)} |"


def layer_lines(folder: Path, layers: Sequence[int]) -> Iterator[str]:
    """Yield the rows by encoder layer: trained minus published in points, bold where it is shown to be worse."""
    table = read_table(folder, "differences")
    for data in (DECIDES, SECOND):
        for tower, text in TOWERS.items():
            cells = []
            for layer in layers:
                pair = ("published", tower)
                row = difference(table, f"{data}/encoders", pair, f"layer_{layer:02}")
                cell = number(row["difference"], has_sign=True)
                cells.append(f"**{cell}**" if row["finding"] in WORSE else cell)
            yield f"| {data} | {text} | {' | '.join(cells)} |"


def llm_lines(folder: Path, sites: Sequence[str]) -> Iterator[str]:
    """Yield the rows of the third question: the LLM beside a trained tower minus that beside a frozen one."""
    table = read_table(folder, "differences")
    for data in (DECIDES, SECOND):
        for mask in MASKS:
            for seed in SEEDS:
                study = f"{data}/{mask}_{seed}"
                rows = [difference(table, study, ("frozen", "trained"), site) for site in sites]
                if any(row is not None for row in rows):
                    yield f"| {data} | {mask}, {seed} | {' | '.join(map(describe, rows))} |"


def conclusion_lines(folder: Path) -> Iterator[str]:
    """Yield what is concluded of each mask, about towers at the best layers and the last, and about LLMs."""
    table = read_table(folder, "differences")
    questions = {
        "tower, best layers": ("best layer", None),
        "tower, layer 11": ("layer_11", None),
        "LLM, best layers": ("best layer", ("frozen", "trained")),
        "adapter": ("adapter", ("frozen", "trained")),
    }
    for question, (site, pair) in questions.items():
        words = []
        for mask in MASKS:
            findings: dict[str, list[str]] = {DECIDES: [], SECOND: []}
            for data, of_data in findings.items():
                for seed in SEEDS:
                    study = f"{data}/{mask}_{seed}" if pair else f"{data}/encoders"
                    row = difference(table, study, pair or ("published", f"{mask}_{seed}"), site)
                    if row is not None:
                        of_data.append(row["finding"])
            words.append(conclude(findings[DECIDES], findings[SECOND]))
        yield f"| {question} | {' | '.join(words)} |"


def claim_lines(folder: Path, claim: str, studies: Sequence[str]) -> Iterator[str]:
    """Yield the rows of a claim at the optimum: its number with its interval, and its finding."""
    table = read_table(folder, "claims")
    rows = table[(table["claim"] == claim) & (table["column"] == "optimum")]
    for study in studies:
        for _, row in rows[rows["study"] == study].iterrows():
            value = f"{number(row['value'], has_sign=True)} {interval(row['low'], row['high'])}"
            model = str(row["model"]).replace("_", ", ", 1)
            yield f"| {study.partition('/')[0]} | {model} | {value} | {row['finding']} |"


def draw(folder: Path) -> Figure:
    """Return the figure: mIoU by encoder layer, published and trained, of both data sets."""
    table = read_table(folder, "sites")
    is_shown = (table["weights"] == "trained") & (table["metric"] == "miou") & table["main"]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, data in zip(figure.subplots(1, 2), (DECIDES, SECOND), strict=True):
        rows = table[is_shown & (table["study"] == f"{data}/encoders")]
        for model, of_model in rows.groupby("model", sort=False):
            layers = of_model["site"].str.removeprefix("layer_").astype(int)
            mask = model.partition("_")[0]
            axis.plot(
                layers,
                100 * of_model["value"],
                color=COLOURS.get(mask, "tab:green" if model in RATES else "black"),
                linestyle="--" if model.endswith("_1") or model == "published_rate" else "-",
                marker=".",
                label=RATES.get(model, model.replace("_", ", ")),
            )
        axis.set(title=data, xlabel="encoder layer", ylabel="mIoU, %")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside right center")
    return figure


def page_lines(folder: Path) -> list[str]:
    """Return all rows of the page's tables."""
    lines = [*conclusion_lines(folder), *tower_lines(folder)]
    lines += layer_lines(folder, LAYERS)
    lines += llm_lines(folder, ("best layer", "adapter", "layer_30"))
    lines += claim_lines(folder, "recovery_without_context", [f"{DECIDES}/cuts"])
    return lines


def main() -> None:
    """Print the tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=HERE)
    folder = parser.parse_args().folder
    print("\n".join(page_lines(folder)))
    draw(folder).savefig(folder / "tower.png", dpi=110)


if __name__ == "__main__":
    main()
