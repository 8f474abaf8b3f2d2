"""Errors of `llava-bidir fit` that need no training: the name of the mask, and values of several types."""

import sys

import pytest
from processes import run_command

from llava_bidir.cli import main

REFUSE = """
import sys
from llava_bidir.cli import main
try:
    main(sys.argv[1:])
except SystemExit as error:
    print(error)
print([name for name in ("lightning", "transformers", "deepspeed") if name in sys.modules])
"""


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("--model.image-attention=rowz", marks=pytest.mark.nightly),
        pytest.param("--image_attention causal --image_attention rowz", marks=pytest.mark.nightly),
        "-c {config}",
    ],
)
def test_a_mask_that_is_unknown_is_refused_before_lightning_is_imported(words, tmp_path):
    """All that was read before took seven seconds, and missing data were named first."""
    (tmp_path / "mask.yaml").write_text("model:\n  image_attention: rowz\n")
    given = words.format(config=tmp_path / "mask.yaml").split()
    command = [sys.executable, "-c", REFUSE, "fit", "-c", "demo/stage1", *given]
    said, imported = run_command(command).stdout.splitlines()
    assert "model.image_attention: unknown image_attention 'rowz'; registered: " in said
    assert imported == "[]"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("trainer.precision", "bf17", "int, 'transformer-engine'"),
        ("trainer.logger", "CSVLoggerr", "path, dot import path"),
    ],
)
def test_a_value_of_several_types_is_refused_without_types_of_python(
    option, value, expected, capsys
):
    with pytest.raises(SystemExit):
        main(["fit", "-c", "demo/stage1", f"--{option}", value])
    said = capsys.readouterr().err
    assert f'Parser key "{option}": expected one of {expected}' in said and value in said
    assert "typing." not in said and "<class" not in said and len(said) < 400
