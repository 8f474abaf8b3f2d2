"""How often each verdict says yes where the truth is yes, and where it is no.

    python -m experiments.toy.calibrate --out runs/calibrate --seeds 0 1 2 [--studies planted weak ...]

For each seed a toy world is drawn, models are planted (`probes plant`), and each is studied:

    planted      both masks, trained on the classes of their image tokens: recovery and starvation are true
    weak         the same with a fifth of the steps
    random       the planted models with shuffled LLMs: neither is true
    normal_0.02 ...  the planted model with layers that are drawn in other ways (`random_llms.py`): no recovery is true
    language     the model before planting, whose LLM has seen no pictures; also with its layers reordered, and with
                 its heads exchanged
    merged0 ...  the adapter merges 0, 1 or 3 pairs of classes: a drop is true from 1

OUT/seedN/{assets,models,STUDY}, OUT/seedN/claims.json, OUT/calibration.csv, calibration.png. What is there is not made
again: seeds and studies can be added, and jobs of different `--seeds` can share OUT.
"""

import argparse
import contextlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import scipy.stats

from experiments.toy.random_llms import FAMILIES, OF_LANGUAGE
from llava_bidir.common.errors import one_line_errors
from llava_bidir.common.files import atomic_write, exclusive_run_lock, read_json, write_files
from probes.compute.process_group import end_on_signals
from probes.config import StudyOptions
from probes.report.claims import evaluate_claims
from probes.report.verdicts import HOLDS
from probes.runs.study import read_studies
from probes.studies.options import study_options
from probes.studies.run import run_study
from probes.worlds.steps import (
    MASKS,
    WEIGHTS,
    check_settings,
    make_step,
    run_in_child_process,
    to_words,
    training_steps,
)

LLM = ("trained", "random0", "random1", "permuted0", "permuted1")
ADAPTER = ("trained", *(f"adapter{draw}" for draw in range(5)))
LAYERS = ("adapter", "layer_01", "layer_02", "layer_03", "layer_04")
COLUMNS = ("paper", "optimum", "beyond_random", "supported")
COLUMN_NAMES = {"paper": "as the paper measures it", "optimum": "at the optimum"}
KEYS = ("study", "claim", "truth")


class PlantedModel(NamedTuple):
    """What `probes plant` makes of another model of the same mask; "" is the one after stage 1."""

    what: str
    source: str = ""
    options: tuple[str, ...] = ()


class Design(NamedTuple):
    """One study of a seed: models by mask, arms, sites of the trained arm, and whether probes are trained as well."""

    model: str
    masks: tuple[str, ...] = MASKS[1:]
    arms: tuple[str, ...] = LLM
    sites: tuple[str, ...] = LAYERS
    fit: bool = True


# Models in which nothing is planted, beside "random"; most of them are made from the planted one.
DRAWN = tuple(name for name in FAMILIES if name != "shuffled")
NEGATIVES = ("language", *DRAWN)
MODELS = {
    "planted": PlantedModel("recovery", "", ("--steps", "250")),
    "weak": PlantedModel("recovery", "", ("--steps", "50")),
    "random": PlantedModel("random", "planted"),
    **{f"merged{k}": PlantedModel("drop", "planted", ("--pairs", str(k))) for k in (0, 1, 3)},
    "language": PlantedModel("recovery", "", ("--steps", "0")),
    **{name: PlantedModel("random", "" if name in OF_LANGUAGE else "planted") for name in DRAWN},
}
DESIGNS = {
    "planted": Design("planted", MASKS),
    "weak": Design("weak"),
    "random": Design("random", MASKS),
    **{
        f"merged{k}": Design(f"merged{k}", arms=ADAPTER, sites=("encoder", "adapter"))
        for k in (0, 1, 3)
    },
    **{name: Design(name, fit=False) for name in NEGATIVES},
}


