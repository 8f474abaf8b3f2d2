"""JSON lists read element by element: equal to json.loads, and the errors of broken files."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from json_values import json_values

from llava_bidir.data.json_stream import read_json_list


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("json")


values = json_values(text=st.text(st.characters(exclude_categories=("Cs",))), most=4, leaves=12)


@given(
    st.lists(values, min_size=1, max_size=6),
    st.sampled_from([None, 2]),
    st.booleans(),
    st.booleans(),
)
@example([12345, 6.5e-7, -0.0, "\U0001f600\0"], None, False, True)
def test_any_list_equals_json_loads(folder, elements, indent, ascii, bom):
    content = json.dumps(elements, indent=indent, ensure_ascii=ascii).encode()
    (folder / "list.json").write_bytes(b"\xef\xbb\xbf" * bom + content)
    assert repr(list(read_json_list(folder / "list.json"))) == repr(elements)


@given(
    st.binary(max_size=60)
    | st.text(st.sampled_from('[]{},:"\\\\u0d8 \n1-eE.'), max_size=60).map(str.encode)
)
def test_any_bytes_equal_json_loads_or_raise_an_error_that_names_the_file(folder, content):
    file = folder / "bytes.json"
    file.write_bytes(content)
    try:
        elements = list(read_json_list(file))
    except ValueError as error:
        assert str(error).startswith(str(file))
    else:
        expected = json.loads(content.decode("utf-8-sig"))
        surrogates = any("\ud800" <= character <= "\udfff" for character in str(expected))
        assert surrogates or repr(elements) == repr(expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"error after 0 records\): parse error: premature EOF"),
        (b'{"id": 1}', r"contains no records; expected a JSON list \[{...}, ...\]"),
        (b"<html><body>404", "error after 0 records.*invalid char in json text"),
        (b'[{"id": 1}, {"id": 2', "error after 1 records"),
        (b"[" + b"9" * 5000 + b"]", "integer overflow"),
        ('[{"id": "é"}]'.encode("latin-1"), "error after 0 records.*invalid bytes in UTF8 string"),
        (b'[{"id": 1}, "\\udc00"]', "error after 1 records.*can't decode byte"),
    ],
)
def test_broken_file_is_an_error_with_the_number_of_records(content, message, tmp_path):
    (tmp_path / "list.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_json_list(tmp_path / "list.json"))
    assert str(error.value).startswith(str(tmp_path / "list.json")) and len(str(error.value)) < 400
