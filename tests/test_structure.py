"""Structure of the repository: its size, what checkpoints may import, density of the code, names of classes.

`make lint` checks who may import whom (import-linter). `python tests/test_structure.py` prints the sizes.
"""

import ast
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
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
    files = ("modeling_llava_bidir.py", "configuration_llava_bidir.py", "attention.py")
    ours = {f"llava_bidir.model.{name.removesuffix('.py')}" for name in files}
    for name in files:
        found = imports(ROOT / "llava_bidir/model" / name) - ours
        assert {module.split(".")[0] for module in found} <= allowed


DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
COUNTED = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)


def read_tokens(path: Path) -> Iterator[tokenize.TokenInfo]:
    """Yield the tokens of a file, an f-string as one, as Python 3.11 has it; later versions take it apart."""
    depth = 0
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            kind = tokenize.tok_name[token.type]
            if kind in ("FSTRING_START", "TSTRING_START"):
                if depth == 0:
                    yield token._replace(type=tokenize.STRING)
                depth += 1
            elif kind in ("FSTRING_END", "TSTRING_END"):
                depth -= 1
            elif depth == 0:
                yield token


@cache
def count(path: Path) -> tuple[int, int]:
    """Return the tokens and lines of code of a file, without comments, docstrings and blank lines."""
    docstrings = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False):
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = 0
    code = set()
    for token in read_tokens(path):
        if token.type in COUNTED and token.start[0] not in docstrings:
            tokens += 1
            code.update(range(token.start[0], token.end[0] + 1))
    return tokens, len(code)


# The ratchet (CONTRIBUTING.md): most tokens and Python files of each part; commits only lower them.
MOST = {
    "llava_bidir": (33_972, 53),
    "probes/models": (30_022, 32),
    "probes/analyses": (22_807, 24),
    "probes/report": (23_562, 16),
    "probes/lab": (6_767, 8),
    "probes/worlds": (14_994, 12),
    "probes": (63_613, 82),  # the rest of it
    "experiments": (34_219, 34),
    "tests": (219_993, 244),
}
MOST_WORDS = 23_765  # of all Markdown
FOLDERS = ("llava_bidir", "probes", "configs", "slurm", "experiments", "tests")


def part_of(path: Path) -> str:
    """Return the part that a file belongs to."""
    folder = "/".join(path.relative_to(ROOT).parts[:2])
    return folder if folder in MOST else path.relative_to(ROOT).parts[0]


def sizes() -> dict[str, tuple[int, int]]:
    """Return the tokens and Python files of each part."""
    parts: dict[str, list[int]] = {part: [] for part in MOST}
    for package in ("llava_bidir", "probes", "experiments", "tests"):
        for path in sources(package):
            parts[part_of(path)].append(count(path)[0])
    return {part: (sum(tokens), len(tokens)) for part, tokens in parts.items()}


def words() -> int:
    """Return the words of all Markdown."""
    pages = [
        *ROOT.glob("*.md"),
        *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md")),
    ]
    return sum(len(page.read_text(encoding="utf8").split()) for page in pages)


def test_nothing_grows():
    larger = {
        part: found for part, found in sizes().items() if any(map(int.__gt__, found, MOST[part]))
    }
    assert larger == {}, "the ratchet only goes down: find the tokens or files elsewhere"
    assert words() <= MOST_WORDS


@pytest.mark.parametrize(
    ("folder", "most"), [("llava_bidir", 8.0), ("probes", 8.5), ("tests", 9.0)]
)
def test_code_is_not_dense(folder, most):
    """litgpt has 6.7 tokens a line, DINOv2 7.5. A dense line is one that a reader has to take apart."""
    tokens, lines = map(sum, zip(*map(count, sources(folder)), strict=True))
    assert tokens / lines <= most


def test_no_two_classes_have_one_name():
    names: dict[str, list[str]] = {}
    for path in sources("llava_bidir") + sources("probes"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in names.items() if len(paths) > 1} == {}


if __name__ == "__main__":
    for part, (tokens, files) in sizes().items():
        print(f'    "{part}": ({tokens:_}, {files}),')
    print(f"MOST_WORDS = {words():_}")
