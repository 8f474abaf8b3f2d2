"""Structure of the repository: what checkpoints may import, and which files are at the top.

`make lint` checks who may import whom (import-linter).
"""

import ast
import subprocess
import sys
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


def test_modeling_code_in_checkpoints_imports_nothing_else_of_ours():
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    for name in ("modeling_llava_bidir.py", "attention.py"):
        found = imports(ROOT / "llava_bidir/model" / name) - {"llava_bidir.model.attention"}
        assert {module.split(".")[0] for module in found} <= allowed


def test_top_level_files_are_listed():
    listed = subprocess.run(
        ["git", "ls-files"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    files = {
        "Makefile",
        ".ci",
        ".github",
        ".gitignore",
        ".pre-commit-config.yaml",
        "requirements.lock",
        "LICENSE",
    }
    files |= {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"}
    assert top - files <= {
        *("pyproject.toml", "README.md", "llava_bidir", "probes", "configs", "tests", "slurm")
    }


def test_no_two_classes_have_one_name():
    names: dict[str, list[str]] = {}
    for path in sources("llava_bidir") + sources("probes"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in names.items() if len(paths) > 1} == {}
