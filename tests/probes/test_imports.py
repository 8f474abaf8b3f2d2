"""What `import probes` and loading a model import, and what the package exports."""

import ast
import sys
from pathlib import Path

import pytest
from processes import run_command

import llava_bidir
import probes


def test_imports_wait_until_they_are_needed(tmp_path):
    """In one process, from what needs least to what needs most; a config of ours needs no classes of models."""
    llava_bidir.LlavaBidirConfig().save_pretrained(tmp_path)
    read = f"from probes.models.read_config import read_config; read_config({str(tmp_path)!r})"
    unwanted = {
        "import probes": {"torch", "transformers", "numpy"},
        "probes.solve_features": {"lightning", "transformers", "torchmetrics"},
        read: {"transformers.modeling_utils"},
        "probes.FrozenMLLM": {"lightning", "sklearn", "umap", "deepspeed", "matplotlib"},
    }
    code = "; ".join(f"{line}; print(*sys.modules)" for line in unwanted)
    loaded = run_command([sys.executable, "-c", f"import sys; {code}"]).stdout.splitlines()
    for (line, names), modules in zip(unwanted.items(), loaded, strict=True):
        assert not names & {*modules.split()}, line
    assert {"probes", "torch", "transformers"} <= {*loaded[-1].split()}


@pytest.mark.parametrize("package", [probes, llava_bidir])
def test_editors_and_type_checkers_see_the_public_names_as_they_are(package):
    """`dir(probes)` had one name, so that nothing could be completed."""
    (block,) = (x for x in ast.parse(Path(package.__file__).read_text()).body if type(x) is ast.If)
    seen = {x.name: f".{line.module}" for line in block.body for x in line.names}
    assert all(x.asname == x.name for line in block.body for x in line.names), "exported"
    assert seen == package._MODULES
    assert dir(package) == sorted(package.__all__) == sorted(seen)
    assert all(getattr(package, name).__doc__ for name in seen)
