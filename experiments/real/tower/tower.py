"""The vision tower in stage 2: frozen or trained, under both masks, two seeds each; tower.md has the plan.

    python -m experiments.real.tower.tower --out runs/tower --photos DATA/msrc DATA/labelmefacade --captions FILE.json

OUT/taught/NAME                     half of the training photos, whose masks make questions of stage 2
OUT/probed/NAME                     the other half, which probes train on, and the validation photos, which score them
OUT/MASK_SEED/stage1, frozen, trained   trainings; causal_0/llm_rate and published_rate: at other rates
OUT/towers/MASK_SEED                trained towers as encoders of their own, beside OUT/encoder
OUT/NAME/encoders, MASK_SEED, cuts  studies
OUT/{losses,differences,claims,sites,models,learning_curve}.csv

A second call continues what was stopped. Everything is compared with what was there before: a training or study of
other options is refused.
"""

import argparse
import csv
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.real.loss_curves import write_loss_curves
from experiments.real.photos import write_photos
from experiments.real.run import Data, Model, data_in, stage_options, write_models
from llava_bidir.common.files import atomic_directory, sha256
from probes.steps.record import Step
from probes.worlds.steps import MASKS, make_step, run_in_child_process, to_words, training_steps

IMAGE_PX = 112  # 8 x 8 image tokens
SEEDS = (0, 1)
RATES = {"llm_rate": "3.0e-4", "published_rate": "2.0e-6"}  # of the tower: causal, seed 0
LAST_READ = 11  # of twelve layers
LAYERS = [f"layer_{number:02}" for number in range(1, LAST_READ + 1)]
LLM_LAYERS = [f"layer_{number:02}" for number in (1, 5, 10, 15, 20, 25, 30)]
STEPS = "solve,position,norms,report"
TABLES = ("differences", "claims", "sites", "models", "learning_curve")


# ------------------------------------------------------------------------------------------------------------- photos
def halve(folder: Path, out: Path, most: int) -> None:
    """Write the halves of a folder data set, unless they are there: every other training photo by name is taught.

    Training photos that are byte for byte a validation photo are in neither half.

    Args:
        folder: Folder data set.
        out: Folder of taught/NAME and probed/NAME.
        most: Training photos of each half at most, evenly spaced.
    """
    validation = sorted((folder / "images/validation").iterdir())
    scored = {sha256(photo) for photo in validation}
    training = sorted((folder / "images/training").iterdir())
    training = [photo for photo in training if sha256(photo) not in scored]
    for number, kind in enumerate(("taught", "probed")):
        photos = training[number::2]
        photos = photos[:: max(1, len(photos) // most)][:most]
        half = out / kind / folder.resolve().name
        if (half / "classes.json").is_file():
            continue
        with atomic_directory(half, marker="classes.json") as partial:
            for split, of_split in (("training", photos), ("validation", validation)):
                names = {photo.stem for photo in of_split}
                masks = (folder / "annotations" / split).iterdir()
                _link_files(partial / "images" / split, of_split)
                _link_files(
                    partial / "annotations" / split, [mask for mask in masks if mask.stem in names]
                )
            shutil.copyfile(folder / "classes.json", partial / "classes.json")


def _link_files(folder: Path, files: Sequence[Path]) -> None:
    folder.mkdir(parents=True)
    for file in files:
        (folder / file.name).symlink_to(file.resolve())


def make_data(args: argparse.Namespace) -> Data:
    """Write the halves and the records of both stages, unless they are there, and return them."""
    names = [folder.resolve().name for folder in args.photos]
    for folder in args.photos:
        halve(folder, out=args.out, most=args.most_photos)
    records = args.out / "records"
    if not (records / "questions.json").is_file():
        write_photos(
            records,
            [args.out / "taught" / name for name in names],
            captions=args.captions,
            caption_images=None,
            seed=0,
            held_out=args.questions,
        )
    halves = {name: args.out / "probed" / name for name in names}
    return data_in(records, studied=halves, image_px=IMAGE_PX)


# ---------------------------------------------------------------------------------------------------------- trainings
def stages_of(args: argparse.Namespace, mask: str, seed: int, data: Data) -> dict[str, dict]:
    """Return the options of `llava-bidir fit` by stage: one stage 1, from which all of stage 2 begin."""
    plan = {"steps": args.steps, "stage1_steps": args.stage1_steps, "precision": args.precision}
    stages = stage_options(
        args.out,
        folder=args.out / f"{mask}_{seed}",
        mask=mask,
        model=Model(),
        plan=plan,
        seed=seed,
        data=data,
    )
    for options in stages.values():  # compiled layers save nothing in so few steps
        for name in ("--config", "--trainer.callbacks+", "--trainer.callbacks.steps"):
            options.pop(name, None)
    frozen = stages["stage2"]
    trained = frozen | {"--model.trainable": "[encoder,adapter,llm]"}
    stages = {"stage1": stages["stage1"], "frozen": frozen, "trained": trained}
    if (mask, seed) == (MASKS[0], SEEDS[0]):
        for stage, rate in RATES.items():
            stages[stage] = trained | {"--model.encoder_learning_rate": rate}
    return stages


def train(args: argparse.Namespace, data: Data) -> list[str]:
    """Train all models, two at a time on one thread each, write losses and towers, and return MASK_SEED of all."""
    folders = {}

    def train_models(name: str) -> None:
        mask, seed = name.split("_")
        stages = stages_of(args, mask=mask, seed=int(seed), data=data)
        folders[name] = [args.out / name / stage for stage in stages]
        steps = training_steps(args.out, args.out / name, stages)
        run_in_child_process(args.out, name, steps)

    names = [f"{mask}_{seed}" for seed in SEEDS for mask in MASKS]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train_models, names))
    runs = {}
    for name in names:
        for folder in folders[name]:
            runs[f"{name} {folder.name}"] = folder
            if folder.name in RATES:
                write_tower(args.out, export=folder / "hf", name=f"{name}_{folder.name}")
            elif folder.name == "trained":
                write_tower(args.out, export=folder / "hf", name=name)
    write_loss_curves(args.out / "losses.csv", runs)
    return names


