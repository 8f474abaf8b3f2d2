"""Rules of the house: who may import whom, and what must not be in the tree."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports(path: Path) -> set[str]:
    """Absolute names of the packages' modules that a file imports."""
    package = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) + "." if node.level else ""
            found.add(base + (node.module or ""))
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", sources("llava_bidir"), ids=lambda p: str(p.relative_to(ROOT)))
def test_llava_bidir_never_imports_probes(path):
    assert not any(name.split(".")[0] == "probes" for name in imports(path))


@pytest.mark.parametrize("path", sources("probes"), ids=lambda p: str(p.relative_to(ROOT)))
def test_probes_knows_of_llava_bidir_the_models_code_and_what_they_share(path):
    found = {name for name in imports(path) if name.split(".")[0] == "llava_bidir"}
    found = {name for name in found if not name.startswith("llava_bidir.common.")}
    assert found == (
        {"llava_bidir.model.modeling_llava_bidir"} if path.match("probes/models/families/llava.py") else set()
    )


@pytest.mark.parametrize("path", sources("llava_bidir/common"), ids=lambda p: p.name)
def test_what_they_share_knows_neither(path):
    ours = {name for name in imports(path) if name.split(".")[0] in ("llava_bidir", "probes")}
    assert all(name.startswith("llava_bidir.common.") for name in ours)


def test_modelling_code_that_ships_in_checkpoints_needs_nothing_else():
    allowed = {"torch", "transformers", "huggingface_hub", "collections"}
    for name in ("modeling_llava_bidir.py", "attention.py"):
        found = imports(ROOT / "llava_bidir/model" / name) - {"llava_bidir.model.attention"}
        assert {module.split(".")[0] for module in found} <= allowed


def test_top_level_is_what_the_customer_fixed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    files = {"Makefile", ".ci", ".gitignore", "constraints.txt", "requirements.lock", "LICENSE", "CONTRIBUTING.md"}
    assert top - files <= {*("pyproject.toml", "README.md", "llava_bidir", "probes", "configs", "tests", "slurm")}


def pins(path: str) -> dict[str, str]:
    lines = [line for line in (ROOT / path).read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) > 50 and all(line.count("==") == 1 and "+" not in line for line in lines)
    return dict(line.split("==") for line in lines)


def test_every_dependency_is_pinned():
    pins("constraints.txt")


def test_the_harness_runs_with_the_same_versions_as_training():
    ours, harness = pins("constraints.txt"), pins("llava_bidir/vqa/requirements.txt")
    common = ours.keys() & harness.keys()
    assert {"torch", "transformers", "tokenizers", "pillow", "datasets"} <= common
    assert {name: harness[name] for name in common} == {name: ours[name] for name in common}
    assert not harness.keys() & {"torchvision", "timm"}, "beside a CPU build of torch they break transformers"
