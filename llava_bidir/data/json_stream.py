"""Read records one at a time, so that memory does not grow with the file: a JSON list, or JSON Lines."""

import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from llava_bidir.common.errors import UserError

LONGEST_LINE = 64 * 2**20  # bytes of a record of JSON Lines
# An escape of JSON: a pair of surrogates, half of one, or any other
ESCAPE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(?P<half>\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\."
)
LONGEST_ESCAPE = 12  # bytes of a pair of surrogates


def read_records(path: Path) -> Iterator[Any]:
    r"""Yield the records of a UTF-8 file, in order: the elements of a JSON list, or of JSON Lines a record per line.

    Half of a surrogate pair, such as \ud83d alone, is read as U+FFFD, the character that stands for a lost one.
    Integers must fit into 64 bits.

    Raises:
        UserError: The file cannot be read or is neither of the two; names the number of records before the error.
    """
    count = 0
    kind = "a JSON list of records"
    try:
        with path.open("rb") as file:
            begin = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
            file.seek(begin)
            is_lines = _first_character(file) == b"{"  # a JSON list begins with "["
            file.seek(begin)
            if is_lines:
                kind = "a JSON list of records, nor JSON Lines with one record per line"
            for record in (
                _read_lines(file)
                if is_lines
                else ijson.items(_MendedReader(file), "item", use_float=True)
            ):
                yield record
                count += 1
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not {kind} (error after {count:,} records): {_reason(error)}"
        ) from None
    if count == 0:
        raise UserError(f"{path} contains no records; expected a JSON list [{{...}}, ...]")


def _first_character(file: BinaryIO) -> bytes:
    """Return the first byte that is no white space; b"" if there is none."""
    while (character := file.read(1)).isspace():
        pass
    return character


def _read_lines(file: BinaryIO) -> Iterator[Any]:
    """Yield the records of JSON Lines; empty lines are skipped."""
    while line := file.readline(LONGEST_LINE):
        if not line.endswith(b"\n") and len(line) == LONGEST_LINE:
            raise ijson.JSONError(f"a line is longer than {LONGEST_LINE:,} bytes")
        if line.isspace():
            continue
        # as a list, since the parser does not notice what follows a complete value
        line = BytesIO(b"[" + replace_halves(line) + b"]")
        records = list(ijson.items(line, "item", use_float=True))
        if len(records) != 1:
            raise ijson.JSONError(f"{len(records)} records on a line")
        yield records[0]


def replace_halves(text: bytes) -> bytes:
    r"""Return JSON with U+FFFD for each half of a surrogate pair, which the parser would read as "?"."""
    if b"\\u" not in text:
        return text
    return ESCAPE.sub(lambda found: b"\\ufffd" if found["half"] else found[0], text)


class _MendedReader:
    """A file of JSON whose halves of surrogate pairs are replaced.

    Args:
        file: Opened in binary mode.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.rest = b""  # that may begin an escape

    def read(self, size: int) -> bytes:
        """Return some more bytes, b"" at the end."""
        part = self.file.read(size)
        text = self.rest + part
        end = _end_of_escapes(text) if part else len(text)
        self.rest = text[end:]
        # nothing would be the end of the file
        return replace_halves(text[:end]) or (self.read(size) if part else b"")


def _end_of_escapes(text: bytes) -> int:
    """Return where a part of JSON ends, without an escape that it may cut off."""
    complete = 0
    for escape in ESCAPE.finditer(text):
        if len(text) - escape.start() < LONGEST_ESCAPE:
            return escape.start()
        complete = escape.end()
    begun = text.find(b"\\", complete)
    return begun if begun >= 0 else len(text)


def _reason(error: Exception) -> str:
    """Return the message of a parser on one line; ijson's has bytes."""
    text = error.args[0] if len(error.args) == 1 else str(error)
    text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return " ".join(text.split())[:200]
