"""The options of commands that make worlds and models and study them: demo, real, calibrate, rehearse and their parts.

Nothing here imports torch.
"""

import argparse
from argparse import ArgumentParser
from pathlib import Path

from llava_bidir.common.command_table import Command
from llava_bidir.common.usage_errors import REQUIRED, between, count, natural

# worlds/random_llms.py needs torch
RANDOM_LLMS = "shuffled normal_0.02 normal_0.04 normal_0.08 normal_0.16 normal_0.32 orthogonal uniform".split()
RANDOM_LLMS += ["sharp", "flat", "repeated", "low_rank", "reordered", "exchanged"]


def add_seed(parser: ArgumentParser) -> None:
    """Add --seed, that of everything that a command draws."""
    parser.add_argument(
        "--seed",
        type=natural,
        default=0,
        help="seed of all random choices",
    )


def add_demo_assets_options(parser: ArgumentParser) -> None:
    """Add the options of `probes demo-assets`."""
    parser.add_argument("out", type=Path, help="folder to write; replaces an earlier world")
    add_seed(parser)
    text = "what tells look-alikes apart: the rest of the scene, or patches of the same scene, one of several (binding)"
    parser.add_argument(
        "--world",
        choices=["context", "binding"],
        default="context",
        help=text,
    )
    text = "scenes in a picture of the binding world"
    parser.add_argument(
        "--scenes",
        type=int,
        choices=[1, 2, 4],
        default=4,
        help=text,
    )
    parser.add_argument(
        "--scale",
        type=between(0.01, 1000),
        default=1.0,
        help="factor for the number of images, conversations and training steps",
    )
    text = "write the conversations in plain English, for a language model that knows it, and train no LLM"
    parser.add_argument("--english", action="store_true", help=text)


def add_plant_options(parser: ArgumentParser) -> None:
    """Add the options of `probes plant`."""
    text = "recovery: train its image tokens on the classes; drop: merge classes in its adapter; "
    text += "random: shuffle or draw the layers of its LLM"
    parser.add_argument("what", choices=["recovery", "drop", "random"], help=text)
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="exported directory (RUN/hf)",
    )
    parser.add_argument(
        "world",
        type=Path,
        metavar="WORLD",
        help="folder of demo-assets --world binding",
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="directory to write; replaces an earlier export",
    )
    parser.add_argument(
        "--steps",
        type=natural,
        default=250,
        help="recovery: optimizer steps on pictures alone",
    )
    text = "recovery: further steps in which questions about patches are trained, too"
    parser.add_argument(
        "--answer-steps",
        type=natural,
        default=0,
        metavar="N",
        help=text,
    )
    parser.add_argument(
        "--pairs",
        type=natural,
        default=3,
        help="drop: pairs of classes to merge, up to 3; 0: none",
    )
    parser.add_argument(
        "--weights",
        default="shuffled",
        choices=RANDOM_LLMS,
        metavar="NAME",
        help=f"random: the layers, {', '.join(RANDOM_LLMS)}",
    )
    parser.add_argument(
        "--seed",
        type=natural,
        default=0,
        help="seed of batches and questions",
    )


