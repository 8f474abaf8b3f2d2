"""The wheel, built from the source archive and installed without the clone: it is whole, and enough to work with."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import labs
import pytest
import tiny_models
from processes import HANGING_S

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import *; build_{}(sys.argv[1])"
LEFT_OUT = (".lock", ".md", ".ipynb")  # for a checkout only

pytestmark = pytest.mark.slow


def files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.split()


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """What git tracks, since building leaves its traces."""
    folder = tmp_path_factory.mktemp("copy")
    for name in files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def built(copy, tmp_path_factory) -> Path:
    """The folder of source archive and wheel."""
    out = tmp_path_factory.mktemp("dist")
    build = lambda kind, folder: subprocess.run(
        [sys.executable, "-c", BUILD.format(kind), out], cwd=folder, check=True, capture_output=True
    )
    build("sdist", copy)
    (archive,) = out.glob("*.tar.gz")
    shutil.unpack_archive(archive, out / "source", filter="data")
    (source,) = (out / "source").iterdir()
    build("wheel", source)
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A function that runs a command of the installed wheel in an empty folder, which it returns with the output.

    The packages that ours needs are those of this environment; it has the clone by a .pth file, which is read in this
    environment's own folder only.
    """
    environment, folder = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--isolated", "--python", environment / "bin/python", "install"]
    subprocess.run([*pip, "-q", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def start(*command: str, **options) -> subprocess.Popen:
        program, *words = command
        options |= {"cwd": folder, "env": variables, "text": True}
        return subprocess.Popen([environment / "bin" / program, *words], stdout=subprocess.PIPE, **options)

    def run(*command: str) -> str:
        done = start(*command, stderr=subprocess.STDOUT)
        said, _ = done.communicate(timeout=HANGING_S)
        assert done.returncode == 0, said
        return said

    run.start, run.folder = start, folder
    where = run("python", "-c", "import llava_bidir, probes; print(llava_bidir.__file__, probes.__file__)")
    assert all(path.startswith(str(packages)) for path in where.split()), where
    return run


def test_wheel_and_source_archive_hold_the_packages_whole(built):
    link = "llava_bidir/configs"
    wanted = {name for name in files() if name.startswith(("llava_bidir/", "probes/")) and name != link}
    wanted |= {f"llava_bidir/{name}" for name in files() if name.startswith("configs/") and name.endswith(".yaml")}
    wanted = {name for name in wanted if not name.endswith(LEFT_OUT)}
    (wheel,), (source,) = built.glob("*.whl"), (built / "source").iterdir()
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == wanted
    inside = {str(path.relative_to(source)) for path in source.rglob("*")}
    assert wanted | {"pyproject.toml", "README.md", "LICENSE"} <= inside


def test_configs_are_found_by_name(installed):
    names = {line.split()[0] for line in installed("llava-bidir", "configs").splitlines()}
    known = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in (ROOT / "configs").rglob("*.yaml")}
    assert names == known
    assert installed("llava-bidir", "configs", "zero3") == (ROOT / "configs/cluster/zero3.yaml").read_text()
    installed("llava-bidir", "configs", "--copy", "mine")
    assert len(list((installed.folder / "mine").rglob("*.yaml"))) == len(known)


def test_configs_are_found_in_a_clone_on_a_system_without_links(copy, tmp_path):
    shutil.copytree(copy, tmp_path / "clone", symlinks=True)
    link = tmp_path / "clone/llava_bidir/configs"
    link.unlink()
    link.write_text("../configs")  # as git writes it there
    command = [sys.executable, "-m", "llava_bidir", "configs"]
    variables = os.environ | {"PYTHONPATH": str(tmp_path / "clone")}
    said = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True).stdout
    assert "cluster/zero3" in said


def test_a_demo_a_study_of_own_pictures_and_the_lab_work_without_the_clone(installed):
    installed("llava-bidir", "demo", "--scale", "0.01")
    assert "adapter_drop" in (installed.folder / "runs/demo/report/results.json").read_text()
    tiny_models.write_segmentation(installed.folder / "pictures")
    model = "runs/demo/causal/stage2/hf"
    said = installed("probes", "study", model, "pictures", "--out", "runs/mine", "--draws", "1", "-c", "demo/probes")
    assert "runs/mine/report/index.html" in said
    assert (installed.folder / "runs/mine/report/index.html").stat().st_size > 100_000

    lab = installed.start("probes", "lab", "runs/mine/trained", "--port", "0", stderr=subprocess.DEVNULL)
    try:
        address = lab.stdout.readline().strip()
        port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)", address).groups()
        cookie = {"Cookie": f"lab-{port}={token}"}
        status, page = labs.send(int(port), "GET", "/", **cookie)
        assert status == 200 and b"<title>" in page
        request = json.dumps({"photo": "split:0", "model": 0, "patch": 3})
        status, body = labs.send(int(port), "POST", "/run/words_of_patch", request, **cookie)
        assert status == 200 and "result" in json.loads(body.splitlines()[-1]), body
    finally:
        lab.kill()
        lab.communicate()
