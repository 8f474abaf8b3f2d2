"""`llava-bidir demo`: train, probe and report on a toy world, on two CPU cores; again: only what is missing.

OUT/assets                  the world, a tiny CLIP and a tiny Llama
OUT/MASK/stage1, stage2     LLaVA's two stages under both masks, two at a time on one thread each
OUT/MASK/planted            the models with a planted recovery (plant.py), in the binding world
OUT/shuffled                the bidirectional one with a shuffled LLM, in which nothing is planted
OUT/merged, OUT/intact      the same with a planted drop at the adapter, and without
OUT/MASK/ARM, OUT/report    one study of both (probes/studies/README.md)
OUT/shuffled/ARM, ...       those of the other three, in the same report
OUT/logs                    what each step said

In the binding world the truth about a claim is known, and the last table has it beside what the study found. A result
that was deleted is made again, and what was made from it.
"""

import argparse
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava_bidir.common.atomic_io import read_json
from llava_bidir.common.process_group import Step, end_on_signals, run_missing
from llava_bidir.common.run_lock import exclusive_run_lock

from .steps import MASKS, WEIGHTS, check_settings, run_studies, to_words, training_steps

ARMS = "trained random0 random1 adapter0 adapter1"
LOOK_ALIKES = "ceiling,sky,wall,building,floor,road,bed,car"
STUDY = f"--fit --arms {ARMS} --add knockout.classes={LOOK_ALIKES} knockout.draws=1 answers.limit=80 answers.draws=1"
STUDY += " explore"
# What no claim needs; it takes half of the time of a small demo.
EXTRAS = "patching.limit=100 patching.draws=1 maps.classes=ceiling,road umap --tasks depth normals boundaries"
# The binding world. The drop, at the encoder and the adapter, has studies of its own.
SCENES = 2
BINDING = "--arms trained random0 random1 --add explore answers.limit=80 answers.draws=1"
BINDING += " knockout.classes=ceiling,sky,wall,building knockout.draws=1"
SITES = "--model.sites [adapter,layer_01,layer_02,layer_03,layer_04]"
# Studies whose runs are in the same report, of a folder below OUT, with random LLMs or adapters. Random adapters are
# cheap; two draws judged alone would find effects from four points only (probes/report/README.md).
OTHERS = {
    "shuffled": ("random", 2),
    "merged": ("adapter", 5),
    "intact": ("adapter", 5),
}
PLANT_STEPS = {"--steps": 1200, "--answer-steps": 1500}  # at scale 1, but at most 600 each
ADAPTER_SITES = "--model.sites [encoder,adapter]"


def run(args: argparse.Namespace) -> None:
    """Run `llava-bidir demo`."""
    out = Path(args.out)
    settings = {
        "seed": args.seed,
        "scale": args.scale,
        "world": args.world,
    }
    with exclusive_run_lock(out, "demo"):
        end_on_signals()
        check_settings(out, settings)
        run_missing(out, "assets", [(out / "assets/questions.json", _assets(out, settings), None)])
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda mask: _train(out, mask, settings), MASKS))
        commands = _binding_studies(out, settings, args.extras) if args.world == "binding" else []
        commands = commands or [_study(out, settings, args.extras)]
        run_studies(out, commands)
        print(format_truth(read_json(out / "report/results.json")))


def _study(out: Path, settings: dict, extras: bool) -> list[str]:
    """Return the words of the study of both masks, in the world of one scene, whose truth is unknown."""
    models = [f"{mask}={out / mask / 'stage2/hf'}" for mask in MASKS]
    study = shlex.split(STUDY)
    if extras or settings["scale"] >= 1:
        study += [f"patching.pairs={out}/assets/pairs", *shlex.split(EXTRAS)]
    study += _common(settings, "toy world")
    return [*models, str(out / "assets/segmentation"), "--out", str(out), *study]


def _binding_studies(out: Path, settings: dict, extras: bool) -> list[list[str]]:
    """Return the words of the studies; the last one writes the report of all."""
    commands = []
    world = str(out / "assets/segmentation")
    common = _common(settings, f"{SCENES} scenes")
    for name, (kind, draws) in OTHERS.items():
        arms = ["--arms", "trained", *(f"{kind}{draw}" for draw in range(draws)), "--only", "solve"]
        sites = shlex.split(SITES if kind == "random" else ADAPTER_SITES)
        commands.append(
            [str(out / name / "hf"), world, *arms, *sites, "--out", str(out / name), *common]
        )
    models = [f"{mask}={out / mask / 'planted/hf'}" for mask in MASKS]
    study = [*shlex.split(BINDING), "--fit"]
    # knockouts take half of the time, and no truth is known about them
    if not (extras or settings["scale"] >= 1):
        study += ["--only", "solve", "fit", "starvation", "answers", "explore", "report"]
    return [*commands, [*models, world, "--out", str(out), *study, *shlex.split(SITES), *common]]


