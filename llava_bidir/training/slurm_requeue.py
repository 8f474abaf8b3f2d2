"""Checkpoint and requeue of a training run when Slurm signals the end of its time.

Slurm sends SIGUSR1 some minutes before the time limit (`--signal` in slurm/stage*.sbatch), and SIGTERM on preemption or
`scancel`. The handler only sets a flag, because a checkpoint needs all ranks and each may be at another point of the
step. After the next optimizer step the ranks agree on what to do. (Lightning's handlers save or broadcast immediately,
and the run hangs if ranks are skewed: Lightning issue 21406.)
"""

import os
import signal
import subprocess

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from llava_bidir.common.step_boundary import at_step_boundary, save_interrupted

INTERRUPTED = os.EX_TEMPFAIL  # exit status of an unfinished run; the job script stops on it


class SlurmRequeue(Callback):
    """Save RUN/checkpoints/last.ckpt and exit after a signal; requeue the job after SIGUSR1.

    SIGTERM does not requeue: Slurm itself requeues a preempted job, and a cancelled job must not return.

    Raises:
        SystemExit: With status INTERRUPTED, on all ranks after the same step.
    """

    def __init__(self):
        self.received: set[int] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ignore SIGUSR1 outside training, when there is nothing to save.

        Lightning restores this handler after training, so a late signal does not kill a run that is finished.
        """
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record signals from now on."""
        for number in (signal.SIGUSR1, signal.SIGTERM):  # replaces Lightning's handler of SIGTERM
            signal.signal(number, lambda number, frame: self.received.add(number))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs,
        batch,
        batch_idx: int,
    ) -> None:
        """Save and exit if any rank received a signal."""
        if not at_step_boundary(trainer):
            return
        agree = trainer.strategy.reduce_boolean_decision
        if not agree(bool(self.received), all=False):
            return
        save_interrupted(trainer)
        rank_zero_info(
            f"interrupted after step {trainer.global_step}; resume with `--ckpt_path last`"
        )
        if agree(signal.SIGUSR1 in self.received, all=False):
            if trainer.is_global_zero:
                subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
            trainer.strategy.barrier()  # srun kills all ranks when one exits
        raise SystemExit(INTERRUPTED)
