"""`llava-bidir fit | validate | test`: LightningCLI of the training."""

from contextlib import nullcontext
from pathlib import Path
from shlex import quote

from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info

from llava_bidir.common.checkpoints import SaveAtStepBoundary
from llava_bidir.common.errors import UserError
from llava_bidir.common.files import exclusive_run_lock, read_json
from llava_bidir.common.hf import TRAINING_JSON
from llava_bidir.common.imports import imports_as_text
from llava_bidir.common.lightning_cli import ON_ONE_CPU, RunCLI, check_trainer
from llava_bidir.common.runs import (
    RunFolder,
    interrupt_says_what_is_saved,
    is_complete,
    resolve_ckpt_path,
    run_process,
)
from llava_bidir.common.training_folder import plan_training
from llava_bidir.data.datamodule import InstructionData
from llava_bidir.data.dataset import check_annotations
from llava_bidir.model.export import export_hf

from .callbacks import ExportModel, LogLearningRate, ShowAnswers
from .module import LlavaTraining
from .read_checkpoint import read_checkpoint
from .resume import how_to_train_on
from .throughput import Throughput


class TrainingCLI(RunCLI):
    """Command line for model, data and trainer; several `-c` merge from left to right, then the flags."""

    results = ("hf", "steps")  # the last: models exported on the way

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add --out, --overwrite and --throughput, and link the data to the model's processor."""
        self.add_run_options(parser, "runs/llava", "hf/")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.link_arguments("model.processor", "data.processor", apply_on="instantiate")
        parser.link_arguments("model.image_tokens", "data.image_tokens", apply_on="instantiate")
        parser.link_arguments("model.max_positions", "data.max_positions", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.seed")
        # which the export of a checkpoint needs
        parser.link_arguments("data.template", "model.template")

    def instantiate_trainer(self, **kwargs) -> Trainer:
        """Add requeueing under Slurm."""
        trainer = super().instantiate_trainer(**kwargs, requeue=SLURMEnvironment.detect())
        # The data would show other samples in each epoch, and what one step exports would count as a finished run.
        why = "a run would count as finished that is none; for a trial, use trainer.max_steps and another --out"
        check_trainer(trainer, {"fast_dev_run": False, "overfit_batches": 0.0}, why)
        return trainer

    def fit(self, ckpt_path: str | None = None, **kwargs) -> None:
        """Train. `--ckpt_path last` resumes the run in OUT; a finished run is replaced with `--overwrite true` only.

        Raises:
            UserError: Another process trains in OUT, OUT cannot be written, or it holds a run of another identity.
        """
        folder = Path(self.trainer.default_root_dir)
        exported = folder / "hf"
        record = exported / TRAINING_JSON

        with exclusive_run_lock(folder) if self.trainer.is_global_zero else nullcontext():

            def saved():
                return read_json(record).get("identity")

            of_run = RunFolder(
                path=folder,
                checkpoints=folder / "checkpoints",
                result=record,
                results=self.results,
                read_identity=saved,
            )
            advice = how_to_train_on(folder, self.model.hparams.trainable)
            plan = plan_training(self, ckpt_path, of_run, advice)
            if plan.finished:
                rank_zero_info(f"{exported} exists: this run is finished; nothing to do")
                return
            ckpt_path = plan.checkpoint
            with interrupt_says_what_is_saved(folder / "checkpoints"):
                self.trainer.fit(ckpt_path=ckpt_path, **kwargs)
            # removed if the run has saved a newer one
            left = ckpt_path and Path(ckpt_path).exists()
            if left and self.trainer.is_global_zero and not is_complete(ckpt_path, record):
                # Lightning does not call ExportModel for a checkpoint of the last step
                model, processor, training = read_checkpoint(Path(ckpt_path))
                export_hf(model, processor, exported, training)
            rank_zero_info(
                f"The trained model is {exported}. Try: llava-bidir generate {quote(str(exported))} IMAGE PROMPT"
                + imports_as_text()
            )

    def parse_arguments(self, parser: LightningArgumentParser, args) -> None:
        """Check and resolve `--ckpt_path`, except for `fit`, which does so under the lock of the run."""
        super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        run = self.config.get(command or "") or {}
        if run.get("ckpt_path") and command != "fit":
            folder = Path(run["out"]) / "checkpoints"
            run["ckpt_path"] = resolve_ckpt_path(run["ckpt_path"], folder)
            if run["ckpt_path"] is None:
                raise UserError(f"--ckpt_path last: no valid checkpoint in {folder}")

    def check_inputs(self) -> None:
        """Raise if there are no records: a model may be looked up on a hub that does not answer."""
        for name in ("data.annotations", "data.val_annotations"):
            if path := self._get(self.config, name):
                check_annotations(path)


def build_cli(argv: list[str], run: bool = True, prog: str = "llava-bidir") -> TrainingCLI:
    """Parse `argv` and build model, data and trainer; if `run`, also execute the subcommand."""
    callbacks = [
        LogLearningRate(),
        ShowAnswers(),
        SaveAtStepBoundary(),
        ExportModel(),
    ]
    return TrainingCLI(
        LlavaTraining,
        InstructionData,
        args=argv,
        run=run,
        parser_kwargs={"prog": prog},
        trainer_defaults={"callbacks": callbacks},
    )


def build_data_cli(argv: list[str], prog: str) -> TrainingCLI:
    """Return model (without weights) and data of a training config, on machines without the config's GPUs too."""
    return build_cli([*argv, *ON_ONE_CPU], run=False, prog=prog)


def main(argv: list[str]) -> None:
    """Run `llava-bidir fit`, `validate` or `test`."""
    with run_process("high"):  # TF32 on GPUs, as LLaVA trains
        build_cli(argv)
