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
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    loaded = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "probes" in loaded
    assert not unwanted & set(loaded)


def test_public_names_have_docstrings():
    assert probes.__version__ == llava_bidir.__version__
    assert all(getattr(probes, name).__doc__.strip() for name in probes.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        probes.nothing  # noqa: B018
