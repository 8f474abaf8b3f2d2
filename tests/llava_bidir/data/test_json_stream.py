"""JSON lists read element by element: equal to json.loads, and the errors of broken files."""

import io
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from json_values import json_values

from llava_bidir.data.json_stream import _MendedReader, read_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("json")


values = json_values(
    text=st.text(st.characters(exclude_categories=("Cs",))),
    most=4,
    leaves=12,
)


@given(
    st.lists(values, min_size=1, max_size=6),
    st.sampled_from([None, 2]),
    st.booleans(),
    st.booleans(),
)
@example([12345, 6.5e-7, -0.0, "\U0001f600\0"], None, False, True)
def test_any_list_equals_json_loads(
    folder,
    elements,
    indent,
    ascii,
    bom,
):
    content = json.dumps(elements, indent=indent, ensure_ascii=ascii).encode()
    (folder / "list.json").write_bytes(b"\xef\xbb\xbf" * bom + content)
    assert repr(list(read_records(folder / "list.json"))) == repr(elements)


@given(
    st.binary(max_size=60)
    | st.text(st.sampled_from('[]{},:"\\\\u0d8 \n1-eE.'), max_size=60).map(str.encode)
)
def test_any_bytes_equal_json_loads_or_raise_an_error_that_names_the_file(folder, content):
    file = folder / "bytes.json"
    file.write_bytes(content)
    try:
        elements = list(read_records(file))
    except ValueError as error:
        assert str(error).startswith(str(file))
    else:
        text = content.decode("utf-8-sig")
        if text.lstrip().startswith("{"):
            expected = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            expected = json.loads(text)
        surrogates = any("\ud800" <= character <= "\udfff" for character in str(expected))
        assert surrogates or repr(elements) == repr(expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"error after 0 records\): parse error: premature EOF"),
        (b"[]", r"contains no records; expected a JSON list \[{...}, ...\]"),
        (
            b'{\n"data": []}',
            "nor JSON Lines with one record per line .error after 0 records",
        ),
        (b'{"id": 1}, {"id": 2}\n', "error after 0 records.*2 records on a line"),
        (b'{"id": 1}\n{"id": 2', "nor JSON Lines.*error after 1 records"),
        (b'{"id": 1} {"id": 2}\n', "nor JSON Lines.*error after 0 records"),
        (b"<html><body>404", "error after 0 records.*invalid char in json text"),
        (b'[{"id": 1}, {"id": 2', "error after 1 records"),
        (b"[" + b"9" * 5000 + b"]", "integer overflow"),
        ('[{"id": "é"}]'.encode("latin-1"), "error after 0 records.*invalid bytes in UTF8 string"),
    ],
)
def test_broken_file_is_an_error_with_the_number_of_records(content, message, tmp_path):
    (tmp_path / "list.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_records(tmp_path / "list.json"))
    assert str(error.value).startswith(str(tmp_path / "list.json"))
    assert len(str(error.value)) < 400


@given(
    st.lists(st.dictionaries(st.text("ab é", max_size=2), values, max_size=3), min_size=1),
    st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    st.booleans(),
)
def test_json_lines_equal_json_loads_of_each_line(
    folder,
    records,
    newline,
    bom,
):
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in records]
    content = newline.join(lines)
    (folder / "list.jsonl").write_bytes(b"\xef\xbb\xbf" * bom + content)
    assert repr(list(read_records(folder / "list.jsonl"))) == repr(records)


def test_a_line_of_any_length_is_not_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_bidir.data.json_stream.LONGEST_LINE", 64)
    file = tmp_path / "x.json"
    file.write_text('{"data": [' + '{"id": 1}, ' * 9)
    with pytest.raises(ValueError, match="error after 0 records.*a line is longer than 64 bytes"):
        list(read_records(file))


ESCAPES = [r"\ud83d", r"\ude00", r"\ud83d\ude00", r"\\ud83d", r"\\", r"\"", r"\n", r"\u00e9", "a"]


@given(st.lists(st.sampled_from(ESCAPES), max_size=12), st.integers(1, 20), st.booleans())
def test_half_of_a_surrogate_pair_is_read_as_a_lost_character(parts, size, is_lines):
    """Wherever the parser's buffer ends; Python's own parser keeps halves."""
    text = '{"value": "' + "".join(parts) + '"}'
    expected = re.sub("[\ud800-\udfff]", "\ufffd", json.loads(text)["value"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records.json"
        file.write_text(text if is_lines else f"[{text}]")
        (record,) = read_records(file)
    assert record["value"] == expected
    reader = _MendedReader(io.BytesIO(text.encode()))
    mended = b"".join(iter(lambda: reader.read(size), b""))
    assert json.loads(mended)["value"] == expected
