"""What `import probes` and loading a model import, and what the package exports."""

import ast
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("package", [probes, llava_bidir])
def test_editors_and_type_checkers_see_the_public_names_as_they_are(package):
    """`dir(probes)` had one name, so that nothing could be completed."""
    (block,) = (x for x in ast.parse(Path(package.__file__).read_text()).body if type(x) is ast.If)
    seen = {x.name: f".{line.module}" for line in block.body for x in line.names}
    assert all(x.asname == x.name for line in block.body for x in line.names), "exported"
    assert seen == package._MODULES
    assert dir(package) == sorted(package.__all__) == sorted(seen)


def test_public_names_have_docstrings():
    assert probes.__version__ == llava_bidir.__version__
    assert all(getattr(probes, name).__doc__.strip() for name in probes.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        probes.nothing  # noqa: B018
