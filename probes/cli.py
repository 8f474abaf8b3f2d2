"""The `probes` command. Each command's module is imported when the command runs."""

from collections.abc import Sequence

from llava_bidir.common.cli import Command, Groups, run
from llava_bidir.common.errors import UserError
from probes.analyses import MEASURED
from probes.config import (
    AssetsOptions,
    AttentionOptions,
    DemoOptions,
    LabOptions,
    MaskOptions,
    MasksOptions,
    PlantOptions,
    QuestionsOptions,
    ReportOptions,
    SegmentOptions,
    SitesOptions,
    SolveOptions,
    StatesOptions,
    StudyOptions,
    VerifyOptions,
)

ABOUT = (
    "Layerwise segmentation probes for frozen MLLMs and vision encoders (arXiv 2603.17228). A finished result is "
    "replaced with --overwrite true only."
)
COMMANDS = {
    "From a model and labelled photos to a report": {
        "study": Command(
            "probes.studies.run:run",
            "solve probes of MODEL and its random controls on DATA, run the analyses, report; again: what is missing",
            StudyOptions,
        ),
        "report": Command(
            "probes.report.page:run",
            "write claims, figures and tables of runs as one self-contained HTML page",
            ReportOptions,
        ),
        "demo": Command(
            "probes.worlds.demo:run",
            "train, probe and report on a toy world, in minutes on two CPU cores; again: only what is missing",
            DemoOptions,
        ),
    },
    "Probe one model": {
        "masks": Command(
            "probes.masks.command:run",
            "make DATA of masks as people have them: COCO, LabelMe, YOLO, colours, ADE20K in full, Hugging Face's",
            MasksOptions,
        ),
        "verify-data": Command(
            "probes.data.probe_data:verify_data",
            "read every image and target before training; status 1 if any cannot be used",
            VerifyOptions,
        ),
        "solve": Command(
            "probes.solve.run:run_solve",
            "solve a probe at every site at the optimum of its regularised loss, with the strength by cross-validation",
            SolveOptions,
        ),
        "fit": Command(
            "probes.fit.cli:main",
            "train a probe at every site, as the paper does: -c ade20k --model.mllm DIR --data.root DIR --out RUN",
        ),
    },
    "Look into a model, without probes": {
        "sites": Command(
            "probes.analyses.extract:print_sites",
            "list the sites of a model, their widths and its attention",
            SitesOptions,
        ),
        "mask": Command(
            "probes.analyses.extract:print_mask",
            "measure which tokens attend to which in each layer; status 1 where config and family claim otherwise",
            MaskOptions,
        ),
        "attention": Command(
            "probes.analyses.attention_pictures:run",
            "draw what a patch of a photo attends to, layer by layer",
            AttentionOptions,
        ),
        "states": Command(
            "probes.analyses.extract:write_states",
            "write the states of images to a safetensors file",
            StatesOptions,
        ),
    },
    "Try photos of your own": {
        "lab": Command(
            "probes.lab.command:run",
            "open a live page of running models: any photo by layer and patch, with patches blocked or replaced",
            LabOptions,
        ),
        "segment": Command(
            "probes.analyses.segment:run", "write the class maps of any photos", SegmentOptions
        ),
    },
    "Make data and models whose truth is known": {
        "questions": Command(
            "probes.worlds.questions:run",
            "make conversations about photos from their masks, balanced so that a blind answer is right in half",
            QuestionsOptions,
        ),
        "demo-assets": Command(
            "probes.worlds.assets:run",
            "write the toy world in the formats of the real data",
            AssetsOptions,
        ),
        "plant": Command(
            "probes.worlds.plant:run",
            "edit a model of the toy world so that the truth of a claim is known",
            PlantOptions,
        ),
    },
}


def commands() -> Groups:
    """Return the commands, with those of analyses.

    Raises:
        UserError: A registered analysis has the name of another command.
    """
    for name in MEASURED:
        if any(name in group for group in COMMANDS.values()):
            raise UserError(f"analysis {name!r} has the name of a command; choose another name")
    analyses = {
        name: Command("probes.analyses:run", analysis.help or analysis.question, analysis.options)
        for name, analysis in MEASURED.items()
    }
    return COMMANDS | {"Analyse finished runs": analyses}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Raises:
        SystemExit: Bad usage or bad input, with a message that says what was expected.
    """
    run("probes", about=ABOUT, groups=commands, argv=argv)
