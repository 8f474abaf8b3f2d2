"""Checksums by content, and the comparison of identities."""

import hashlib
import os
import sys
from types import SimpleNamespace

import pytest
from extensions import forgotten

from llava_bidir.common import identity, imports
from llava_bidir.common.errors import UserError


def test_checksums_are_sha256_of_what_is_in_the_files_now(tmp_path):
    files = {f"folder/{i}.bin": os.urandom(i * 1000) for i in range(5)}
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    expected = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in files.items()}
    assert identity.checksums(tmp_path, files) == expected
    stat = (tmp_path / "folder/1.bin").stat()
    (tmp_path / "folder/1.bin").write_bytes(bytes(1000))
    os.utime(tmp_path / "folder/1.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as cp -p does
    assert identity.checksums(tmp_path, files) != expected


def test_a_model_is_its_weights_config_and_processor(checkpoints):
    names = set(identity.model_identity("model", checkpoints["causal"]))
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"training.json", "README.md", "generation_config.json"}
    with pytest.raises(UserError, match="contains no weights"):
        identity.model_identity("model", checkpoints["causal"].parent)


@pytest.mark.parametrize("now", [{"a": 1.0}, {"a": True}, {}, {"a": 1, "b": [1]}])
def test_identities_are_the_same_if_their_json_is(now):
    """One batch is not the share 1.0."""
    before = {"settings": {"a": 1}}
    identity.check_same_identity(before, current=before, source="RUN", advice="stop")
    with pytest.raises(UserError, match="RUN belongs to a run with [ab]=.*; stop$"):
        identity.check_same_identity(before, current={"settings": now}, source="RUN", advice="stop")


def test_a_result_without_identity_is_not_taken_for_the_same():
    with pytest.raises(UserError, match="RUN does not record its data and model"):
        identity.check_same_identity(None, current={"data": {}}, source="RUN", advice="stop")


def test_code_that_a_user_has_registered_is_part_of_a_run(tmp_path):
    """A run whose head was edited was "finished"."""
    file = tmp_path / "own_head.py"
    settings = []
    for scale in (10, 20):
        file.write_text(f"def head():\n    return {scale}")
        with forgotten():
            imports.take_imports(["--import", str(file)])
            parts = [sys.modules["own_head"].head, identity.plain, None]
            module = SimpleNamespace(hparams={}, models=dict, registered=parts)
            data = SimpleNamespace(hparams={}, identity=dict)
            settings.append(identity.run_identity(None, module, data, ())["settings"])
    before, now = settings
    assert before.keys() == now.keys() == {"code of own_head.py"}
    assert before != now
