"""A JSON list read one element after the other, so that memory does not grow with the file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from llava_bidir.common.errors import UserError

LONGEST = 1_000_000  # characters of an element: a hundred times what 2,048 tokens take
CHUNK = 1_000_000  # characters read at a time
SPACE = re.compile(r"[ \t\n\r]*")
ENDS = re.compile(r"[ \t\n\r,\]]")


def read_json_list(path: Path) -> Iterator[Any]:
    """The elements of the JSON list that a UTF-8 file holds, in order.

    Raises:
        UserError: The file cannot be read or is no such list; says behind how many elements that shows.
    """
    count = 0
    try:
        with path.open(encoding="utf-8-sig") as file:  # UTF-8, with a byte order mark or without
            for element in _elements(_Text(file)):
                yield element
                count += 1
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (after {count:,} records): {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON list of records (after {count:,} of them): {error}") from None


def _elements(text: "_Text") -> Iterator[Any]:
    if text.next() != "[":
        raise UserError(f"expected [{{...}}, ...], got {text.excerpt()}")
    text.skip()
    if text.next() == "]":
        text.skip()
    else:
        separator = ","
        while separator == ",":
            text.next()
            yield text.element()
            separator = text.next()
            if separator not in ("]", ","):
                raise UserError(f"expected ',' or ']', got {text.excerpt()}")
            text.skip()
    if text.next():
        raise UserError(f"expected the end of the file, got {text.excerpt()}")


class _Text:
    """What a file holds, of which no more than a chunk and an element are in memory."""

    def __init__(self, file: TextIO):
        self.file, self.held, self.at = file, "", 0  # held[at:] has been read and not used yet
        self.scan = json.JSONDecoder().raw_decode

    def next(self) -> str:
        """The next character that is no space, "" at the end. It stays the next."""
        self.at = SPACE.match(self.held, self.at).end()
        while self.at == len(self.held) and self._read():
            self.at = SPACE.match(self.held).end()
        return self.held[self.at : self.at + 1]

    def skip(self) -> None:
        self.at += 1

    def element(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = self.scan(self.held, self.at)
                problem = "expected ',' or ']' behind it"
            except json.JSONDecodeError as error:
                end, problem = len(self.held), f"{error.msg} at its character {error.pos - self.at:,}"
            if end - self.at <= LONGEST and ENDS.match(self.held, end):  # "6.5e" is a number and something, or half one
                self.at = end
                return value
            if len(self.held) - self.at > LONGEST:
                problem += f", or it is longer than {LONGEST:,} characters"
            elif self._read():  # what was wrong may have been that the chunk ends
                continue
            raise UserError(f"{problem}, in {self.excerpt()}")

    def excerpt(self) -> str:
        return repr(self.held[self.at : self.at + 40]) if self.next() else "the end of the file"

    def _read(self) -> bool:
        """Whether there was more."""
        chunk = self.file.read(CHUNK)
        self.held, self.at = self.held[self.at :] + chunk, 0
        return bool(chunk)
