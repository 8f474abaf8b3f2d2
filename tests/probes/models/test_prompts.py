"""The text before the image: which chat template, which date, and whether it begins with bos."""

import shutil
from pathlib import Path

import probe_runs
import pytest
import tiny_families

from probes.models.families import FAMILIES
from probes.models.prompts import read_prefix_ids

TEMPLATE = "{{ bos_token }}hello{% for part in messages[0].content %}<image>{% endfor %}"
HELLO = tiny_families.tokenizer().get_vocab()["hello"]


@pytest.fixture
def llava(tmp_path) -> Path:
    return Path(tiny_families.write("llava", tmp_path / "llava"))


def prefix_ids(folder: Path, template: str) -> list[int]:
    (folder / "chat_template.jinja").write_text(template)
    return read_prefix_ids(str(folder), FAMILIES["llava"])


def test_the_named_template_default_is_used(llava):
    folder = llava / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text(TEMPLATE.replace("hello", "hello\n\n"))
    assert prefix_ids(llava, TEMPLATE) == [1, HELLO]


def test_a_prefix_is_part_of_the_run_and_used_by_analyses(checkpoints, segmentation, tmp_path):
    """A checkpoint without a chat template is probed with the text that the error asks for."""
    model = shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    (model / "chat_template.jinja").unlink()
    words = [model, segmentation, tmp_path / "run", "--model.sites=[layer_02]"]
    with pytest.raises(SystemExit, match="has no chat template.* `probes fit --model.prefix`"):
        probe_runs.fit(*words)
    run = probe_runs.fit(*words, "--model.prefix", "USER: sky")
    assert run.manifest["identity"]["settings"]["model.prefix"] == "USER: sky"
    assert run.mllm().prefix_ids.shape[1] > 1