def write_tower(out: Path, export: Path, name: str) -> None:
    """Write the tower of an export as an encoder, unless it is there."""
    folder = out / "towers" / name
    if (folder / "config.json").is_file():
        return
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True)
    with atomic_directory(folder, marker="config.json") as partial:
        model.model.vision_tower.save_pretrained(partial)
        for file in (out / "encoder").glob("preprocessor_config.json"):
            shutil.copyfile(file, partial / file.name)


# ------------------------------------------------------------------------------------------------------------ studies
def study_step(study: Path, models: dict[str, Path], data: Path, options: dict) -> Step:
    """Return the step that makes OUT/NAME/STUDY of models on a half."""
    words = ["probes", "study", *(f"{label}={path}" for label, path in models.items()), str(data)]
    common = {"--out": study, "--config": "demo/probes", "--data.name": data.name, "--only": STEPS}
    words += to_words(common | options)
    return make_step(study.parents[1], words, result=study / "report/results.json")


def studies(out: Path, data: Data, names: Sequence[str]) -> Iterator[Step]:
    """Yield the steps of all studies; those that are dropped first come last."""
    towers = {"published": out / "encoder"}
    towers |= {name: out / "towers" / name for name in names}
    towers |= {stage: out / "towers" / f"{names[0]}_{stage}" for stage in RATES}
    of_encoders = {
        "--model.sites": ",".join(LAYERS),
        "--model.image_px": IMAGE_PX,
        "--arms": "trained,random0,random1,permuted0,permuted1",
        "--control_sites": 3,
    }
    decides = next(iter(data.studied))
    for label, half in data.studied.items():
        more = {}
        if label == decides:
            more = {"--training_images": "30,60,all", "--only": f"{STEPS},learning_curve"}
        yield study_step(out / label / "encoders", towers, half, of_encoders | more)
    of_llms = {
        "--model.sites": ",".join(["encoder", "adapter", *LLM_LAYERS]),
        "--arms": "trained,random0,permuted0",
    }
    for label, half in data.studied.items():
        for name in names:
            # the first is compared with each other one at every site
            stages = {"frozen": "frozen", "before": "stage1", "trained": "trained"}
            models = {label: out / name / stage / "hf" for label, stage in stages.items()}
            yield study_step(out / label / name, models, half, of_llms)
    models = {stage: out / names[0] / stage / "hf" for stage in ("frozen", "trained")}
    cuts = of_llms | {"--cuts": "encoder,llm,both"}
    yield study_step(out / decides / "cuts", models, data.studied[decides], cuts)


def run_studies(args: argparse.Namespace, steps: Sequence[Step]) -> None:
    """Run studies, two at a time."""

    def run(step: Step) -> None:
        run_in_child_process(args.out, step.name.replace("/", "_"), [step])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, steps))


def gather(out: Path, steps: Sequence[Step]) -> None:
    """Write the tables of all reports that are there as OUT/TABLE.csv."""
    for table in TABLES:
        rows: list[dict[str, str]] = []
        for step in steps:
            study = str(step.result.parents[1].relative_to(out))
            # a figure's table is in a folder of its model
            for file in sorted(step.result.parent.rglob(f"{table}*.csv")):
                about = {"study": study, "part": file.parent.name}
                with file.open() as lines:
                    rows += [about | row for row in csv.DictReader(lines)]
        names = dict.fromkeys(name for row in rows for name in row)
        with (out / f"{table}.csv").open("w", newline="") as target:
            writer = csv.DictWriter(target, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    """Train, study and gather."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tower"))
    parser.add_argument("--photos", type=Path, nargs="+", required=True, help="folder data sets")
    parser.add_argument("--captions", type=Path, required=True, help="LLaVA's JSON")
    parser.add_argument("--steps", type=int, default=60, help="of stage 2")
    parser.add_argument("--stage1-steps", type=int, default=100)
    parser.add_argument("--questions", type=int, default=60, help="held-out ones of each data set")
    parser.add_argument("--most-photos", type=int, default=120, help="training photos of a half")
    parser.add_argument("--precision", default="bf16-mixed", help="32-true where bfloat16 is slow")
    args = parser.parse_args()
    args.out = args.out.resolve()
    write_models(args.out)
    data = make_data(args)
    names = train(args, data)
    steps = [*studies(args.out, data, names)]
    run_studies(args, steps)
    gather(args.out, steps)


if __name__ == "__main__":
    main()
