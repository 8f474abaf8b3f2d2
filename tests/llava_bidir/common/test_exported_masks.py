"""Masks of exports: their code is run if it is trusted, and stands for no other function of its name.

tests/test_own_files.py has the commands that take `--trust`.
"""

import json
import shutil
from pathlib import Path

import pytest

from llava_bidir import IMAGE_ATTENTION, register_image_attention
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import read_model_config
from llava_bidir.common.identity import model_identity
from llava_bidir.common.imports import code_of

MINE = """

def mine(is_image):
    return torch.where(is_image, {id}, -1)


register_image_attention("mine", mine)
"""


def mine(is_image):
    """Return no block."""
    return is_image.long() - is_image.long() - 1


@pytest.fixture
def export(checkpoints, tmp_path):
    """Return a function that writes config.json and attention.py of an export with a mask of its own."""

    def write(name: str, code: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((checkpoints["causal"] / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"image_attention": "mine"}))
        file = shutil.copy(checkpoints["causal"] / "attention.py", folder)
        with Path(file).open("a") as copy:
            copy.write(code)
        return str(folder)

    yield write
    IMAGE_ATTENTION.pop("mine", None)


def test_code_of_an_export_is_run_only_if_it_is_trusted(export, tmp_path):
    ran = tmp_path / "ran"
    folder = export("a", MINE.format(id=0) + f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(UserError, match=r"'mine' is a function in .*a/attention.py. .* --trust"):
        read_model_config("MODEL", folder)
    assert not ran.exists() and "mine" not in IMAGE_ATTENTION
    assert read_model_config("MODEL", folder, trust=True).image_attention == "mine"
    assert ran.exists()
    assert read_model_config("MODEL", folder).image_attention == "mine", "it is registered now"


def test_two_functions_of_one_name_are_not_taken_for_each_other(export):
    """The second model would silently run under the mask of the first."""
    folders = [export("a", MINE.format(id=0)), export("b", MINE.format(id=7))]
    same = export("c", MINE.format(id=0))
    read_model_config("MODEL", folders[0], trust=True)
    with pytest.raises(UserError, match="b/attention.py has another function for .*'mine'"):
        read_model_config("MODEL", folders[1], trust=True)
    read_model_config("MODEL", same, trust=True)


def test_a_file_that_registers_another_function_is_not_taken_for_that_of_the_export(export):
    folder = export("a", MINE.format(id=0))
    register_image_attention("mine", mine)
    with pytest.raises(UserError, match="a/attention.py has another function for .*'mine'"):
        read_model_config("MODEL", folder)


def test_the_code_of_an_own_mask_is_part_of_the_models_identity(export, checkpoints):
    """Else a run is resumed after its mask was edited; that of a package's mask is never run."""
    folders = [export("a", MINE.format(id=0)), export("b", MINE.format(id=7))]
    for folder in folders:
        shutil.copy(checkpoints["causal"] / "model.safetensors", folder)
    first, second = (model_identity("model.mllm", folder) for folder in folders)
    assert {file for file in first if first[file] != second[file]} == {"attention.py"}
    assert "attention.py" not in model_identity("model.mllm", checkpoints["bidirectional"])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('no')", r"attention.py: RuntimeError: no"),
        ("def mine(", r"attention.py: .*was never closed"),
        ("", r"attention.py: KeyError: 'mine'"),
    ],
)
def test_an_export_whose_code_does_not_define_its_mask_is_one_line(export, code, message):
    with pytest.raises(UserError, match=message):
        read_model_config("MODEL", export("a", code), trust=True)


def test_a_taken_name_is_one_line_and_an_error_of_the_users_own_has_its_traceback():
    with pytest.raises(UserError, match="mine.py: image_attention 'causal' is already registered"):
        with code_of("mine.py"):
            register_image_attention("causal", None)
    with pytest.raises(ValueError, match="invalid literal") as error, code_of("mine.py"):
        int("x")
    assert not isinstance(error.value, UserError)
