"""The supply chain: installed packages are pinned and hashed."""

import itertools
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical
from processes import run_command

ROOT = Path(__file__).parents[1]
LOCK = "requirements.lock"
HARNESS_LOCK = "llava_bidir/vqa/requirements.lock"


def torch_version() -> str:
    return re.search(r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(), re.M).group(1)


def locked(path: str) -> dict[str, tuple[Requirement, list[str]]]:
    """{package: (its requirement, its hashes)}."""
    lines = re.sub(r" \\\n +", " ", (ROOT / path).read_text()).splitlines()
    requirements = {}
    for line in lines:
        if line[0] != "#":
            requirement, *hashes = line.split(" --hash=sha256:")
            requirements[canonical(Requirement(requirement).name)] = (
                Requirement(requirement),
                hashes,
            )
    return requirements


@pytest.mark.parametrize("lock", [LOCK, HARNESS_LOCK])
def test_every_locked_package_is_pinned_with_hashes(lock):
    for requirement, hashes in locked(lock).values():
        assert hashes
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement


def test_the_lock_holds_every_declared_package_within_its_bounds():
    packages = locked(LOCK)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    del extras["timm"]  # see Makefile
    for line in [*project["dependencies"], *itertools.chain(*extras.values())]:
        requirement = Requirement(line)
        if canonical(requirement.name) == "torch":
            assert torch_version() in requirement.specifier
            continue
        (version,) = packages[canonical(requirement.name)][0].specifier
        assert version.version in requirement.specifier, f"{line} is not in {LOCK}: make lock"


def test_the_harness_has_the_versions_that_training_has():
    lines = (ROOT / "llava_bidir/vqa/requirements.txt").read_text().splitlines()
    harness = dict(line.split("==") for line in lines if line and line[0] != "#")
    harness = {canonical(name): version for name, version in harness.items()}
    ours = {name: next(iter(r.specifier)).version for name, (r, _) in locked(LOCK).items()}
    assert harness.pop("torch") == torch_version()
    assert {name for name in harness if name not in locked(HARNESS_LOCK)} == set(), "make lock"
    common = ours.keys() & harness.keys()
    assert {"transformers", "tokenizers", "pillow", "datasets", "jsonargparse"} <= common
    assert {name: harness[name] for name in common} == {name: ours[name] for name in common}
    assert not harness.keys() & {"torchvision", "timm"}, (
        "beside a CPU build of torch they break transformers"
    )


@pytest.mark.parametrize("target", ["venv", "vqa-venv"])
def test_only_torch_and_the_project_are_installed_without_a_hash(target):
    plan = run_command(["make", "-nB", target], cwd=ROOT).stdout
    installs = [line for line in plan.splitlines() if "pip install" in line]
    hashed = [line for line in installs if "--no-deps" in line and "--require-hashes -r" in line]
    torch, project = [line for line in installs if line not in hashed]
    assert len(hashed) == 2
    assert torch.endswith(f" torch=={torch_version()}")
    assert project.endswith("--no-deps --no-build-isolation -e .")
