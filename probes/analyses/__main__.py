"""`python -m probes.analyses` writes the table of all analyses into README.md."""

from pathlib import Path

from llava_bidir.common.atomic_io import write_files

from . import ANALYSES

README = Path(__file__).with_name("README.md")
START = "<!-- analyses -->\n"
END = "<!-- end -->\n"


def table() -> str:
    """Return the table in Markdown."""
    rows = ["| analysis | question | paper |\n|---|---|---|\n"]
    rows += [
        f"| [`{name}`]({name}/README.md) | {x.question} | {x.paper or '–'} |\n"
        for name, x in ANALYSES.items()
    ]
    return "".join(rows)


def updated(text: str) -> str:
    """Return the text of README.md with the table of now."""
    before, _, rest = text.partition(START)
    return before + START + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    write_files({README: updated(README.read_text(encoding="utf-8"))})
