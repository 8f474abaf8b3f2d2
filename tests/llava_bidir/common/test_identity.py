"""Checksums by content, their cache, and the comparison of identities."""

import hashlib
import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_bidir.common import identity
from llava_bidir.common.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are read."""
    names = []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: names.append(file.name) or digest(file, kind)
    )
    return names


@pytest.fixture
def settled(monkeypatch):
    """Treat new files as old ones; else they are not cached, because they can change within a tick of the clock."""
    monkeypatch.setattr(identity, "RACY_NS", -(10**12))


def test_checksums_are_sha256_and_files_are_read_once(
    cache,
    hashed,
    settled,
    tmp_path,
):
    files = {f"folder/{i}.bin": os.urandom(i * 1000) for i in range(5)}
    for name, content in files.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    expected = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in files.items()}
    assert identity.checksums(tmp_path / "data", files) == expected
    assert len(hashed) == 5
    assert identity.checksums(tmp_path / "data", list(files)[:3]) == dict(
        list(expected.items())[:3]
    )
    assert identity.checksums(tmp_path / "data/../data", files) == expected
    assert len(hashed) == 5


def test_a_changed_file_is_read_again_whatever_its_time_and_size(
    cache,
    hashed,
    settled,
    tmp_path,
):
    file = tmp_path / "weights"
    file.write_bytes(b"old")
    before = identity.checksums(tmp_path, ["weights"])
    stat = file.stat()
    time.sleep(0.01)
    file.write_bytes(b"new")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync and cp -p do
    assert identity.checksums(tmp_path, ["weights"]) != before
    assert len(hashed) == 2


def test_a_file_that_was_just_written_is_not_cached(cache, hashed, tmp_path):
    (tmp_path / "weights").write_bytes(b"1")
    for _ in range(2):
        identity.checksums(tmp_path, ["weights"])
    assert len(hashed) == 2
    assert not cache.exists()


def test_missing_files_have_no_checksum_and_no_size(cache, tmp_path):
    (tmp_path / "empty").touch()
    assert identity.checksums(tmp_path, ["nowhere"]) == {"nowhere": ""}
    assert identity.file_sizes(tmp_path, ["nowhere", "empty"]) == [-1, 0]


def test_a_model_is_its_weights_config_and_processor(cache, checkpoints):
    names = set(identity.model_identity("model", checkpoints["causal"]))
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"training.json", "README.md", "generation_config.json"}
    with pytest.raises(UserError, match="contains no weights"):
        identity.model_identity("model", checkpoints["causal"].parent)


VALUES = st.sampled_from([None, False, True, 0, 1, 2, 0.0, 1.0, "1", "a"]) | st.lists(st.booleans())


@given(
    st.dictionaries(st.sampled_from("abc"), VALUES), st.dictionaries(st.sampled_from("abc"), VALUES)
)
def test_identities_are_the_same_if_their_json_is(before, now):
    same = all(json.dumps(before.get(key)) == json.dumps(now.get(key)) for key in "abc")
    try:
        identity.check_same_identity({"settings": before}, {"settings": now}, "RUN", "stop")
        assert same
    except UserError as error:
        key = str(error).split("=")[0][-1]
        assert not same
        assert before.get(key) is not now.get(key)
        assert str(error).endswith("; stop")


def test_a_result_without_identity_is_not_taken_for_the_same():
    with pytest.raises(UserError, match="RUN does not record its data and model"):
        identity.check_same_identity(None, {"data": {}}, "RUN", "stop")
