"""`llava-bidir fit | validate | test`: LightningCLI of the training."""

import os
from pathlib import Path

from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import TRAINING_JSON
from llava_bidir.common.identity import run_identity
from llava_bidir.common.lightning_cli import RunCLI, check_trainer
from llava_bidir.common.processes import rank_zero_info
from llava_bidir.common.runs import RunFolder, find_checkpoint, last_checkpoint, run_process
from llava_bidir.data.datamodule import InstructionData

from .callbacks import ShowAnswers, ShowSettings
from .module import LlavaTraining
from .read_checkpoint import export_checkpoint
from .throughput import Throughput

# Options of a command that reads the data of a config, on machines without the config's GPUs too
ON_ONE_CPU = Namespace(
    accelerator="cpu", devices=1, num_nodes=1, strategy="auto", precision="32-true"
)


ABOUT_DRY_RUN = (
    "--dry-run trains nothing: it prints steps, tokens, memory of a GPU, hours and disk, without weights, images and "
    "GPU; its own options are --json, --mfu 0.4 and --gpu_gb 80."
)
UNSAID = ""  # model.adapter, until the command or a config says a folder or null


class TrainingCLI(RunCLI):
    """Command line for model, data and trainer; several `-c` merge from left to right, then the flags."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run and --throughput, and link the data to the model's processor."""
        self.add_run_options(parser, "runs/llava", "hf/")
        parser.add_lightning_class_args(Throughput, "throughput")
        for name in ("processor", "image_tokens", "max_positions"):
            parser.link_arguments(f"model.{name}", f"data.{name}", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.seed")
        # which the export of a checkpoint needs
        parser.link_arguments("data.template", "model.template")
        parser.set_defaults({"model.adapter": UNSAID})

    def instantiate_trainer(self, **kwargs) -> Trainer:
        """Refuse what would count as a finished run that is none, or is overruled by the data's sizes."""
        trainer = super().instantiate_trainer(**kwargs)
        required = {"fast_dev_run": False, "overfit_batches": 0.0, "limit_train_batches": 1.0}
        why = "a run would count as finished that is none; for a trial, use trainer.max_steps and another --out"
        check_trainer(trainer, required, why)
        why = "it follows from data.batch_size and data.micro_batch_size"
        check_trainer(trainer, {"accumulate_grad_batches": 1}, why)
        return trainer

    def fit(self, ckpt_path: str | None = None, **kwargs) -> None:
        """Train, and export the last checkpoint to OUT/hf.

        `--ckpt_path last` resumes the run in OUT; a finished run is replaced with `--overwrite true` only.

        Raises:
            UserError: Another process trains in OUT, OUT cannot be written, or it holds a run of another identity.
        """
        out = Path(self.trainer.default_root_dir)
        record = out / "hf" / TRAINING_JSON
        folder = RunFolder(path=out, result=record, results=("hf", "steps"), made_from=record)
        with self.started(folder, ckpt_path) as plan:
            if plan.finished:
                if self.trainer.is_global_zero:
                    identity = run_identity(self.trainer, self.model, self.datamodule)
                    folder.check_finished(identity)
                rank_zero_info(f"{record.parent} exists: this run is finished; nothing to do")
                return
            self.trainer.fit(ckpt_path=plan.checkpoint, **kwargs)
            if self.trainer.is_global_zero:
                last = last_checkpoint(folder.checkpoints)
                export_checkpoint(last, record.parent)
        rank_zero_info(f"The trained model is {record.parent}")

    def before_validate(self) -> None:
        """Find the checkpoint, that of `--ckpt_path` or the run's last: without one, Lightning scores new weights."""
        run = self.config_init[self.subcommand]
        folder = Path(run.out) / "checkpoints"
        run.ckpt_path = find_checkpoint(run.ckpt_path or "last", folder)
        if run.ckpt_path is None:
            raise UserError(
                f"there is no checkpoint in {folder}; give --ckpt_path, or the --out of a run that has one"
            )

    before_test = before_validate

    def before_instantiate_classes(self) -> None:
        """Raise if an LLM would train with a random adapter unasked, or there are no records.

        Before anything is read: a model may be looked up on a hub that does not answer.
        """
        model = self.config.get(str(self.subcommand), self.config).model
        if model.adapter == UNSAID:
            model.adapter = None
            if self.subcommand == "fit" and model.trainable != ["adapter"]:
                raise UserError(
                    "model.adapter is not given, so the LLM would train with a random one: give RUN/hf of stage 1, or "
                    "`--model.adapter null` for a new adapter"
                )
        for name in ("data.annotations", "data.val_annotations"):
            path = self._get(self.config, name)
            if path and not os.path.isfile(path):
                raise UserError(f"{name}: no file {path}")


class DataCLI(TrainingCLI):
    """Model without weights, data and trainer of a config, on machines without the config's GPUs, too.

    Attributes:
        asked: Settings of the trainer in the config.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Take --ckpt_path, which commands of `fit` have; it says nothing of models and data."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", help="as of `fit`, where it resumes a run")

    def before_instantiate_classes(self) -> None:
        """Put the trainer on one CPU."""
        super().before_instantiate_classes()
        self.asked = self.config.trainer.clone()
        self.config.trainer.update(ON_ONE_CPU)


def build_cli(
    argv: list[str],
    run: bool = True,
    prog: str = "llava-bidir",
    cli: type[TrainingCLI] = TrainingCLI,
) -> TrainingCLI:
    """Parse `argv` and build model, data and trainer; if `run`, also execute the subcommand."""
    return cli(
        LlavaTraining,
        InstructionData,
        args=argv,
        run=run,
        parser_kwargs={"prog": prog, "fit": {"epilog": ABOUT_DRY_RUN}},
        trainer_defaults={"callbacks": [ShowSettings(), ShowAnswers()]},
    )


def build_data_cli(argv: list[str], prog: str) -> DataCLI:
    """Return model (without weights) and data of a training config, and what its trainer was asked for."""
    return build_cli(argv, run=False, prog=prog, cli=DataCLI)


def main(argv: list[str]) -> None:
    """Run `llava-bidir fit`, `validate` or `test`."""
    with run_process("high"):  # TF32 on GPUs, as LLaVA trains
        build_cli(argv)
