"""Commands that are killed or run out of disk space end, when repeated, with the results of an undisturbed study."""

import os
import shutil
import signal
from pathlib import Path

import fault_server
import pytest
import small_disks

pytestmark = pytest.mark.slow

STEPS = {  # command -> files it writes, in this order
    "fit": ["probes.safetensors", "counts.safetensors", "manifest.json", "metrics.json"],
    "knockout": ["knockout.json", "knockout.safetensors"],
    "umap": ["umap.json"],
    "maps": ["maps.json", "maps.safetensors"],
    "report": ["report/index.html", "report/results.json"],
}
COMMANDS = {
    "fit": "fit -c configs/demo/probes.yaml --trainer.max_epochs 2 --ckpt_path last --model.mllm MODEL --data.root DATA"
    " --data.batch_size 3 --out OUT",
    "knockout": "knockout --probes RUN --classes sky wall road --batch-size 2",
    "umap": "umap --probes RUN --image 0",
    "maps": "maps --probes RUN --image 0 1",
    "report": "report RUN OTHER --out RUN/report",
}


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Give the server the import path of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}/helpers"
        )
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("NUMBA_DISABLE_JIT", "1")  # compiling UMAP would take ten seconds
        yield


class Study:
    """A causal and a bidirectional run in OUT, and the commands that make them; analyses are of the causal one."""

    def __init__(
        self,
        out: Path,
        checkpoints: dict[str, Path],
        data: Path,
    ):
        self.out = out
        self.checkpoints = checkpoints
        self.data = data
        self.log = out.parent / "log"

    def command(self, step: str, mask: str = "causal") -> list[str]:
        places = {
            "RUN": self.out / "causal",
            "OUT": self.out / mask,
            "OTHER": self.out / "bidirectional",
            "MODEL": self.checkpoints[mask],
            "DATA": self.data,
        }
        command = COMMANDS[step]
        for name, path in places.items():
            command = command.replace(name, str(path))
        return command.split()

    def run(self, step: str, *fault, mask: str = "causal") -> int:
        return fault_server.process(self.command(step, mask), self.log, *fault)

    def before(self, step: str) -> Path:
        """Return a copy of the undisturbed study before a step; "end" is the last.

        Only the steps that lead there run, once for all tests.
        """
        names = [*STEPS, "end"]
        copy = self.out.with_name(f"before-{step}")
        if copy.exists():
            return copy
        if step == names[0]:
            assert self.run("fit", mask="bidirectional") == 0, self.log.read_text()[-3000:]
        else:
            previous = names[names.index(step) - 1]
            self.restore_before(previous)
            assert self.run(previous) == 0, self.log.read_text()[-3000:]
        shutil.copytree(self.out, copy)
        return copy

    def restore_before(self, step: str) -> dict[str, bytes]:
        """Return to the study before a step, and return its files."""
        stage = self.before(step)
        shutil.rmtree(self.out)
        shutil.copytree(stage, self.out)
        return self.files()

    def restore_after(self, step: str) -> dict[str, bytes]:
        names = [*STEPS, "end"]
        return self.restore_before(names[names.index(step) + 1])

    def files(self) -> dict[str, bytes]:
        """All results byte by byte, without checkpoints, events, and config.yaml, which contains its command."""
        contents = {}
        for path in sorted(self.out.rglob("*")):
            name = str(path.relative_to(self.out))
            if path.is_file() and not any(
                part in name for part in ("/checkpoints/", "events.out", "config.yaml")
            ):
                contents[name] = path.read_bytes()
        return contents


@pytest.fixture(scope="module")
def study(checkpoints, segmentation, tmp_path_factory) -> Study:
    return Study(tmp_path_factory.mktemp("faults") / "runs", checkpoints, segmentation)


def evenly(moments: range, count: int) -> list[int]:
    """`count` moments, evenly spread from the first to the last, or all."""
    if len(moments) <= count:
        return list(moments)
    return [moments[round(i * (len(moments) - 1) / max(1, count - 1))] for i in range(count)]


def nightly_except(*steps: str):
    """Parameters for all steps, of which the nightly job runs the others."""
    others = [step for step in STEPS if step not in steps]
    nightly = [pytest.param(step, marks=pytest.mark.nightly) for step in others]
    return pytest.mark.parametrize("step", [*steps, *nightly])


@nightly_except("fit", "knockout")
def test_killed_before_a_change_on_the_disk_it_ends_as_undisturbed(step, study):
    """FAULTS_EACH=1000 tests every change that each command makes."""
    expected = study.restore_after(step)
    assert all(f"causal/{name}" in expected for name in STEPS[step])
    study.restore_before(step)
    assert study.run(step, study.out) == 0
    changes = int(study.log.read_text().split()[-1])
    moments = evenly(range(1, changes + 1), int(os.environ.get("FAULTS_EACH", 2)))
    for at in moments:
        study.restore_before(step)
        killed = study.run(step, study.out, at)
        assert killed == -signal.SIGKILL, study.log.read_text()[-3000:]
        assert study.run(step) == 0, f"after change {at}: {study.log.read_text()[-3000:]}"
        assert study.files() == expected, f"after a kill at change {at}"
    print(f"{step}: {len(moments)} kills at {changes} changes")


@nightly_except("fit")
def test_full_disk_loses_nothing(step, study):
    """There is room for a lock only; for `fit`, also for its events and first checkpoint."""
    expected = study.restore_after(step)
    shutil.rmtree(study.out)
    with small_disks.mounted(study.out, "size=16m"):
        shutil.copytree(study.before(step), study.out, dirs_exist_ok=True)
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
        assert study.run(step) == 0, study.log.read_text()[-3000:]
        assert study.files() == expected
    study.restore_before(step)


def test_run_started_again_and_killed_does_not_count_as_finished(study):
    expected = study.restore_after("fit")
    command = [x for x in study.command("fit") if x not in ("--ckpt_path", "last")]
    command += ["--overwrite", "true"]
    last = study.out / "causal/checkpoints/last.ckpt"
    written = last.stat().st_mtime_ns
    for at in range(4, 200, 4):  # until it has saved a new checkpoint
        assert (
            fault_server.process(
                command,
                study.log,
                study.out,
                at,
            )
            == -signal.SIGKILL
        )
        newest = max((path.stat().st_mtime_ns for path in last.parent.glob("*.ckpt")), default=0)
        if newest > written:
            break
        if not last.exists():
            written = 0  # training has begun, and the earlier run is deleted
    assert not (last.parents[1] / "metrics.json").exists()
    study.log.write_text("")
    assert study.run("fit") == 0
    assert "resuming" in study.log.read_text()
    assert study.files() == expected
