"""`probes demo`: train, probe and report on a toy world, on two CPU cores; again: only what is missing.

OUT/assets                  the world, a tiny CLIP and a tiny Llama
OUT/MASK/stage1, stage2     LLaVA's two stages under each mask, two at a time on one thread each
OUT/MASK/planted            the models with a planted recovery (plant.py)
OUT/shuffled                the second one with a shuffled LLM, in which nothing is planted
OUT/merged, OUT/intact      the same with a planted drop at the adapter, and without
OUT/shuffled/ARM, ...       a study of each of these three
OUT/MASK/ARM, OUT/report    one study of all masks (probes/studies/README.md); its report has all
OUT/logs                    what each step said, and below logs/steps what it was made from

The truth about a claim is known, and the last table has it beside what the study found. A folder that was deleted is
made again, and what was made from it.
"""

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import probes
from llava_bidir.common.files import exclusive_run_lock
from probes.compute.process_group import end_on_signals
from probes.config import DemoOptions
from probes.steps.record import Step

from .steps import (
    WEIGHTS,
    check_settings,
    make_step,
    run_in_child_process,
    to_words,
    training_steps,
)

SCENES = 2  # in a picture
DATA = {"name": f"pictures of {SCENES} scenes"}
PLANT_STEPS = {"--steps": 1200, "--answer-steps": 1500}  # at scale 1, but at most 600 each
LAYERS = ["layer_01", "layer_02", "layer_03", "layer_04"]
RANDOM_LLMS = ["random0", "random1", "permuted0", "permuted1"]
# Random adapters are cheap; two draws judged alone would find effects from four points only
# (experiments/statistics/statistics.md).
ADAPTERS = [f"adapter{draw}" for draw in range(5)]
# Studies of one model, by its folder: random LLMs or adapters, and sites.
OTHERS = {
    "shuffled": (RANDOM_LLMS, ["adapter", *LAYERS]),
    "merged": (ADAPTERS, ["encoder", "adapter"]),
    "intact": (ADAPTERS, ["encoder", "adapter"]),
}
KNOCKOUT = ["knockout.classes=ceiling,sky,wall,building", "knockout.draws=1"]
QUESTIONS = ["routes.limit=80", "routes.draws=1"]
NEXT = """
Next:
  source .venv/bin/activate
  probes lab {runs}
  probes study {out}/{mask}/planted/hf DATA --out runs/mine    # DATA: images and masks, probes/README.md"""
# Knockouts take half of the time, and no truth is known about them.
STEPS = ["solve", "fit", "sinks", "report"]


def run(options: DemoOptions) -> None:
    """Run `probes demo`."""
    # the same however it is spelled: steps are compared by their words
    out = Path(options.out).resolve()
    seed = options.seed
    with exclusive_run_lock(out, "demo"):
        end_on_signals()
        check_settings(out, {"seed": seed, "scale": options.scale})
        world = {"--seed": seed, "--scale": options.scale, "--scenes": SCENES}
        words = ["probes", "demo-assets", f"{out}/assets", *to_words(world)]
        run_in_child_process(out, "assets", [make_step(out, words, out / "assets/questions.json")])

        def train(mask: str) -> None:
            steps = _train(out, mask, seed) + _plant(out, mask=mask, options=options)
            run_in_child_process(out, mask, steps)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(train, options.masks))
        _study(out, options)
        runs = " ".join(f"{options.out}/{mask}/trained" for mask in options.masks)
        print(NEXT.format(out=options.out, runs=runs, mask=options.masks[:2][-1]))


def _train(out: Path, mask: str, seed: int) -> list[Step]:
    """Return the steps that train both stages."""
    assets = out / "assets"
    common = {
        "--model.image_attention": mask,
        "--model.encoder.path": assets / "encoder",
        "--model.llm": assets / "llm",
        "--data.images": assets,
        "--seed_everything": seed,
    }
    stage1 = {"-c": "demo/stage1", **common, "--data.annotations": assets / "captions.json"}
    stage2 = {
        "-c": "demo/stage2",
        **common,
        "--model.adapter": out / mask / "stage1/hf",
        "--data.annotations": assets / "dialogues.json",
        "--data.val_annotations": assets / "questions.json",
    }
    return training_steps(out, out / mask, {"stage1": stage1, "stage2": stage2})


def _plant(out: Path, mask: str, options: DemoOptions) -> list[Step]:
    """Return the steps that plant a recovery, and under the second mask the other three models."""
    seed = {"--seed": options.seed}
    steps_of_plant = {
        name: max(2, min(600, round(n * options.scale))) for name, n in PLANT_STEPS.items()
    }
    planted = out / mask / "planted"
    jobs = [("recovery", out / mask / "stage2", planted, steps_of_plant | seed)]
    if mask == options.masks[:2][-1]:
        jobs += [
            ("random", planted, out / "shuffled", seed),
            ("drop", planted, out / "merged", {"--pairs": 3}),
            ("drop", planted, out / "intact", {"--pairs": 0}),
        ]
    steps = []
    for what, source, target, options_of_job in jobs:
        words = ["probes", "plant", what, f"{source}/hf", f"{out}/assets", f"{target}/hf"]
        words += to_words(options_of_job)
        reads = [source / WEIGHTS, out / "assets/questions.json"]
        steps.append(make_step(out, words=words, result=target / WEIGHTS, reads=reads))
    return steps


def _study(out: Path, options: DemoOptions) -> None:
    """Study the models; the last study, of all masks, writes the report of all."""

    def study(models: str | dict[str, str], folder: Path, sites: list[str], **more: Any) -> None:
        probes.study(
            models,
            out / "assets/segmentation",
            out=folder,
            overwrite=True,  # the results of models that were made again
            configs=["demo/probes"],
            options={"seed_everything": options.seed, "data": DATA, "model": {"sites": sites}},
            **more,
        )
        gc.freeze()  # what this has imported: a collection after each step takes 0.3 s with it

    for name, (controls, sites) in OTHERS.items():
        study(
            f"{out}/{name}/hf",
            folder=out / name,
            sites=sites,
            arms=["trained", *controls],
            only=["solve"],
        )
    add = KNOCKOUT
    only = STEPS
    if options.extras or options.scale >= 1:
        add = KNOCKOUT + QUESTIONS
        only = []
    study(
        {mask: f"{out}/{mask}/planted/hf" for mask in options.masks},
        folder=out,
        sites=["adapter", *LAYERS],
        arms=["trained", *RANDOM_LLMS],
        fit=True,
        add=add,
        only=only,
    )
