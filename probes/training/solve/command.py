"""The command `probes solve`: the options of `probes fit`, and those of the solver."""

import shutil
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from llava_bidir.common.errors import UserError
from llava_bidir.common.lightning_cli import run_process
from llava_bidir.common.rank_zero import run_on_all_ranks
from llava_bidir.common.when_to_save import interrupt_says_what_is_saved
from probes.tasks import TASKS
from probes.training.cli import ProbeCLI, build_cli
from probes.training.run_schema import MODEL_SETTINGS

from .run import SolveRun, estimate, solve
from .solver import SolveOptions

Config = dict[
    str, Any
]  # nested as in YAML: {"model": {"mllm": ...}, "data": {...}, "passes": 20, ...}
# options that `probes fit` does not have; both have ckpt_path
OF_SOLVER = ("passes", "folds", "strengths", "sample_images", "disk_gb", "dry_run")


class SolveCLI(ProbeCLI):
    """Build model, data and trainer from options or a config; those that say how probes are trained are ignored."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the solver."""
        super().add_arguments_to_parser(parser)
        text = "most passes over the training images; one is enough where the states of all images fit into memory"
        parser.add_argument("--passes", type=int, default=SolveOptions.passes, help=text)
        text = "folds of training images that choose the strength"
        parser.add_argument("--folds", type=int, default=SolveOptions.folds, help=text)
        text = "strengths of regularisation to solve and score (default: the best one, searched in half decades, and "
        text += "its neighbours; for depth and normals 25 from 1e-6 to 1)"
        parser.add_argument("--strengths", type=float, nargs="+", metavar="R", help=text)
        text = "training images whose memory is used: for all states if it is all images, else for a few pixels of "
        text += "each image in every pass (default: as many as fit into a quarter of it)"
        parser.add_argument("--sample-images", type=int | None, metavar="N", help=text)
        text = "GB of states on the disk of --out, deleted at the end: if those of all training images take no more, "
        text += "passes after the first one run no model (default: none)"
        parser.add_argument(
            "--disk-gb", type=float, default=SolveOptions.disk_gb, metavar="GB", help=text
        )
        text = "`last` resumes a killed run and leaves a finished one alone"
        parser.add_argument("--ckpt_path", type=Literal["last"] | None, help=text)
        text = "print memory and hours, measured on a few images"
        parser.add_argument("--dry-run", action="store_true", help=text)

    def check_inputs(self) -> None:
        """Raise a UserError if an option of the solver is out of range."""
        config = self.config
        for name, least in (("passes", 1), ("folds", 2)):
            if config[name] < least:
                raise UserError(f"--{name} must be at least {least}, got {config[name]}")
        images = config["sample_images"]
        if images is not None and images < config["folds"]:
            folds = f"one for each of the {config['folds']} --folds"
            raise UserError(
                f"--sample-images must be at least {config['folds']}, {folds}; got {images}"
            )
        if not config["disk_gb"] >= 0:
            raise UserError(f"--disk-gb must be at least 0, got {config['disk_gb']:g}")
        if invalid := [x for x in config["strengths"] or () if not 0 < x < float("inf")]:
            raise UserError(f"--strengths must be above 0, got {invalid[0]:g}")


class SolveConfigReader(SolveCLI):
    """Parse the options of `probes solve`, and build nothing."""

    def _set_seed(self) -> None:
        """Leave the seeds alone."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def read_config(words: list[str], prog: str = "probes solve") -> Config:
    """Return all options of `probes solve` as values: those of the words and of their configs, else the defaults.

    Raises:
        SystemExit: An option is unknown or has an invalid value.
        UserError: A config contains a key twice.
    """
    cli = build_cli(words, run=False, prog=prog, cli_class=SolveConfigReader)
    return yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))


def main(argv: list[str]) -> None:
    """Run `probes solve`."""
    run_config(argv[1:])


def run_config(config: Config | list[str]) -> None:
    """Run `probes solve` with a config, or with the words of a command."""
    cli = build_cli(config, run=False, prog="probes solve", cli_class=SolveCLI)
    data = cli.datamodule
    data.cache_features = False  # images are read once, or kept as the solver's sample
    data.trainer = cli.trainer
    # `build_cli` has made a module to train, of which only the settings are needed here. The run
    # stands in its place: `plan_run` makes the identity of its `hparams` and `models()`.
    cli.model = make_solve_run(cli.model.hparams, cli.config, data.task)
    with run_process():
        if cli.config["dry_run"]:
            dry_run(cli)
        else:
            run(cli, cli.config["ckpt_path"])


def make_solve_run(
    module_settings: Mapping[str, Any],
    config: Mapping[str, Any],
    task: str,
) -> SolveRun:
    """Return what a run is made from.

    Args:
        module_settings: Settings of a `ProbeModule`, of which those of the frozen model are used.
        config: Has the options of the solver.
        task: Kind of targets.

    Raises:
        UserError: The config asks for probes that are not linear, or a strength is out of range.
    """
    if module_settings["head"] != "linear":
        raise UserError(
            f"model.head is {module_settings['head']!r}, but only linear probes can be solved; use `probes fit`"
        )
    of_classes = TASKS[task].loss is not None
    strengths = tuple(sorted(set(config["strengths"] or ()), reverse=True)) or None
    if not of_classes and strengths and strengths[0] > 1:
        raise UserError(f"--strengths of least squares must be at most 1, got {strengths[0]:g}")
    own = {"folds": config["folds"], "strengths": strengths}
    of_passes = {name: config[name] for name in ("passes", "sample_images") if of_classes}
    of_model = {name: module_settings[name] for name in MODEL_SETTINGS}
    options = SolveOptions(
        seed=module_settings["seed"],
        disk_gb=config["disk_gb"],
        **own,
        **of_passes,
    )
    return SolveRun(own | of_model | of_passes, options, TASKS[task])


def run(cli: ProbeCLI, ckpt_path: str | None) -> None:
    """Make the passes, score the probes, and write the files of the run."""
    with cli.exclusive_run_lock():
        plan = cli.plan_run(ckpt_path)
        if plan.finished:
            return
        cli.model.identity = plan.identity
        cli.model.resuming = ckpt_path == "last"

        def solve_here() -> None:
            solve(cli.model, cli.datamodule, cli.trainer, cli.saves_predictions)

        with interrupt_says_what_is_saved(cli.checkpoints):
            run_on_all_ranks(cli.trainer, solve_here)
        if cli.trainer.is_global_zero:
            shutil.rmtree(cli.checkpoints, ignore_errors=True)
            rank_zero_info(cli.format_scores())


def dry_run(cli: ProbeCLI) -> None:
    """Print the time of a pass and the memory. Nothing is written."""
    training = len(cli.datamodule.splits["training"])
    if training <= cli.datamodule.batch_size:  # known before the model is loaded
        rank_zero_info(f"time: not measured, since {training} training images are one batch")
        return
    run_on_all_ranks(cli.trainer, lambda: estimate(cli.model, cli.datamodule, cli.trainer))
