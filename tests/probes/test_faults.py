"""Commands that are killed or run out of disk space end, when repeated, with the results of an undisturbed study."""

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import fault_server
import numpy as np
import pytest
import small_disks

pytestmark = pytest.mark.slow

STEPS = {  # command -> files it writes, in this order
    "fit": ["probes.safetensors", "counts.safetensors", "manifest.json", "metrics.json"],
    "knockout": ["knockout.json", "knockout.safetensors"],
    "report": ["report/index.html", "report/results.json"],
}
COMMANDS = {
    "fit": "fit -c configs/demo/probes.yaml --trainer.max_epochs 2 --ckpt_path last --model.mllm MODEL --data.root DATA"
    " --data.batch_size 3 --out OUT/MASK",
    "knockout": "knockout --probes RUN --classes sky wall road --batch-size 2",
    "report": "report OUT --out RUN/report",
}
NAMES = [*STEPS, "end"]


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Give the server the import path of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}/helpers"
        )
        yield


@dataclass
class Study:
    """A causal and a bidirectional run in OUT, and the commands that make them; analyses are of the causal one."""

    out: Path
    checkpoints: dict[str, Path]
    data: Path

    @property
    def log(self) -> Path:
        return self.out.with_name("log")

    def command(self, step: str, mask: str = "causal") -> list[str]:
        command = COMMANDS[step].replace("RUN", f"{self.out}/causal").replace("OUT", f"{self.out}")
        command = command.replace("MASK", mask).replace("DATA", str(self.data))
        return command.replace("MODEL", str(self.checkpoints[mask])).split()

    def run(self, step: str, *fault, mask: str = "causal") -> int:
        return fault_server.process(self.command(step, mask), self.log, *fault)

    def must_run(self, step: str, **options) -> None:
        assert self.run(step, **options) == 0, self.log.read_text()[-3000:]

    def restore_before(self, step: str) -> dict[str, bytes]:
        """Return to the undisturbed study before a step, or after the last at "end", and return its files.

        Only the steps that lead there run, once for all tests.
        """
        stage = self.out.with_name(f"before-{step}")
        if not stage.exists():
            if step == NAMES[0]:
                self.must_run("fit", mask="bidirectional")
            else:
                previous = NAMES[NAMES.index(step) - 1]
                self.restore_before(previous)
                self.must_run(previous)
            shutil.copytree(self.out, stage)
        shutil.rmtree(self.out)
        shutil.copytree(stage, self.out)
        return self.files()

    def restore_after(self, step: str) -> dict[str, bytes]:
        return self.restore_before(NAMES[NAMES.index(step) + 1])

    def files(self) -> dict[str, bytes]:
        """All results byte by byte, without checkpoints, events, and config.yaml, which contains its command."""
        left_out = ("/checkpoints/", "events.out", "config.yaml")
        return {
            str(path.relative_to(self.out)): path.read_bytes()
            for path in sorted(self.out.rglob("*"))
            if path.is_file() and not any(part in str(path) for part in left_out)
        }


@pytest.fixture(scope="module")
def study(checkpoints, segmentation, tmp_path_factory) -> Study:
    return Study(tmp_path_factory.mktemp("faults") / "runs", checkpoints, segmentation)


@pytest.mark.parametrize(
    "step", ["fit", "knockout", pytest.param("report", marks=pytest.mark.nightly)]
)
def test_killed_before_a_change_on_the_disk_it_ends_as_undisturbed(step, study):
    """FAULTS_EACH=1000 tests every change that each command makes."""
    expected = study.restore_after(step)
    assert all(f"causal/{name}" in expected for name in STEPS[step])
    study.restore_before(step)
    assert study.run(step, study.out) == 0
    changes = int(study.log.read_text().split()[-1])
    count = min(changes, int(os.environ.get("FAULTS_EACH", 2)))
    for at in np.linspace(1, changes, count).round().astype(int).tolist():
        study.restore_before(step)
        killed = study.run(step, study.out, at)
        assert killed == -signal.SIGKILL, study.log.read_text()[-3000:]
        study.must_run(step)
        assert study.files() == expected, f"after a kill at change {at} of {changes}"


@pytest.mark.parametrize("step", ["fit", pytest.param("knockout", marks=pytest.mark.nightly)])
def test_full_disk_loses_nothing(step, study):
    """There is room for a lock only; for `fit`, also for its events and first checkpoint."""
    expected = study.restore_after(step)
    shutil.rmtree(study.out)
    with small_disks.mounted(study.out, "size=16m"):
        shutil.copytree(study.out.with_name(f"before-{step}"), study.out, dirs_exist_ok=True)
        before = study.files()
        filler = small_disks.fill(study.out, left=24_000 if step == "fit" else 4096)
        study.log.write_text("")
        assert study.run(step) == 1
        said = study.log.read_text()
        assert "No space left" in said, said[-3000:]
        filler.unlink()
        left = study.files()
        assert {name: left[name] for name in before} == before
        assert not [name for name in left if name.endswith(".partial")]
        study.must_run(step)
        assert study.files() == expected
    study.restore_before(step)


def test_run_started_again_and_killed_does_not_count_as_finished(study):
    expected = study.restore_after("fit")
    command = [x for x in study.command("fit") if x not in ("--ckpt_path", "last")]
    command += ["--overwrite", "true"]
    last = study.out / "causal/checkpoints/last.ckpt"
    written = last.stat().st_mtime_ns
    for at in range(4, 200, 4):  # until it has saved a new checkpoint
        status = fault_server.process(command, study.log, study.out, at)
        assert status == -signal.SIGKILL
        newest = max((path.stat().st_mtime_ns for path in last.parent.glob("*.ckpt")), default=0)
        if newest > written:
            break
        if not last.exists():
            written = 0  # training has begun, and the earlier run is deleted
    assert not (last.parents[1] / "metrics.json").exists()
    study.log.write_text("")
    study.must_run("fit")
    assert "Restored all states from the checkpoint" in study.log.read_text()
    assert study.files() == expected
