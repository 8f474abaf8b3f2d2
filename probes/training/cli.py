"""`probes fit | validate | test`: LightningCLI over a probe run."""

import json
import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from llava_bidir.common.checkpoint_io import AtomicCheckpointIO, check_resume_compatible, is_complete, resolve_ckpt_path
from llava_bidir.common.hf_loading import read_json
from llava_bidir.common.lightning_cli import ConfiguredCLI
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.data.datamodule import SegmentationData

from .callbacks import CatchUpValidation, SavePredictions, ShowMaps
from .module import ProbeModule

# warnings about what is meant to be so
HARMLESS = (
    "LightningCLI's args parameter",
    ".*does not have many workers",
    ".*isinstance.treespec",
    ".*in eval mode",
)


class ProbeCLI(ConfiguredCLI):
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
        plugins = [*(self._get(self.config_init, "trainer.plugins") or []), AtomicCheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs, plugins=plugins)
        for callback in trainer.checkpoint_callbacks:
            callback.save_last = True  # what `--ckpt_path last` looks for, and without which it would start anew
            callback.dirpath = callback.dirpath or f"{trainer.default_root_dir}/checkpoints"  # whatever the logger
        if self._get(self.config_init, "save_predictions"):
            trainer.callbacks.append(SavePredictions())
        return trainer

    @property
    def out(self) -> Path:
        return Path(self.trainer.default_root_dir)

    @property
    def checkpoints(self) -> Path:
        callback = self.trainer.checkpoint_callback
        return Path(callback.dirpath) if callback else self.out / "checkpoints"

    def exclusive_run_lock(self) -> AbstractContextManager:
        """Holds the run's folder; the first process does it for all."""
        return exclusive_run_lock(self.out) if self.trainer.is_global_zero else nullcontext()

    def fit(self, ckpt_path: str | None = None, **kwargs) -> None:
        """Trains, then scores each probe at its best epoch and writes the run's files. With `--ckpt_path last` it goes
        on where the run in OUT stopped, and leaves a finished one alone."""
        with self.exclusive_run_lock():
            checkpoint = resolve_ckpt_path(ckpt_path, self.checkpoints)
            if ckpt_path == "last" and is_complete(checkpoint, self.out / "metrics.json"):
                manifest = read_json(self.out / "manifest.json")
                check_resume_compatible(
                    manifest["config"], self.model.hparams, "model", source=str(self.out / "metrics.json")
                )
                rank_zero_info(f"{self.out / 'metrics.json'} is there: this run is finished; nothing to do")
                return
            self.trainer.fit(ckpt_path=checkpoint, **kwargs)
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            rank_zero_info(self._outcome())

    def _outcome(self) -> str:
        found = json.loads((self.out / "metrics.json").read_text())["summary"]
        scores = {"encoder": found["encoder"], "adapter": found["adapter"], found["peak_site"]: found["peak_llm"]}
        shown = ", ".join(f"{site} {miou:.1%}" for site, miou in scores.items() if miou is not None)
        report = f"probes report {self.out} --out {self.out / 'report'}"
        return f"{self.out}: mIoU {shown or 'in metrics.json'}. See all: {report}"

    def test(self, ckpt_path: str | None = None, **kwargs) -> None:
        """Scores the probes of a checkpoint and writes the run's files."""
        with self.exclusive_run_lock():
            self.trainer.test(ckpt_path=resolve_ckpt_path(ckpt_path, self.checkpoints), **kwargs)


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
