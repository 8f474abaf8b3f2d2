"""The wheel, built from the source archive and installed without the clone: it is complete, and enough to work with.

With WHEEL=FOLDER, the tests use what `python tests/helpers/wheels.py FOLDER` has made, as `.ci/run` does; test_demo.py
makes a demo by it.
"""

import os
import zipfile
from pathlib import Path

import pytest
import tiny_models
import wheels
from processes import run_command

LEFT_OUT = (".lock", ".md", ".png", ".csv", ".ipynb", "requirements.txt")  # for a checkout only

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with copy/, dist/ and environment/."""
    if given := os.environ.get("WHEEL"):
        return Path(given).absolute()
    folder = tmp_path_factory.mktemp("wheel")
    wheels.make(folder)
    return folder


def test_wheel_and_source_archive_hold_all_of_the_packages(built):
    link = "llava_bidir/configs"
    files = wheels.tracked_files()
    wanted = {
        name for name in files if name.startswith(("llava_bidir/", "probes/")) and name != link
    }
    wanted |= {
        f"llava_bidir/{name}"
        for name in files
        if name.startswith("configs/") and name.endswith(".yaml")
    }
    wanted = {name for name in wanted if not name.endswith(LEFT_OUT)}
    (wheel,) = (built / "dist").glob("*.whl")
    (source,) = (built / "dist/source").iterdir()
    assert {
        name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name
    } == wanted
    inside = {str(path.relative_to(source)) for path in source.rglob("*")}
    assert wanted | {"pyproject.toml", "README.md", "LICENSE"} <= inside


@pytest.mark.nightly
def test_a_demo_and_a_study_of_own_pictures_work_without_the_clone(built, tmp_path):
    """In an empty folder."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def probes(*words: str) -> str:
        command = [built / "environment/bin/probes", *words]
        return run_command(command, cwd=tmp_path, env=variables).stdout

    probes("demo", "--scale", "0.01")
    assert "adapter_drop" in (tmp_path / "runs/demo/report/results.json").read_text()
    tiny_models.write_segmentation(tmp_path / "pictures")
    options = ["--out", "runs/mine", "--draws", "1", "-c", "demo/probes"]
    said = probes("study", "runs/demo/causal/stage2/hf", "pictures", *options)
    assert "runs/mine/report/index.html" in said
    page = (tmp_path / "runs/mine/report/index.html").read_text()
    assert "<svg" in page and "data:image/" in page  # curves, and pictures by site
