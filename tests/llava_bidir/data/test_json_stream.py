"""JSON lists read element by element: equal to json.loads, within bounds, and what broken files answer."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llava_bidir.data import json_stream
from llava_bidir.data.json_stream import read_json_list


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("json")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)


@given(st.lists(values, max_size=6), st.integers(1, 9), st.sampled_from([None, 2]), st.booleans(), st.booleans())
@example([12345, 6.5e-7, "\U0001f600"], 1, None, False, True)
def test_any_list_is_read_as_json_reads_it_however_it_is_cut(folder, elements, chunk, indent, ascii, bom):
    text = json.dumps(elements, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    (folder / "list.json").write_bytes(b"\xef\xbb\xbf" * bom + text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        assert list(read_json_list(folder / "list.json")) == elements


@given(st.binary(max_size=60) | st.text(st.sampled_from('[]{},:"\\\\u0d8 \n1-eE.'), max_size=60).map(str.encode))
def test_any_bytes_are_what_json_makes_of_them_or_an_error_that_names_the_file(folder, content):
    file = folder / "bytes.json"
    file.write_bytes(content)
    try:
        found = list(read_json_list(file))
    except ValueError as error:
        assert str(error).startswith(str(file))
        with pytest.raises((ValueError, AssertionError)):
            assert isinstance(json.loads(content.decode("utf-8-sig")), list)
    else:
        assert repr(found) == repr(json.loads(content.decode("utf-8-sig")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected \[{...}, ...\], got the end of the file"),
        (b"   \n", "got the end of the file"),
        (b'{"id": 1}\n{"id": 2}', r"after 0 of them\): expected \[{...}, ...\], got '{\"id\": 1}"),
        (b"<html><body>404", "got '<html><body>404'"),
        (b'[{"id": 1}, {"id": 2', "after 1 of them.*Expecting ',' delimiter at its character 8, in '{\"id\": 2'"),
        (b'[{"id": 1}, ', "after 1 of them.*Expecting value"),
        (b'[{"id": 1}', "after 0 of them.*expected ',' or '\\]' behind it, in '{\"id"),
        (b'[{"id": 1},]', "after 1 of them.*Expecting value"),
        (b"[1 2]", "after 1 of them.*expected ',' or '\\]', got '2\\]'"),
        (b"[1] [2]", "expected the end of the file, got '\\[2\\]'"),
        (b"[12", "after 0 of them.*expected ',' or '\\]' behind it, in '12'"),
        (b'["a"' + b"b" * 3_000_000, "expected ',' or '\\]' behind it"),
        (b"[" + b"9" * 5000 + b"]", "limit .4300 digits"),
        (b"[{}, " + b"[" * 100_000, "after 1 of them.*recursion"),
        (b"[" + b'{"a":' * 100_000, "after 0 of them.*recursion"),
        ('[{"id": "é"}]'.encode("latin-1"), "is not UTF-8 .after 0 records"),
        ('[{"id": 1}]'.encode("utf-16"), "is not UTF-8"),
        ('[{"id": 1}]'.encode("utf-16-le"), "is no JSON list of records"),
        ('[{"id": 1}]'.encode("utf-32"), "is not UTF-8"),
        (b"\x1f\x8b\x08\x00compressed", "is not UTF-8"),
        (b"[" + b" " * 3_000_000, "Expecting value"),
        (b'["' + b"a" * 1_000_000 + b'"]', "or it is longer than 1,000,000 characters"),
        (b'["' + b"a" * 3_000_000, "Unterminated string"),
    ],
)
def test_broken_files_say_after_which_record_and_what(content, message, tmp_path):
    (tmp_path / "list.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_json_list(tmp_path / "list.json"))
    assert str(error.value).startswith(str(tmp_path / "list.json")) and len(str(error.value)) < 400


def test_file_that_may_not_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.json cannot be read"):
        list(read_json_list(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read"):
        list(read_json_list(tmp_path))
