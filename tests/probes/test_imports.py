"""What `import probes` and loading a model import, and what the package exports."""

import subprocess
import sys

import pytest

import llava_bidir
import probes


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import probes", {"torch", "transformers", "numpy"}),
        (
            "import probes; probes.FrozenMLLM",
            {"lightning", "sklearn", "umap", "deepspeed", "matplotlib"},
        ),
        (
            "import probes; probes.solve_features",
            {"lightning", "transformers", "torchmetrics"},
        ),
    ],
)
def test_imports_wait_until_they_are_needed(code, unwanted):
    loaded = modules_after(code)
    assert "probes" in loaded
    assert not unwanted & loaded


def test_a_config_of_ours_is_read_without_the_classes_of_models(tmp_path):
    llava_bidir.LlavaBidirConfig().save_pretrained(tmp_path)
    code = f"from probes.models.read_config import read_config; read_config({str(tmp_path)!r})"
    loaded = modules_after(code)
    assert "llava_bidir.model.configuration_llava_bidir" in loaded
    assert "transformers.modeling_utils" not in loaded


def modules_after(code: str) -> set[str]:
    """Return the modules that a process has loaded after running `code`."""
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    ran = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
    )
    return {*ran.stdout.split()}


def test_public_names_have_docstrings():
    assert probes.__version__ == llava_bidir.__version__
    assert all(getattr(probes, name).__doc__.strip() for name in probes.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        probes.nothing  # noqa: B018