def _common(settings: dict, dataset: str) -> list[str]:
    return ["-c", "demo/probes", "--seed_everything", str(settings["seed"]), "--data.name", dataset]


def format_truth(results: dict) -> str:
    """Return the claims whose truth is known as tables by model and mask: what is true, and what the study found."""
    header = ("claim", "truth", "at the optimum", "beyond random", "found")
    tables: dict[str, list[tuple[str, ...]]] = {}
    for study in results.get("studies", [results]):
        for claim in study["claims"]:
            if "truth" in claim:
                model = study["model"].partition(", ")[2]  # "3 pairs merged"
                pictures = ", ".join(filter(None, (study["dataset"], model)))
                heading = f"{pictures}, {claim['image_attention']} attention"
                tables.setdefault(heading, []).append(_truth_row(claim))
    if not tables:
        return ""
    rows = [header, *(row for table in tables.values() for row in table)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join(map(str.ljust, row, widths)).rstrip()

    lines = [
        "",
        "What was planted, and what the study found (points, 95% intervals):",
        line(header),
    ]
    for heading, table in tables.items():
        lines += [f"- {heading}", *map(line, table)]
    return "\n".join(lines)


def _truth_row(claim: dict) -> tuple[str, ...]:
    """Return the cells of a claim."""
    verdicts = claim["verdicts"]
    numbers = [_format_column(verdicts[name]) for name in ("optimum", "beyond_random")]
    return (claim["claim"].replace("_", " "), claim["truth"], *numbers, claim["finding"])


def _format_column(column: dict) -> str:
    if column["value"] is None:
        return "untested"
    low, high = column["ci95"]
    return f"{100 * column['value']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _assets(out: Path, settings: dict) -> list[str]:
    options = {f"--{k}": v for k, v in settings.items()}
    if settings["world"] == "binding":
        options["--scenes"] = SCENES
    return ["demo-assets", f"{out}/assets", *to_words(options)]


def _train(out: Path, mask: str, settings: dict) -> None:
    """Train both stages, and plant what the binding world has, unless they are there."""
    assets = out / "assets"
    folder = out / mask
    common = {"--model.image_attention": mask, "--model.encoder.path": assets / "encoder"}
    common |= {
        "--model.llm": assets / "llm",
        "--data.images": assets,
        "--seed_everything": settings["seed"],
    }
    stage1 = {"--data.annotations": assets / "captions.json"}
    stage2 = {
        "--model.adapter": folder / "stage1/hf",
        "--data.annotations": assets / "dialogues.json",
    }
    stage2 |= {"--data.val_annotations": assets / "questions.json"}
    stages = {
        "stage1": {"-c": "demo/stage1"} | common | stage1,
        "stage2": {"-c": "demo/stage2"} | common | stage2,
    }
    steps = training_steps(folder, stages, assets / "questions.json")
    if settings["world"] == "binding":
        steps += _plant(out, mask, settings)
    run_missing(out, mask, steps)


def _plant(out: Path, mask: str, settings: dict) -> list[Step]:
    """Return the steps that plant a recovery, and under the bidirectional mask the other three models."""
    count = {
        name: max(2, min(600, round(steps * settings["scale"])))
        for name, steps in PLANT_STEPS.items()
    }
    jobs = [
        (
            "recovery",
            out / mask / "stage2",
            out / mask / "planted",
            count | {"--seed": settings["seed"]},
        )
    ]
    if mask == "bidirectional":
        for name, what, options in (
            ("shuffled", "random", {"--seed": settings["seed"]}),
            ("merged", "drop", {"--pairs": 3}),
            ("intact", "drop", {"--pairs": 0}),
        ):
            jobs.append((what, out / mask / "planted", out / name, options))
    return [
        (
            target / WEIGHTS,
            ["plant", what, f"{source}/hf", f"{out}/assets", f"{target}/hf", *to_words(options)],
            source / WEIGHTS,
        )
        for what, source, target, options in jobs
    ]
