"""`probes demo`: train, probe and report on a toy world, on two CPU cores; again: only what is missing.

OUT/assets                  the world, a tiny CLIP and a tiny Llama
OUT/MASK/stage1, stage2     LLaVA's two stages under both masks, two at a time on one thread each
OUT/MASK/planted            the models with a planted recovery (plant.py), in the binding world
OUT/shuffled                the bidirectional one with a shuffled LLM, in which nothing is planted
OUT/merged, OUT/intact      the same with a planted drop at the adapter, and without
OUT/MASK/ARM, OUT/report    one study of both (probes/studies/README.md)
OUT/shuffled/ARM, ...       those of the other three, in the same report
OUT/logs                    what each step said, and below logs/steps what it was made from

In the binding world the truth about a claim is known, and the last table has it beside what the study found. A folder
that was deleted is made again, and what was made from it.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from llava_bidir.common.atomic_io import read_json
from llava_bidir.common.process_group import end_on_signals
from llava_bidir.common.run_lock import exclusive_run_lock
from llava_bidir.common.steps import Step
from probes.world_options import DemoOptions

from .child_process import run_in_child_process
from .steps import MASKS, SCENES, WEIGHTS, check_settings, make_step, to_words, training_steps

PLANT_STEPS = {"--steps": 1200, "--answer-steps": 1500}  # at scale 1, but at most 600 each


def run(options: DemoOptions) -> None:
    """Run `probes demo`."""
    out = Path(
        options.out
    ).resolve()  # the same however it is spelled: steps are compared by their words
    settings = {
        "seed": options.seed,
        "scale": options.scale,
        "world": options.world,
    }
    with exclusive_run_lock(out, "demo"):
        end_on_signals()
        check_settings(out, settings)
        run_in_child_process(out, "assets", [_assets(out, settings)])
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda mask: _train(out, mask, settings), MASKS))
        from .demo_studies import run_studies  # imports torch

        run_studies(out, settings, options.extras)
        print(format_truth(read_json(out / "report/results.json")))


def format_truth(results: dict) -> str:
    """Return the claims whose truth is known as tables by model and mask: what is true, and what the study found."""
    from probes.report.claim_table import known_truths, summarize_truths  # imports torch
    from probes.results.formatting import align

    studies = results.get("studies", [results])
    tables: dict[str, list[list[str]]] = {}
    for study, text in known_truths(studies):
        columns = [text.columns[name] for name in ("optimum", "beyond_random")]
        effects = [column.effect or column.verdict for column in columns]
        row = [text.name, text.truth, *effects, text.finding]
        tables.setdefault(f"- {study['model']}, {text.mask} attention", []).append(row)
    if not tables:
        return ""
    header = ["claim", "truth", "at the optimum", "beyond random", "found"]
    title, *rest = align([header, *(row for table in tables.values() for row in table)])
    rows = iter(rest)
    lines = ["", "What was planted, and what the study found (points, 95% intervals):", title]
    for heading, table in tables.items():
        lines += [heading, *islice(rows, len(table))]
    return "\n".join([*lines, summarize_truths(studies)])


def _assets(out: Path, settings: dict) -> Step:
    """Return the step that draws the world."""
    options = {f"--{k}": v for k, v in settings.items()}
    if settings["world"] == "binding":
        options["--scenes"] = SCENES
    words = ["probes", "demo-assets", f"{out}/assets", *to_words(options)]
    return make_step(out, words, out / "assets/questions.json")


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
    steps = training_steps(out, folder, stages)
    if settings["world"] == "binding":
        steps += _plant(out, mask, settings)
    run_in_child_process(out, mask, steps)


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
    steps = []
    for what, source, target, options in jobs:
        words = ["probes", "plant", what, f"{source}/hf", f"{out}/assets", f"{target}/hf"]
        words += to_words(options)
        steps.append(
            make_step(
                out,
                words,
                target / WEIGHTS,
                reads=[source / WEIGHTS, out / "assets/questions.json"],
            )
        )
    return steps
