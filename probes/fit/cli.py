"""The command `probes fit`: LightningCLI for a run of probes that are trained."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import run_identity
from llava_bidir.common.lightning_cli import ConfigParser, RunCLI, check_trainer
from llava_bidir.common.runs import run_process
from probes.config import DataOptions, ModelOptions, RunConfig
from probes.models.chosen import choose_model
from probes.ops.geometry import SLIDE
from probes.runs.files import format_scores, run_folder, say_finished
from probes.tasks import SEGMENTATION, find_task

from .datamodule import ProbeDataModule
from .module import ProbeModule
from .published_head import check_published, is_published

# Scores count every validation image and moments every training image; the schedule counts batches.
REQUIRED = {
    "accumulate_grad_batches": 1,
    # 1 is one batch, 1.0 are all
    "limit_val_batches": 1.0,
    "limit_test_batches": 1.0,
}
WHY_REQUIRED = (
    "probes train on batches of data.batch_size and are scored on all images; for a trial, use a smaller dataset, or "
    "trainer.limit_train_batches with fit"
)


class ProbeParser(ConfigParser):
    """Parser of `probes fit MODEL DATA`."""

    first_words = ("model.mllm", "data.root")


class ProbeCLI(RunCLI):
    """Build model, data and trainer from YAML; several `-c` merge from left to right, then the flags."""

    words_parser = ProbeParser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the only command, with the arguments that are none of its options."""
        return {"fit": RunCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run, and link those that data and model share."""
        self.add_run_options(parser, "runs/probes", "metrics.json, probes")
        parser.add_argument(
            "--save_predictions",
            type=bool,
            default=False,
            help="also write the predictions of every image to OUT/predictions/SITE/NAME.png",
        )
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def before_instantiate_classes(self) -> None:
        """Check the names of task, mask and sites before data and weights are read."""
        config = self.config.get(str(self.subcommand), self.config)
        names = [option.name for option in fields(ModelOptions)]
        model = ModelOptions(**{name: config.model[name] for name in names})
        data = DataOptions(
            **{option.name: config.data[option.name] for option in fields(DataOptions)}
        )
        choose_model(model)
        find_task(data.task)
        check_training_images(model, data)
        if is_published(model.head):
            check_published(model)

    def instantiate_trainer(self, **kwargs) -> Trainer:
        """Build the trainer, which must have the options of a run that is scored."""
        trainer = super().instantiate_trainer(**kwargs)
        check_trainer(trainer, REQUIRED, WHY_REQUIRED)
        return trainer

    def fit(self, ckpt_path: str | None = None, **kwargs) -> None:
        """Train, then score each probe of its best epoch and write the files of the run.

        With `--ckpt_path last` the run in OUT is resumed. A finished run is replaced with `--overwrite true` only.
        """
        out = Path(self.trainer.default_root_dir)
        folder = run_folder(out)
        self.model.saves_predictions = self._get(self.config_init, "save_predictions")
        with self.started(folder, ckpt_path) as plan:
            if plan.finished:
                if self.trainer.is_global_zero:
                    data = self.datamodule.data
                    folder.check_finished(run_identity(self.trainer, self.model, data))
                say_finished(out, self.model.saves_predictions)
                return
            if self.model.published is None:
                self.trainer.fit(ckpt_path=plan.checkpoint, **kwargs)
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            if self.trainer.is_global_zero:  # others may be here before it has written the files
                rank_zero_info(format_scores(out, self.model.task))


def check_training_images(model: ModelOptions, data: DataOptions) -> None:
    """Raise a UserError if options of training images and of the schedule do not go together."""
    if data.cache_features and (model.image_resize == SLIDE or data.random_scale):
        raise UserError(
            "data.cache_features keeps the states of one square a photo; set it to false for model.image_resize slide "
            "and data.random_scale"
        )
    if model.flip and (data.cache_features or data.task == "normals"):
        raise UserError(
            "model.flip: expected data.cache_features false, and another task than normals, which point elsewhere in a "
            "mirrored photo"
        )
    of_crops = ("max_class_share", "flip_probability", "photometric_hue")
    unused = [name for name in of_crops if getattr(data, name) is not None]
    if unused and data.random_scale is None:
        raise UserError(f"data.{unused[0]} is of random crops; set data.random_scale, too")
    if data.random_scale and data.task != SEGMENTATION:
        raise UserError(f"data.random_scale: crops are of segmentation, not of {data.task}")
    if data.random_scale and model.image_resize != SLIDE:
        raise UserError(
            "data.random_scale: crops keep the aspect of photos; validate as they are trained, with model.image_resize "
            f"{SLIDE}"
        )
    if model.warmup_steps and not model.schedule:
        raise UserError("model.warmup_steps needs model.schedule: linear or cosine")


def build_cli(args: list[str] | dict[str, Any], run: bool = True, prog: str = "probes") -> ProbeCLI:
    """Parse words or a config and execute its subcommand; with `run=False` only build model, data and trainer."""
    return ProbeCLI(
        ProbeModule,
        ProbeDataModule,
        args=args,
        run=run,
        parser_kwargs={"prog": prog, "allow_abbrev": False},
        trainer_defaults={"num_sanity_val_steps": 0, "callbacks": [LearningRateMonitor("step")]},
    )


def main(argv: list[str]) -> None:
    """Run `probes fit` with words."""
    with run_process("high"):
        build_cli(argv)


def run_fit(config: RunConfig) -> None:
    """Run `probes fit`."""
    values = asdict(config)
    del values["solver"]
    del values["ckpt_path"]  # of the subcommand
    with run_process("high"):
        cli = build_cli(values, run=False, prog="probes fit")
        cli.fit(config.ckpt_path, model=cli.model, datamodule=cli.datamodule)