def calibrate(
    out: Path,
    seeds: Sequence[int],
    scale: float = 0.1,
    scenes: int = 2,
    studies: Sequence[str] | None = None,
) -> None:
    """Study all planted models of the seeds, and write the table and the figure of all seeds in `out`.

    Args:
        out: Folder, with a subfolder for each seed.
        seeds: Of world, models and probes.
        scale: Of the world (`probes demo-assets`); planting takes as many steps at any scale.
        scenes: Scenes in a picture.
        studies: Some of `DESIGNS`; None for all.
    """
    out = out.resolve()  # the same however it is spelled: steps are compared by their words
    for seed in seeds:
        folder = out / f"seed{seed}"
        check_settings(folder, {"scale": scale, "scenes": scenes})
        file = folder / "claims.json"
        claims = []
        if file.is_file():
            claims = read_json(file)["claims"]
        finished = {claim["study"] for claim in claims}
        missing = [name for name in studies or DESIGNS if name not in finished]
        if not missing:
            continue
        print(f"seed {seed}", flush=True)
        designs = [DESIGNS[name] for name in missing]
        _make_models(folder, seed=seed, scale=scale, scenes=scenes, designs=designs)
        for name in missing:
            claims += _study(folder, name, seed)
        write_files({file: {"claims": claims}})
    with exclusive_run_lock(out, "calibration.csv", wait_s=60):  # jobs of other seeds write it, too
        claims = []
        for file in sorted(out.glob("seed*/claims.json")):
            claims += read_json(file)["claims"]
        rows = count_verdicts(claims)
        write_table(rows, out / "calibration.csv")
        draw(rows, out / "calibration.png")
    print(f"{out / 'calibration.csv'}\n{out / 'calibration.png'}")


