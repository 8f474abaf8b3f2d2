"""Stops a training run on Slurm before its time is up, so that it goes on later where it was.

Slurm sends SIGUSR1 some minutes before the time limit (`--signal` in slurm/stage*.sbatch), and SIGTERM when it takes
the job off its nodes, for another that goes first or because of `scancel`. Nothing can be saved in a signal handler: a
checkpoint needs all ranks, and the signal finds them in different places, one waiting for another's gradients. So the
handler takes a note, and after the next optimizer step the ranks agree on what to do. (Lightning's handlers save or
broadcast at once, and the run hangs as soon as ranks are skewed: Lightning issue 21406.)
"""

import os
import signal
import subprocess
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from llava_bidir.common.step_boundary import at_step_boundary

INTERRUPTED = os.EX_TEMPFAIL  # exit status of a run that is not finished; the job's script stops on it
CHECKPOINT = "checkpoints/last.ckpt"  # in the run's folder, where `--ckpt_path last` finds it


class Requeue(Callback):
    """Saves RUN/checkpoints/last.ckpt and ends the process when Slurm says so; on SIGUSR1 the job is put back in the
    queue. After a SIGTERM it is not: Slurm does that itself with a job that had to give way, and a cancelled one is not
    to come back.

    Raises:
        SystemExit: With INTERRUPTED, on all ranks together.
    """

    def __init__(self):
        self.received: set[int] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before training there is nothing to save. Lightning restores this handler when training is over, so that a
        late signal does not kill a run that is about to end well."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in (signal.SIGUSR1, signal.SIGTERM):  # the latter in place of Lightning's
            signal.signal(number, lambda number, frame: self.received.add(number))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if not at_step_boundary(trainer):
            return
        agree = trainer.strategy.reduce_boolean_decision
        if not agree(bool(self.received), all=False):
            return
        trainer.save_checkpoint(Path(trainer.default_root_dir) / CHECKPOINT)
        rank_zero_info(f"interrupted after step {trainer.global_step}; `--ckpt_path last` goes on from there")
        if agree(signal.SIGUSR1 in self.received, all=False):
            if trainer.is_global_zero:
                subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
            trainer.strategy.barrier()  # srun kills all ranks when one of them ends
        raise SystemExit(INTERRUPTED)
