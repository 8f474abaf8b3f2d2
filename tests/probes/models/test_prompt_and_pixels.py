"""The text before the image: which chat template, which date, and whether it begins with bos."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_families

from llava_bidir.common.hf_loading import PROMPT_DATE
from probes.cli import main
from probes.models.families import FAMILIES
from probes.models.prompt_and_pixels import read_prefix_ids
from probes.results.probe_run import ProbeRun

TEMPLATE = "{{ bos_token }}hello{% for part in messages[0].content %}<image>{% endfor %}"
HELLO = tiny_families.tokenizer().get_vocab()["hello"]


@pytest.fixture
def llava(tmp_path) -> Path:
    return Path(tiny_families.write("llava", tmp_path / "llava"))


def prefix_ids(folder: Path, template: str) -> list[int]:
    (folder / "chat_template.jinja").write_text(template)
    return read_prefix_ids(str(folder), FAMILIES["llava"])


@pytest.mark.parametrize("where", ["tokenizer_config.json", "additional_chat_templates"])
def test_the_named_template_default_is_used(llava, where):
    other = TEMPLATE.replace("hello", "hello\n\n")
    if where == "tokenizer_config.json":
        (llava / "chat_template.jinja").unlink(missing_ok=True)
        settings = json.loads((llava / where).read_text())
        settings["chat_template"] = [
            {"name": "tool_use", "template": other},
            {"name": "default", "template": TEMPLATE},
        ]
        (llava / where).write_text(json.dumps(settings))
        assert read_prefix_ids(str(llava), FAMILIES["llava"]) == [1, HELLO]
    else:
        (llava / where).mkdir()
        (llava / where / "tool_use.jinja").write_text(other)
        assert prefix_ids(llava, TEMPLATE) == [1, HELLO]


def test_a_template_with_the_date_of_the_day_gives_the_same_prefix_every_day(llava):
    dated = "{% if strftime_now('%Y') == 'YEAR' %}hello{% endif %}".replace(
        "YEAR", str(PROMPT_DATE.year)
    )
    assert prefix_ids(llava, dated + TEMPLATE.replace("{{ bos_token }}", "")) == [HELLO, HELLO]


def test_bos_comes_from_the_template_or_the_tokenizer_alone(llava):
    assert prefix_ids(llava, TEMPLATE) == [1, HELLO]
    assert prefix_ids(llava, TEMPLATE.replace("{{ bos_token }}", "")) == [HELLO]
    tokenizer = json.loads((llava / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    single = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {
        "<s>": {
            "id": "<s>",
            "ids": [1],
            "tokens": ["<s>"],
        }
    }
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": tokens,
    }
    (llava / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert (
        prefix_ids(llava, TEMPLATE.replace("{{ bos_token }}", ""))
        == prefix_ids(llava, TEMPLATE)
        == [1, HELLO]
    )


def test_a_llava_with_a_pixtral_encoder_is_rejected(llava):
    """Its processor puts a token after each row of patches."""
    config = json.loads((llava / "config.json").read_text())
    config["vision_config"] |= {"model_type": "pixtral"}
    (llava / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="a llava with a Pixtral encoder .* is not supported"):
        main(["sites", str(llava)])


def test_a_prefix_is_part_of_the_run_and_used_by_analyses(checkpoints, segmentation, tmp_path):
    """A checkpoint without a chat template is probed with the text that the error asks for."""
    model = shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    (model / "chat_template.jinja").unlink()
    command = [
        "fit",
        "-c",
        "configs/demo/probes.yaml",
        "--trainer.max_epochs",
        "1",
        "--model.mllm",
        str(model),
    ]
    command += [
        "--data.root",
        str(segmentation),
        "--data.num_workers",
        "0",
        "--out",
        str(tmp_path / "run"),
    ]
    with pytest.raises(SystemExit, match="has no chat template.* `probes fit --model.prefix`"):
        main(command)
    main([*command, "--model.prefix", "USER: sky"])
    run = ProbeRun(tmp_path / "run")
    with_text = run.mllm().prefix_ids
    assert run.manifest["identity"]["settings"]["model.prefix"] == "USER: sky"
    assert with_text.shape[1] > 1
    image = str(next((segmentation / "images/validation").iterdir()))
    main(
        [
            "states",
            str(model),
            image,
            "--prefix",
            "USER: sky",
            "--out",
            str(tmp_path / "states.safetensors"),
        ]
    )
    with pytest.raises(SystemExit, match="`probes states --prefix`"):
        main(["states", str(model), image, "--out", str(tmp_path / "other.safetensors")])
