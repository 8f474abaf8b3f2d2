"""Structure of the repository: its size, what checkpoints may import, density of the code, names of classes.

`make lint` checks who may import whom (import-linter). `python tests/test_structure.py` prints the sizes.
"""

import ast
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports(path: Path) -> set[str]:
    """Absolute names of the packages' modules that a file imports."""
    package = path.relative_to(ROOT).with_suffix("").parts
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) + "." if node.level else ""
            modules.add(base + (node.module or ""))
    return modules


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_modeling_code_in_checkpoints_imports_nothing_else_of_ours():
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    files = ("modeling_llava_bidir.py", "configuration_llava_bidir.py", "attention.py")
    ours = {f"llava_bidir.model.{name.removesuffix('.py')}" for name in files}
    for name in files:
        modules = imports(ROOT / "llava_bidir/model" / name) - ours
        assert {module.split(".")[0] for module in modules} <= allowed


DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
COUNTED = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
VAGUE = ("own", "found", "known")  # names of variables that do not say what they hold
LONG_CALL = 4  # arguments, of which a reader wants to see the names


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
def measure(path: Path) -> Counter:
    """Count what makes a file long or hard to read, without comments, docstrings and blank lines.

    `make lint` holds the layout, in which commas force no line breaks. Names of keyword arguments are no tokens.
    """
    sizes: Counter = Counter()
    docstrings = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False):
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        elif isinstance(node, ast.Call):
            names = sum(keyword.arg is not None for keyword in node.keywords)
            sizes["tokens"] -= 2 * names
            if len(node.args) + len(node.keywords) >= LONG_CALL:
                sizes["long calls"] += 1
                sizes["unnamed calls"] += names == 0
        elif isinstance(node, ast.IfExp):
            sizes["conditional expressions"] += 1
        elif isinstance(node, ast.Name) and node.id in VAGUE:
            sizes["vague names"] += 1
    code = set()
    for token in read_tokens(path):
        if token.type in COUNTED and token.start[0] not in docstrings:
            sizes["tokens"] += 1
            code.update(range(token.start[0], token.end[0] + 1))
    sizes["lines"] = len(code)
    return sizes


# The ratchet (CONTRIBUTING.md): most tokens and Python files of each part; commits only lower them.
MOST = {
    "llava_bidir": (49_419, 66),
    "probes/models": (31_200, 36),
    "probes/analyses": (27_843, 29),
    "probes/report": (33_472, 20),
    "probes/lab": (7_186, 8),
    "probes/worlds": (15_088, 12),
    "probes": (88_735, 101),  # the rest of it
    "experiments": (40_392, 39),
    "tests": (286_629, 312),
}
MOST_WORDS = 34_186  # of all Markdown
# Tokens a line, per cent of calls with four arguments or more that name none, conditional expressions in 1,000 lines,
# variables called own, found or known: at most.
READING = {
    "llava_bidir": (7.9, 10, 5, 0),
    "probes": (8.8, 13, 6, 33),
    "probes/report": (9.0, 3, 1, 3),
    "tests": (9.9, 23, 9, 121),
}
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
            parts[part_of(path)].append(measure(path)["tokens"])
    return {part: (sum(tokens), len(tokens)) for part, tokens in parts.items()}


def words() -> int:
    """Return the words of all Markdown."""
    pages = [*ROOT.glob("*.md"), *(x for name in FOLDERS for x in (ROOT / name).rglob("*.md"))]
    return sum(len(page.read_text(encoding="utf8").split()) for page in pages)


def test_nothing_grows():
    larger = {part: now for part, now in sizes().items() if any(map(int.__gt__, now, MOST[part]))}
    assert larger == {}, "the ratchet only goes down: find the tokens or files elsewhere"
    assert words() <= MOST_WORDS


def reading(folder: str) -> tuple[float, ...]:
    """Return how densely the code of a folder is written, by the columns of `READING`."""
    total = sum(map(measure, sources(folder)), Counter())
    return (
        total["tokens"] / total["lines"],
        100 * total["unnamed calls"] / total["long calls"],
        1000 * total["conditional expressions"] / total["lines"],
        total["vague names"],
    )


@pytest.mark.parametrize("folder", READING)
def test_code_is_not_dense(folder):
    """litgpt and DINOv2 have 6.7 tokens a line; 28% of DINOv2's long calls name no argument."""
    assert not [
        (now, most)
        for now, most in zip(reading(folder), READING[folder], strict=True)
        if now > most
    ]


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
    for folder in READING:
        print(f'    "{folder}": ({", ".join(f"{number:.2f}" for number in reading(folder))}),')