def count_verdicts(claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each study, claim, truth and column: how often it says yes, with Clopper and Pearson's interval.

    A verdict that is missing or "untested" counts neither way. "effect" is the mean over seeds of the effect beyond
    random.
    """
    claims_by_key: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for claim in claims:
        key = tuple(claim[name] for name in KEYS)
        claims_by_key.setdefault(key, []).append(claim)
    rows = []
    for key, same in claims_by_key.items():
        effect = None
        effects = without_none(claim["beyond_random_value"] for claim in same)
        if effects:
            effect = sum(effects) / len(effects)
        for column in COLUMNS:
            said = without_none(claim[column] for claim in same)
            if not said:
                continue
            yes = sum(said)
            test = scipy.stats.binomtest(yes, len(said))
            low, high = test.proportion_ci(method="exact")
            row = {"column": column, "yes": yes, "of": len(said), "low": low, "high": high}
            rows.append(dict(zip(KEYS, key, strict=True)) | row | {"effect": effect})
    return rows


def without_none(values: Iterable[Any]) -> list[Any]:
    """Return the values that are known."""
    return [value for value in values if value is not None]


def write_table(rows: list[dict[str, Any]], file: Path) -> None:
    """Write the rows as CSV."""
    from pandas import DataFrame

    with atomic_write(file) as partial:
        DataFrame(rows).to_csv(partial, index=False, float_format="%.4g")


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw how often each column says yes, true claims above and false ones below."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(map(label_of, rows)))
    labels.sort(key=lambda label: label.is_absent)
    figure = Figure(figsize=(8, 1.2 + 0.36 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for i, column in enumerate(COLUMNS):
        shares = []
        heights = []
        to_low = []
        to_high = []
        for row in rows:
            if row["column"] == column:
                share = row["yes"] / row["of"]
                shares.append(share)
                heights.append(labels.index(label_of(row)) + 0.18 * (i - 1.5))
                to_low.append(share - row["low"])
                to_high.append(row["high"] - share)
        axes.errorbar(
            shares,
            heights,
            xerr=[to_low, to_high],
            fmt="o",
            markersize=4,
            capsize=2,
            linewidth=1,
            label=COLUMN_NAMES.get(column, column.replace("_", " ")),
        )
    first_absent = sum(not label.is_absent for label in labels)
    axes.axhspan(first_absent - 0.5, len(labels) - 0.5, color="0.93", zorder=0)
    names = [f"{label.claim.replace('_', ' ')}, {label.study}" for label in labels]
    axes.set_yticks(range(len(labels)), names)
    axes.set(
        xlim=(-0.03, 1.03),
        xlabel="share of seeds in which the verdict is yes (grey: the truth is no)",
    )
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic_write(file) as partial:
        figure.savefig(partial, dpi=110, format="png")


class Label(NamedTuple):
    """A line of the figure."""

    is_absent: bool
    study: str
    claim: str


def label_of(row: dict[str, Any]) -> Label:
    """Return the line of a row of the table."""
    return Label(row["truth"] != "planted", row["study"], row["claim"])


def _make_models(folder: Path, seed: int, scale: float, scenes: int, designs: list[Design]) -> None:
    """Draw the world of a seed, train adapters on captions, and plant what is missing of the designs' models."""
    assets = folder / "assets"
    drawn = assets / "questions.json"
    world = {"--scenes": scenes, "--scale": scale, "--seed": seed}
    words = ["probes", "demo-assets", str(assets), *to_words(world)]
    run_in_child_process(folder, "world", [make_step(folder, words, drawn)])
    steps = []
    for mask in MASKS:
        models = folder / "models" / mask
        options = {
            "-c": "demo/stage1",
            "--model.image_attention": mask,
            "--model.encoder.path": assets / "encoder",
            "--model.llm": assets / "llm",
            "--data.images": assets,
            "--data.annotations": assets / "captions.json",
            "--seed_everything": seed,
        }
        steps += training_steps(folder, models, {"stage1": options})
        studied = {design.model for design in designs if mask in design.masks}
        sources = {MODELS[name].source for name in studied}
        for name, model in MODELS.items():
            if name not in studied | sources:
                continue
            source = models / (model.source or "stage1")
            target = models / name
            if name in DRAWN:
                words = ["python", "-m", "experiments.toy.random_llms", name]
                words += [f"{source}/hf", f"{target}/hf", str(seed)]
            else:
                words = ["probes", "plant", model.what, f"{source}/hf", str(assets)]
                words += [f"{target}/hf", *model.options, "--seed", str(seed)]
            reads = [source / WEIGHTS, drawn]
            steps.append(make_step(folder, words, result=target / WEIGHTS, reads=reads))
    run_in_child_process(folder, "models", steps)


def study_settings(
    folder: Path, out: Path, seed: int, design: Design, *, fit: bool = True
) -> StudyOptions:
    """Return the settings of a study of a seed's models; with `fit`, of probes as the paper trains them, too."""
    models = {mask: str(folder / "models" / mask / design.model / "hf") for mask in design.masks}
    if len(models) == 1:
        (model,) = models.values()
        models = {"": model}
    only = ["solve"]
    if fit:
        only.append("fit")
    return study_options(
        models,
        str(folder / "assets/segmentation"),
        out=out,
        arms=design.arms,
        fit=fit,
        only=tuple(only),
        overwrite=True,  # the results of models that were made again
        configs=["demo/probes"],
        options={"seed_everything": seed, "model": {"sites": list(design.sites)}},
    )


def _study(folder: Path, name: str, seed: int) -> list[dict[str, Any]]:
    """Study the models of a design, and return its claims with a known truth."""
    design = DESIGNS[name]
    settings = study_settings(folder, folder / name, seed, design, fit=design.fit)
    with contextlib.redirect_stdout(io.StringIO()):
        run_study(settings)
    (study,) = read_studies([str(settings.out)])
    return [_verdicts(claim, name, seed) for claim in evaluate_claims(study) if "truth" in claim]


def _verdicts(claim: dict[str, Any], study: str, seed: int) -> dict[str, Any]:
    """Return a claim's verdicts as booleans, None where it is untested; causal and bidirectional claims are apart."""
    verdicts = claim["verdicts"]
    name = claim["claim"]
    if name == "recovery":
        name += f" ({claim['image_attention']})"
    row = {"study": study, "claim": name, "truth": claim["truth"], "seed": seed}
    for column in COLUMNS[:-1]:
        verdict = verdicts[column]["verdict"]
        row[column] = None
        if verdict != "untested":
            row[column] = verdict == HOLDS
    row["supported"] = None
    if claim["conclusion"] != "untested":
        row["supported"] = claim["supported"]
    return row | {"beyond_random_value": verdicts["beyond_random"]["value"]}


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/calibrate"), help="of all seeds")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=range(10), help="the table has all in the folder"
    )
    parser.add_argument("--scale", type=float, default=0.1, help="of `probes demo-assets`")
    parser.add_argument("--scenes", type=int, default=2, help="in a picture: 2 or 4")
    parser.add_argument("--studies", nargs="+", choices=DESIGNS, help="default: all")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with one_line_errors("calibrate"):
        end_on_signals()
        calibrate(
            options.out,
            seeds=options.seeds,
            scale=options.scale,
            scenes=options.scenes,
            studies=options.studies,
        )


if __name__ == "__main__":
    main()