def add_demo_options(parser: ArgumentParser) -> None:
    """Add the options of `probes demo`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="folder of world, models, study and report",
    )
    add_seed(parser)
    text = "factor for the number of images, conversations and training steps; "
    text += "1: half an hour, large enough for results"
    parser.add_argument(
        "--scale",
        type=between(0.01, 1000),
        default=0.1,
        help=text,
    )
    parser.add_argument(
        "--world",
        choices=["binding", "context"],
        default="binding",
        help="see demo-assets",
    )
    text = "also other tasks, patching, maps and UMAP, which no claim needs (always from scale 1)"
    parser.add_argument("--extras", action="store_true", help=text)


def add_real_options(parser: ArgumentParser) -> None:
    """Add the options of `probes real`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/real"),
        help="folder of models, world, studies and reports",
    )
    add_seed(parser)
    text = "minutes on two idle cores; a stage has as many steps as fit, from a measured one"
    parser.add_argument(
        "--minutes",
        type=between(1, 100_000),
        default=45,
        metavar="MINUTES",
        help=text,
    )
    text = (
        "folder data sets with masks, instead of the toy world; questions are made from the masks"
    )
    parser.add_argument(
        "--photos",
        type=Path,
        nargs="+",
        metavar="DIR",
        help=text,
    )
    text = "LLaVA's JSON with captions for --photos (default: lists of classes from the masks)"
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "folder of the photos of --captions (default: that of the file)"
    parser.add_argument(
        "--caption-images",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "with --photos, instead of --minutes"
    parser.add_argument(
        "--hours",
        type=between(0.1, 10_000),
        metavar="H",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "with --photos, side of the encoder's square, a multiple of 14 px (default: 112, 64 image tokens)"
    parser.add_argument(
        "--image-px",
        type=count,
        metavar="PX",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "with --photos, held-out questions about each data set (default: 200)"
    parser.add_argument(
        "--questions",
        type=count,
        metavar="N",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "train the models, and study none"
    parser.add_argument("--train-only", action="store_true", help=text)
    text = "steps of stage 2, and of stage 1 as many (with photos, half as many again), instead of as many as fit"
    parser.add_argument(
        "--steps",
        type=count,
        metavar="N",
        default=argparse.SUPPRESS,
        help=text,
    )
    parser.add_argument(
        "--draws",
        type=natural,
        default=2,
        help="draws of each kind of random LLM in the study",
    )
    text = "also train and study what tells language from training: the model after stage 1, and one of random "
    text += "weights; takes hours"
    parser.add_argument("--controls", action="store_true", help=text)
    parser.set_defaults(
        steps=None,
        captions=None,
        caption_images=None,
        hours=None,
        image_px=None,
        questions=None,
    )


def add_questions_options(parser: ArgumentParser) -> None:
    """Add the options of `probes questions`."""
    text = "folder data set: images, masks and classes.json (probes/README.md, Your own data)"
    parser.add_argument(
        "data",
        type=Path,
        metavar="DATA",
        help=text,
    )
    text = "folder for captions.json, dialogues.json and questions.json"
    parser.add_argument(
        "--out",
        type=Path,
        **REQUIRED,
        help=text,
    )
    add_seed(parser)
    text = "rows and columns of places that are asked about"
    parser.add_argument(
        "--grid",
        type=count,
        metavar="N",
        default=4,
        help=text,
    )
    text = "questions about each training photo, on average"
    parser.add_argument(
        "--per-photo",
        type=count,
        metavar="N",
        default=6,
        help=text,
    )
    text = "questions about all validation photos"
    parser.add_argument(
        "--held-out",
        type=count,
        metavar="N",
        default=200,
        help=text,
    )


def add_rehearse_options(parser: ArgumentParser) -> None:
    """Add the options of `probes rehearse`."""
    parser.add_argument(
        "--out",
        type=Path,
        **REQUIRED,
        help="folder for models, runs, logs and rehearsal.json",
    )
    parser.add_argument(
        "--size",
        choices=["7b", "1b", "tiny"],
        default="7b",
        help="size of the LLM",
    )
    parser.add_argument(
        "--encoder",
        choices=["clip", "dinov2", "siglip"],
        default="clip",
        help="encoder, at its published size",
    )
    parser.add_argument(
        "--images",
        type=count,
        metavar="N",
        help="training images of the probes (default: 8; tiny: 6); the solver keeps the memory of two, 1%% of 200",
    )
    parser.add_argument(
        "--inputs-only",
        action="store_true",
        help="only write models and data, with OUT/inputs/env.sh for Slurm",
    )


def add_calibrate_options(parser: ArgumentParser) -> None:
    """Add the options of `probes calibrate`."""
    parser.add_argument(
        "--out",
        default="runs/calibrate",
        metavar="DIR",
        help="folder of all seeds (default: %(default)s)",
    )
    text = "seeds to run; the table has all that are in DIR"
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=list(range(10)),
        metavar="N",
        help=text,
    )
    text = "size of the world, see `probes demo-assets` (default: %(default)s)"
    parser.add_argument(
        "--scale",
        type=float,
        default=0.1,
        metavar="X",
        help=text,
    )
    parser.add_argument(
        "--scenes",
        type=int,
        choices=[2, 4],
        default=2,
        help="scenes in a picture (default: %(default)s)",
    )
    studies = ["planted", "weak", "random", "merged0", "merged1", "merged3", "language"]
    studies += [f"normal_{sd}" for sd in (0.02, 0.04, 0.08, 0.16, 0.32)]
    studies += "orthogonal uniform sharp flat repeated low_rank reordered exchanged".split()
    parser.add_argument(
        "--studies",
        nargs="+",
        choices=studies,
        metavar="NAME",
        help=f"some of {', '.join(studies)}",
    )


WORLD_COMMANDS = {
    "demo-assets": Command(
        "probes.worlds.assets:run",
        "write the toy world in the formats of the real data",
        add_demo_assets_options,
    ),
    "plant": Command(
        "probes.worlds.plant:run",
        "edit a model of the binding world so that the truth of a claim is known",
        add_plant_options,
    ),
    "demo": Command(
        "probes.worlds.demo:run",
        (
            "train, probe and report on a toy world, in minutes on two CPU cores; again: "
            "only what is missing"
        ),
        add_demo_options,
    ),
    "real": Command(
        "probes.worlds.real:run",
        (
            "the demo with a real encoder (DINOv2-S) and a real language model "
            "(SmolLM2-135M), on the toy world or on photos; again: only what is missing"
        ),
        add_real_options,
    ),
    "questions": Command(
        "probes.worlds.questions:run",
        (
            "make conversations about photos from their masks, balanced so that a blind "
            "answer is right in half"
        ),
        add_questions_options,
    ),
    "rehearse": Command(
        "probes.rehearsal.run:run",
        (
            "run the complete study for a few steps on random weights of the published "
            "sizes, and measure it"
        ),
        add_rehearse_options,
    ),
    "calibrate": Command(
        "probes.worlds.calibrate:run",
        (
            "plant effects in models of a toy world and count how often each verdict says "
            "yes, where it should and not"
        ),
        add_calibrate_options,
    ),
}
