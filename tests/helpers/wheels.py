"""Build the wheel from the source archive of what git tracks, and install it into an environment without the clone.

python tests/helpers/wheels.py OUT     # OUT/dist/*.whl and OUT/environment/bin/{llava-bidir,probes}
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools.build_meta import *; build_{}(sys.argv[1])"


def tracked_files() -> list[str]:
    """Return the names of the files that git tracks; raise CalledProcessError outside of a checkout."""
    command = ["git", "ls-files"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


def copy_tracked_files(folder: Path) -> None:
    """Copy what git tracks, since building leaves its traces in the folder."""
    for name in tracked_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target, follow_symlinks=False)


def build(source: Path, dist: Path) -> Path:
    """Build `source` into a source archive, and that into the wheel, which is returned; both are in `dist`."""
    dist.mkdir(parents=True, exist_ok=True)
    _run_backend("sdist", source, dist)
    (archive,) = dist.glob("*.tar.gz")
    shutil.unpack_archive(archive, dist / "source", filter="data")
    (unpacked,) = (dist / "source").iterdir()
    _run_backend("wheel", unpacked, dist)
    (wheel,) = dist.glob("*.whl")
    return wheel


def _run_backend(kind: str, folder: Path, dist: Path) -> None:
    command = [sys.executable, "-c", BUILD.format(kind), dist]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def install(wheel: Path, environment: Path) -> None:
    """Install the wheel into a new environment, with the packages of this one but without the clone.

    This environment has the clone by a .pth file, which is read in this environment's own folder only.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    pip = [sys.executable, "-m", "pip", "--isolated", "--python", environment / "bin/python"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    show = "import llava_bidir, probes; print(llava_bidir.__file__, probes.__file__)"
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [environment / "bin/python", "-c", show]
    said = subprocess.run(
        command, cwd=environment, env=variables, capture_output=True, text=True, check=True
    ).stdout
    if not all(Path(path).is_relative_to(packages) for path in said.split()):
        raise RuntimeError(f"the environment does not use the wheel: {said}")


def make(out: Path) -> None:
    """Build and install in `out`, which is replaced."""
    shutil.rmtree(out, ignore_errors=True)
    copy_tracked_files(out / "copy")
    wheel = build(out / "copy", out / "dist")
    install(wheel, out / "environment")


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute())
