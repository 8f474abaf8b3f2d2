"""Names of weights and keys of config.json in exports: those of released LLaVAs, however the model was made."""

import copy
import json

from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.export import as_llava, export_hf
from llava_bidir.model.lora import Lora, add_lora

# Source: model.safetensors.index.json of llava-hf/llava-1.5-7b-hf; i numbers layers.
RELEASED = """
language_model.lm_head.weight
language_model.model.embed_tokens.weight
language_model.model.layers.i.input_layernorm.weight
language_model.model.layers.i.mlp.down_proj.weight
language_model.model.layers.i.mlp.gate_proj.weight
language_model.model.layers.i.mlp.up_proj.weight
language_model.model.layers.i.post_attention_layernorm.weight
language_model.model.layers.i.self_attn.k_proj.weight
language_model.model.layers.i.self_attn.o_proj.weight
language_model.model.layers.i.self_attn.q_proj.weight
language_model.model.layers.i.self_attn.v_proj.weight
language_model.model.norm.weight
multi_modal_projector.linear_1.bias
multi_modal_projector.linear_1.weight
multi_modal_projector.linear_2.bias
multi_modal_projector.linear_2.weight
vision_tower.vision_model.embeddings.class_embedding
vision_tower.vision_model.embeddings.patch_embedding.weight
vision_tower.vision_model.embeddings.position_embedding.weight
vision_tower.vision_model.encoder.layers.i.layer_norm1.bias
vision_tower.vision_model.encoder.layers.i.layer_norm1.weight
vision_tower.vision_model.encoder.layers.i.layer_norm2.bias
vision_tower.vision_model.encoder.layers.i.layer_norm2.weight
vision_tower.vision_model.encoder.layers.i.mlp.fc1.bias
vision_tower.vision_model.encoder.layers.i.mlp.fc1.weight
vision_tower.vision_model.encoder.layers.i.mlp.fc2.bias
vision_tower.vision_model.encoder.layers.i.mlp.fc2.weight
vision_tower.vision_model.encoder.layers.i.self_attn.k_proj.bias
vision_tower.vision_model.encoder.layers.i.self_attn.k_proj.weight
vision_tower.vision_model.encoder.layers.i.self_attn.out_proj.bias
vision_tower.vision_model.encoder.layers.i.self_attn.out_proj.weight
vision_tower.vision_model.encoder.layers.i.self_attn.q_proj.bias
vision_tower.vision_model.encoder.layers.i.self_attn.q_proj.weight
vision_tower.vision_model.encoder.layers.i.self_attn.v_proj.bias
vision_tower.vision_model.encoder.layers.i.self_attn.v_proj.weight
vision_tower.vision_model.post_layernorm.bias
vision_tower.vision_model.post_layernorm.weight
vision_tower.vision_model.pre_layrnorm.bias
vision_tower.vision_model.pre_layrnorm.weight
"""
# Ours has the prefixes of the modules: by itself, the stock class renames those of a "llava" only.
OURS = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "vision_tower.": "model.vision_tower.",
}


def released(config, ours: bool = False) -> set[str]:
    """Return the names in a released LLaVA of other numbers of layers, or those of our own class."""
    layers = {"v": config.vision_config, "l": config.text_config}
    names = set()
    for name in RELEASED.split():
        if ours:
            prefix = next(prefix for prefix in OURS if name.startswith(prefix))
            name = OURS[prefix] + name.removeprefix(prefix)
        count = layers["v" if "vision_tower" in name else "l"].num_hidden_layers
        names |= {name.replace(".i.", f".{i}.") for i in range(count)}
    return names


def names_in(folder) -> set[str]:
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= {*tensors.keys()}
    return names


def test_names_in_exports_are_those_of_released_llavas_whatever_the_model_was(parts, tmp_path):
    """Built, read from either export, or with updates to be merged."""
    processor = build_processor(*parts)
    model = build_model(*parts, processor).eval()
    export_hf(model, processor, tmp_path / "ours")
    export_hf(as_llava(model), processor, tmp_path / "stock")
    updated = copy.deepcopy(model)
    add_lora(updated, Lora(r=2, alpha=4))
    read = [
        LlavaBidirForConditionalGeneration.from_pretrained(tmp_path / x) for x in ("ours", "stock")
    ]
    for made in (model, *read, updated):
        export_hf(as_llava(made), processor, tmp_path / "hf")
        assert names_in(tmp_path / "hf") == released(made.config)
        export_hf(made, processor, tmp_path / "hf")
        assert names_in(tmp_path / "hf") == released(made.config, ours=True)


def test_configs_of_stock_exports_have_the_rotary_keys_of_released_llavas(parts, tmp_path):
    """transformers before 5 ignores `rope_parameters`: it would compute angles of its defaults, without a word."""
    processor = build_processor(*parts)
    model = build_model(*parts, processor)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    for scaling in (None, {"rope_type": "linear", "factor": 4.0}, yarn):
        parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": 5e5}
        model.config.text_config.rope_parameters = parameters
        export_hf(as_llava(model), processor, tmp_path / "hf")
        written = json.loads((tmp_path / "hf/config.json").read_text())["text_config"]
        assert written["rope_theta"] == 5e5
        assert written.get("rope_scaling") == scaling
        read = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").config
        assert read.text_config.rope_parameters == parameters
