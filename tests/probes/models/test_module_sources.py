"""Models named by a file and a function: what they are, and when their code runs."""

from pathlib import Path

import own_modules
import pytest

import probes
from llava_bidir.common.errors import UserError
from probes.models import module_sources
from probes.models.module_sources import (
    absolute_source,
    check_trusted,
    source_identity,
)

WEIGHTS = """
def build():
    encoder = own_modules.build()
    encoder.module.blocks[1].mlp[0].bias.data += {offset}
    return encoder
"""


def write(folder: Path, offset: float = 0.0) -> str:
    file = folder / "mine.py"
    file.write_text("import own_modules\n" + WEIGHTS.format(offset=offset))
    return f"{file}:build"


def test_the_identity_is_that_of_file_and_weights(tmp_path):
    first = source_identity(write(tmp_path))
    (tmp_path / "other").mkdir()
    assert source_identity(write(tmp_path / "other")) == first
    assert source_identity(write(tmp_path, offset=1.0)) != first
    module = own_modules.build().module
    before = module_sources.weights_digest(module)
    module.norm.bias.data[0] += 1
    assert module_sources.weights_digest(module) != before
    assert source_identity("facebook/dinov2-small") == "facebook/dinov2-small"


def test_a_file_that_a_run_names_is_run_only_if_it_is_trusted(tmp_path, monkeypatch):
    """Or if this process has been asked for it by its name; tests/probes/studies/test_module_study.py has `--trust`."""
    path = write(tmp_path)
    with pytest.raises(UserError, match="a file with code. Read it, then allow it: --trust true"):
        check_trusted(path, tmp_path)
    probes.load(path, device="cpu")
    monkeypatch.chdir(tmp_path)
    assert absolute_source("mine.py:build") == path
    check_trusted("mine.py:build", tmp_path)
    write(tmp_path, offset=2.0)
    with pytest.raises(UserError, match="a file with code"):
        check_trusted(path, tmp_path)
