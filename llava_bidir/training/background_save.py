"""Write ZeRO checkpoints in a thread while training goes on.

Training waits until each rank has copied its shard to host memory, and for nothing else. A second save waits for the
first, so that a rank holds at most one copy.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from llava_bidir.common.atomic_io import wrap_os_errors
from llava_bidir.common.checkpoint_io import commit_checkpoint_directory


class BackgroundSave:
    """Takes over writing from a DeepSpeed engine, whose `save_checkpoint` then only copies.

    Lightning's AsyncCheckpointIO does not apply: DeepSpeed writes its files itself. DeepSpeed's own decoupled engine
    shares the tensors with another process and therefore waits for it before the next optimizer step.

    Args:
        engine: The DeepSpeed engine, initialised on all ranks.
        timeout: Time that a rank's thread waits for those of the others.
    """

    def __init__(self, engine: Any, timeout: timedelta):
        engine.checkpoint_engine.save = self._copy
        self.copies: dict[str, Any] = {}
        self.jobs: list[Future] = []
        self.thread = ThreadPoolExecutor(1, "save")
        self.ranks = distributed.new_group(backend="gloo", timeout=timeout)  # training uses the others at any time

    def _copy(self, state_dict: dict[str, Any], path: str) -> None:
        from deepspeed.checkpoint.utils import clone_tensors_for_torch_save

        self.copies[path] = clone_tensors_for_torch_save(state_dict)

    def write(self, path: Path, manifest: dict[str, Any]) -> None:
        """Write the copies of all ranks in the background; then commit them as the checkpoint `path`."""
        copies, self.copies = self.copies, {}

        def write() -> None:
            with wrap_os_errors(path):
                while copies:
                    file, state = copies.popitem()
                    torch.save(state, file)
                distributed.barrier(self.ranks)
                if distributed.get_rank() == 0:
                    commit_checkpoint_directory(path, manifest)

        self.then(write)

    def then(self, job: Callable[[], Any]) -> None:
        """Run `job` in the background after those before it, unless one of them fails."""
        before = self.jobs[-1] if self.jobs else None

        def run() -> None:
            if before is not None:
                before.result()  # raises its error
            job()

        self.jobs.append(self.thread.submit(run))

    def check(self) -> None:
        """Raise the error of a job that has failed, without waiting."""
        while self.jobs and self.jobs[0].done():
            self.jobs.pop(0).result()

    def wait(self) -> None:
        """Wait for all jobs, and raise the error of the first that failed."""
        while self.jobs:
            self.jobs.pop(0).result()
