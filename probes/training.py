"""`probes fit | validate | test`: LightningCLI over a probe run."""

import logging
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from .callbacks import SavePredictions, ShowMaps
from .data.datamodule import SegmentationData
from .module import ProbeModule
from .resume import CatchUpValidation

# warnings about what is meant to be so
HARMLESS = (
    "LightningCLI's args parameter",
    ".*does not have many workers",
    ".*isinstance.treespec",
    ".*in eval mode",
)


class ProbeCLI(LightningCLI):
    """Model, data and trainer from YAML; several `-c` merge from left to right, then the flags."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--out", default="runs/probes", help="folder of the run: config, events, checkpoints, metrics.json, probes"
        )
        parser.add_argument(
            "--save_predictions", type=bool, default=False, help="also OUT/predictions/SITE/NAME.png of every image"
        )
        parser.link_arguments("out", "trainer.default_root_dir")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def instantiate_trainer(self, **kwargs):
        if self._get(self.config_init, "trainer.logger") is None:
            kwargs["logger"] = TensorBoardLogger(self._get(self.config_init, "out"), name="", version="")
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.checkpoint_callbacks:
            callback.save_last = True  # what `--ckpt_path last` looks for, and without which it would start anew
        if self._get(self.config_init, "save_predictions"):
            trainer.callbacks.append(SavePredictions())
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Lightning puts the settings that a checkpoint names in place of those of the command line, silently. Here the
        command line counts, and where it differs `fit` says so (`check_same_run`)."""

    def fit(self, **kwargs) -> None:
        """Trains, then scores each probe at its best epoch and writes the run's files. With `--ckpt_path last` it goes
        on where the run in OUT stopped, and leaves a finished one alone."""
        metrics = Path(self.trainer.default_root_dir) / "metrics.json"
        if self._get(self.config, "ckpt_path") == "last" and metrics.is_file():
            rank_zero_info(f"{metrics} is there: this run is finished; nothing to do")
            return
        self.trainer.fit(**kwargs)
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


def build_cli(argv: list[str], run: bool = True) -> ProbeCLI:
    """Parses `argv` and, if `run`, executes its subcommand; otherwise model, data and trainer are only built."""
    for harmless in HARMLESS:
        warnings.filterwarnings("ignore", message=harmless)
    return ProbeCLI(
        ProbeModule,
        SegmentationData,
        args=argv,
        run=run,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "probes"},
        auto_configure_optimizers=False,  # --optimizer would take the place of the recipe's
        trainer_defaults={
            "use_distributed_sampler": False,  # SegmentationData has its own
            "num_sanity_val_steps": 0,
            "callbacks": [LearningRateMonitor("step"), ShowMaps(), CatchUpValidation()],
        },
    )


def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_float32_matmul_precision("high")
    try:
        build_cli(argv)
    finally:  # Lightning does it for NCCL only; a process that leaves gloo's threads to its end may abort
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()
