"""Read a JSON list one element at a time, so that memory does not grow with the file."""

from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson

from llava_bidir.common.errors import UserError


def read_json_list(path: Path) -> Iterator[Any]:
    r"""Yield the elements of the JSON list in a UTF-8 file, in order.

    Half of a surrogate pair, such as \ud83d alone, is read as "?". Integers must fit into 64 bits.

    Raises:
        UserError: The file cannot be read or is not such a list; names the number of records before the error.
    """
    count = 0
    try:
        with path.open("rb") as file:
            if file.read(len(BOM_UTF8)) != BOM_UTF8:
                file.seek(0)
            for element in ijson.items(file, "item", use_float=True):
                yield element
                count += 1
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a JSON list of records (error after {count:,} records): {reason}") from None
    if count == 0:
        raise UserError(f"{path} contains no records; expected a JSON list [{{...}}, ...]")
