r"""Compare the sites of a tiny random LLaVA with TransformerLens and nnsight, for probes/models/hooks.md.

    pip install --no-deps transformer-lens==4.3.0 nnsight==0.8.1 beartype fancy_einsum jaxtyping wadler-lindig \
        typeguard zstandard websocket-client httpx httpcore        # in a copy of .venv
    PYTHONPATH=.:tests/helpers python tests/peers/hook_names.py

Prints the largest difference at each site, in float32, with stock weights and three text tokens after the image.
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import nnsight
import tiny_models
import torch
import transformers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import probes
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.export import as_llava, export_hf
from probes.models.sites import encoder_site, layer_site

TEXT = torch.tensor([[5, 6, 7]])
States = dict[str, Tensor]


def write_llava(folder: Path) -> Path:
    """Write a checkpoint of type llava."""
    encoder, llm = tiny_models.write_parts(folder)
    processor = build_processor(encoder, llm)
    torch.manual_seed(3)
    model = build_model(encoder, llm, processor, image_attention="causal")
    tiny_models.sharpen(model, 8.0)
    export_hf(as_llava(model), processor, folder / "hf")
    return folder / "hf"


def in_transformer_lens(path: Path, inputs: dict) -> States:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        path, attn_implementation="eager"
    )
    bridge = TransformerBridge.boot_transformers(
        str(path),
        hf_model=model.eval(),
        tokenizer=transformers.AutoTokenizer.from_pretrained(path),
        device="cpu",
    )
    _, cache = bridge.run_with_cache(input=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    blocks = "vision_encoder.encoder_layers"
    states = {encoder_site(0): cache[f"{blocks}.0.hook_in"][:, 1:]}
    for j in range(1, bridge.original_model.config.vision_config.num_hidden_layers + 1):
        states[encoder_site(j)] = cache[f"{blocks}.{j - 1}.hook_resid_post"][:, 1:]
    states["encoder"] = cache["vision_projector.hook_in"]
    states["adapter"] = cache["blocks.0.hook_resid_pre"]
    for i in range(1, bridge.cfg.n_layers + 1):
        states[layer_site(i)] = cache[f"blocks.{i - 1}.hook_resid_post"]
    states["final_norm"] = cache["ln_final.hook_out"]
    return states


def in_nnsight(path: Path, inputs: dict) -> States:
    model = nnsight.TransformersModel(str(path), task="image-text-to-text", dispatch=True)
    with model.trace(**inputs):
        states = {}.save()
        tower = model.model.vision_tower.encoder.layers
        states[encoder_site(0)] = tower[0].input[:, 1:]
        for j, layer in enumerate(tower, 1):
            states[encoder_site(j)] = layer.output[:, 1:]
        states["encoder"] = model.model.multi_modal_projector.input
        states["adapter"] = model.model.language_model.layers[0].input
        for i, layer in enumerate(model.model.language_model.layers, 1):
            states[layer_site(i)] = layer.output
        states["final_norm"] = model.model.language_model.norm.output
    return states


@torch.no_grad()
def main() -> None:
    """Print the tables."""
    versions = [f"{m.__name__} {m.__version__}" for m in (torch, transformers, nnsight)]
    print(*versions, f"transformer_lens {version('transformer-lens')}", sep=", ")
    with tempfile.TemporaryDirectory() as folder:
        path = write_llava(Path(folder))
        mllm = probes.load(str(path))
        pixels = tiny_models.pixels(2)
        ours = mllm.states(pixels, "all")
        ids = torch.cat([mllm.ids, TEXT], 1).expand(2, -1)
        inputs = {"input_ids": ids, "pixel_values": pixels}
        first = mllm.prefix_ids.shape[1]
        image = slice(first, first + mllm.image_tokens)
        peers = {"TransformerLens": in_transformer_lens, "nnsight": in_nnsight}
        for peer, read in peers.items():
            for site, states in read(path, inputs).items():
                states = states if states.shape[1] == mllm.image_tokens else states[:, image]
                difference = (states - ours[site]).abs().max()
                size = ours[site].abs().max()
                print(f"{peer:16}{site:30}{difference:9.1e} at up to {size:.0f}")


if __name__ == "__main__":
    sys.exit(main())
