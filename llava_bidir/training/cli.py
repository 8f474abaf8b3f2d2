"""`llava-bidir fit | validate | test`: LightningCLI over the two stages."""

import logging
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info

from llava_bidir.common.checkpoint_io import AtomicCheckpointIO, check_resume_compatible, is_complete, resolve_ckpt_path
from llava_bidir.common.hf_loading import read_json
from llava_bidir.common.lightning_cli import ConfiguredCLI
from llava_bidir.common.run_lock import exclusive_run_lock
from llava_bidir.common.step_boundary import SaveAtStepBoundary
from llava_bidir.data.datamodule import InstructionData
from llava_bidir.model.hf_export import TRAINING_FACTS, export_hf

from .callbacks import ExportModel, ShowAnswers
from .loss_monitor import WatchLoss
from .module import RESUME_OVERRIDABLE, LlavaTraining
from .read_checkpoint import read_checkpoint
from .slurm_requeue import Requeue
from .throughput import Throughput

# warnings about what is meant to be so
HARMLESS = (
    "LightningCLI's args parameter",
    ".*does not have many workers",
    ".*isinstance.treespec",
    ".*in eval mode",
    ".*your dataloader is not resumable",  # InstructionData finds its own place in the epoch
)


class TrainingCLI(ConfiguredCLI):
    """Model, data and trainer from YAML; several `-c` merge from left to right, then the flags."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", default="runs/llava", help="folder of the run: config, events, checkpoints, hf/")
        parser.link_arguments("out", "trainer.default_root_dir")
        parser.add_lightning_class_args(WatchLoss, "watch_loss")
        # the data owns no tokenizer: what turns text and images into tensors belongs to the model
        parser.link_arguments("model.processor", "data.processor", apply_on="instantiate")
        parser.link_arguments("model.image_tokens", "data.image_tokens", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.seed")

    def instantiate_trainer(self, **kwargs):
        out = self._get(self.config_init, "out")
        if self._get(self.config_init, "trainer.logger") is None:
            kwargs["logger"] = TensorBoardLogger(out, name="", version="")
        plugins = [*(self._get(self.config_init, "trainer.plugins", default=None) or []), AtomicCheckpointIO()]
        on_slurm = SLURMEnvironment.detect()
        if on_slurm:
            plugins.append(SLURMEnvironment(auto_requeue=False))
        trainer = super().instantiate_trainer(**kwargs, plugins=plugins)
        if on_slurm:
            trainer.callbacks.append(Requeue())
        return trainer

    def fit(self, ckpt_path: str | None = None, **kwargs) -> None:
        """Trains. With `--ckpt_path last` it goes on where the run in OUT stopped, and leaves a finished one alone.

        Raises:
            UserError: Another process trains in OUT, or OUT cannot be written.
        """
        folder = Path(self.trainer.default_root_dir)
        exported = folder / "hf"
        with exclusive_run_lock(folder) if self.trainer.is_global_zero else nullcontext():
            if ckpt_path == "last":
                ckpt_path = resolve_ckpt_path(ckpt_path, folder / "checkpoints")
                if is_complete(ckpt_path, exported / TRAINING_FACTS):
                    facts = read_json(exported / TRAINING_FACTS)
                    check_resume_compatible(facts, self.model.hparams, "model", RESUME_OVERRIDABLE, what=str(exported))
                    rank_zero_info(f"{exported} is there: this run is finished; nothing to do")
                    return
            self.trainer.fit(ckpt_path=ckpt_path, **kwargs)
            if ckpt_path and self.trainer.is_global_zero and not is_complete(ckpt_path, exported / TRAINING_FACTS):
                # of a checkpoint with nothing left to train Lightning does not call ExportModel
                model, processor, facts = read_checkpoint(Path(ckpt_path))
                export_hf(model, processor, exported, facts)
            rank_zero_info(f"{exported}: the trained model. Try it: llava-bidir generate {exported} IMAGE PROMPT")

    def parse_arguments(self, parser: LightningArgumentParser, args) -> None:
        super().parse_arguments(parser, args)
        run = self.config.get(self.config.get("subcommand") or "") or {}
        if run.get("ckpt_path") not in (None, "last"):  # before Lightning opens it for its settings
            resolve_ckpt_path(run["ckpt_path"], Path(run["out"]) / "checkpoints")

    def before_validate(self) -> None:
        run = self.config_init[self.subcommand]
        if run["ckpt_path"] == "last":
            run["ckpt_path"] = resolve_ckpt_path("last", Path(run["out"]) / "checkpoints")

    before_test = before_validate


def build_cli(argv: list[str], run: bool = True) -> TrainingCLI:
    """Parses `argv` and, if `run`, executes its subcommand; otherwise model, data and trainer are only built."""
    for harmless in HARMLESS:
        warnings.filterwarnings("ignore", message=harmless)
    return TrainingCLI(
        LlavaTraining,
        InstructionData,
        args=argv,
        run=run,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "llava-bidir"},
        auto_configure_optimizers=False,  # --optimizer would take the place of the recipe's
        trainer_defaults={
            # InstructionData cuts batches by rank; a second sampler on top would break LLaVA's grouping
            "use_distributed_sampler": False,
            "callbacks": [
                LearningRateMonitor("step"),
                Throughput(),
                ShowAnswers(),
                SaveAtStepBoundary(),
                ExportModel(),
            ],
        },
    )


def build_data_cli(argv: list[str]) -> TrainingCLI:
    """Model (without weights) and data of a training config, also on a machine without the GPUs it names."""
    here = {"accelerator": "cpu", "devices": "1", "num_nodes": "1", "strategy": "auto", "precision": "32-true"}
    return build_cli([*argv, *(f"--trainer.{key}={value}" for key, value in here.items())], run=False)


def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as LLaVA trains
    try:
        build_cli(argv)
    finally:  # Lightning does it for NCCL only; a process that leaves gloo's threads to its end may abort
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()
