"""The supply chain: what is installed is pinned and hashed, declared, allowed by its licence, and packed whole."""

import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import licences
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical
from test_structure import imports, pins, sources

ROOT = Path(__file__).parents[1]
LOCKS = {
    "requirements.lock": "constraints.txt",
    "llava_bidir/vqa/requirements.lock": "llava_bidir/vqa/requirements.txt",
}
SUPPORTED = [
    {"sys_platform": system, "platform_machine": machine, "python_full_version": f"{python}.0"}
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
    for python in ("3.11", "3.12", "3.13")
]


def locked(path: str) -> dict[str, tuple[Requirement, list[str]]]:
    """{package: (its requirement, its hashes)}."""
    lines = re.sub(r" \\\n +", " ", (ROOT / path).read_text()).splitlines()
    found = {}
    for line in (line for line in lines if line[0] != "#"):
        requirement, *hashes = line.split(" --hash=sha256:")
        found[canonical(Requirement(requirement).name)] = Requirement(requirement), hashes
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_but_torch_is_locked_with_hashes(lock):
    """A package in the lock alone is one for other systems."""
    pinned = {canonical(name): version for name, version in pins(LOCKS[lock]).items()}
    found = locked(lock)
    assert pinned.keys() - found.keys() == {"torch"}, f"{lock} is not of {LOCKS[lock]}: make lock"
    for name, (requirement, hashes) in found.items():
        assert hashes and all(re.fullmatch("[0-9a-f]{64}", known) for known in hashes)
        used = requirement.marker is None or any(requirement.marker.evaluate(system) for system in SUPPORTED)
        assert str(requirement.specifier) == f"=={pinned.get(name)}" or not used and name not in pinned


@pytest.mark.parametrize("target", ["venv", "vqa-venv"])
def test_only_torch_and_the_project_are_installed_without_a_hash(target):
    plan = subprocess.run(["make", "-nB", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installs = [line for line in plan.splitlines() if "pip install" in line]
    hashed = [line for line in installs if "--no-deps" in line and "--require-hashes -r" in line]
    torch, project = [line for line in installs if line not in hashed]
    assert (
        len(hashed) == 2
        and re.search(r" -c \S+ +torch$", torch)
        and project.endswith("--no-deps --no-build-isolation -e .")
    )


@pytest.mark.parametrize("right", [True, False])
def test_a_file_with_another_hash_is_refused(right, tmp_path):
    pytest.importorskip("pip")
    wheel = tmp_path / "brick-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("brick.py", "")
        file.writestr("brick-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: brick\nVersion: 1.0\n")
        file.writestr("brick-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("brick-1.0.dist-info/RECORD", "")
    known = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if not right:
        with zipfile.ZipFile(wheel, "a") as file:
            file.writestr("brick_too.py", "print('not what was locked')")
    (tmp_path / "lock").write_text(f"brick==1.0 \\\n    --hash=sha256:{known}\n")
    command = [sys.executable, "-m", "pip", "--isolated", "install", "--no-deps", "--no-index", "--require-hashes"]
    command += ["--find-links", tmp_path, "--target", tmp_path / "there", "-r", tmp_path / "lock"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == right == (tmp_path / "there/brick.py").exists(), done.stderr
    assert right or "DO NOT MATCH THE HASHES" in done.stderr


def declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return {canonical(Requirement(line).name) for line in lines}


def imported(*folders: str) -> dict[str, set[str]]:
    """{file: the packages it imports, by the names they are installed under}."""
    known = packages_distributions()
    ours = {"llava_bidir", "probes", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    return {
        str(path.relative_to(ROOT)): {
            canonical(known.get(module, [module])[0])
            for module in {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - ours
        }
        for folder in folders
        for path in sources(folder)
    }


def test_what_is_imported_is_declared():
    harness = {canonical(name) for name in pins("llava_bidir/vqa/requirements.txt")}
    for path, found in imported("llava_bidir", "probes").items():
        allowed = declared("cluster") | (harness if "/vqa/" in path else set()) | {"triton"}  # triton: comes with torch
        assert found <= allowed, f"{path} imports what pyproject.toml does not declare"
    for path, found in imported("tests").items():
        assert found <= declared("cluster", "test", "browser") | {"lmms-eval", "pip"}, f"{path}: the same of its extras"


def test_what_is_declared_is_imported_or_says_why():
    used = set().union(*imported("llava_bidir", "probes", "tests").values())
    text = (ROOT / "pyproject.toml").read_text()
    for name in declared("cluster", "test", "browser") - used:
        assert re.search(rf'"{name}\b[^\n]*" *[],]+ +# \w', text, re.IGNORECASE), f"{name} is declared; what for?"


def test_licences_are_allowed():
    """Of what is locked and installed; beside it there may be anything."""
    for lock in LOCKS:
        for name in [*locked(lock), "torch"]:
            try:
                problem = licences.problem(distribution(name))
            except PackageNotFoundError:
                continue  # for another system, or in the other environment
            assert problem is None, f"{name}: {problem}; is it one that tests/licences.py should allow?"


def test_licences_of_the_harness_are_allowed():
    python = ROOT / ".venv-vqa/bin/python"
    if not python.exists():
        pytest.skip("no .venv-vqa; make vqa-venv")
    done = subprocess.run([python, ROOT / "tests/licences.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ("License-Expression: (MIT OR Apache-2.0) AND GPL-3.0-only", {"GPL-3.0-only"}),
        (
            "Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)",
            {"GNU General Public License v3 (GPLv3)"},
        ),
        ("License: AGPL", {"AGPL"}),
        ("Classifier: License :: OSI Approved", {"none told"}),
        ("License-Expression: BSD-3-Clause AND MIT", None),
    ],
)
def test_a_licence_nobody_allowed_is_named(metadata, names, tmp_path):
    folder = tmp_path / "brick-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: brick\nVersion: 1.0\n{metadata}\n")
    (package,) = licences.distributions(path=[str(tmp_path)])
    assert licences.problem(package) == (names and f"not allowed: {', '.join(names)}")


@pytest.mark.slow
def test_wheel_and_source_archive_hold_the_packages_whole(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = listed.stdout.split()
    for name in files:  # a copy, since building leaves its traces
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes((ROOT / name).read_bytes())
    build = "import sys; from setuptools.build_meta import *; out = sys.argv[1]; build_sdist(out); build_wheel(out)"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=tmp_path / "copy", check=True, capture_output=True)
    wanted = {name for name in files if name.startswith(("llava_bidir/", "probes/")) and not name.endswith(".lock")}
    (wheel,), (archive,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == wanted
    unpacked = subprocess.run(["tar", "tzf", archive], capture_output=True, text=True, check=True).stdout.split()
    inside = {name.partition("/")[2] for name in unpacked}
    assert wanted | {"pyproject.toml", "README.md", "LICENSE"} <= inside
