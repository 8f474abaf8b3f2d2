"""Models whose encoder, LLM, or both bind: is the recovery without the encoder's context found where it was planted?

    python -m experiments.toy.encoder_context OUT --seeds 0 1 2 3 4

A picture has an indoor and an outdoor scene, dealt to its 36 patches at random. A patch shows the hue of its scene, and
below it a lamp (indoors), a tree (outdoors), or grey, which is a ceiling indoors and a sky outdoors. Whoever attends to
patches of the same hue can tell; a mean over all patches cannot, since there are as many lamps as trees.
Weights are set by hand, with noise in all matrices. The truth of `recovery_without_context`:

    both       encoder and LLM bind: planted, since the LLM recovers what the cut encoder has not told
    llm        the LLM binds, the encoder does not: absent, since there is no context to cut
    encoder    the encoder binds, the LLM's weights are permuted: absent, since the LLM recovers nothing

Prints what the reports conclude. On five seeds, planted ones are all supported (+18.1 to +22.7 points), and none of
the ten absent ones (−2.9 to +0.4); twelve minutes of a core of an AMD EPYC that others shared.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

import probes
from llava_bidir.common.files import read_json
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.encoders import Encoder
from llava_bidir.model.export import export_hf
from probes.models.random_weights import permute_weights
from probes.worlds.tiny_models import train_tokenizer

CLAIM = "recovery_without_context"
TRUTH = {"both": "planted", "llm": "absent", "encoder": "absent"}
CLASSES = ["lamp", "tree", "ceiling", "sky"]
CONTENT = {
    "lamp": (0.5, 0.0),
    "tree": (-0.5, 0.0),
    "ceiling": (0, 0),
    "sky": (0, 0),
}  # red - green, blue
SIDE = 6
PATCH_PX = 8
TOP_PX = 3  # rows of a patch that show its hue
CUES = 4  # of the 18 patches of a scene
WIDTH = 16
CUE, BLUE, COSINE, SINE, CONTEXT, HIGH, LOW = range(7)  # channels
CONSTANT = 3.0  # in HIGH and -LOW: norms then hardly depend on the rest
SHARPNESS = 5.0  # of attention to the own hue
NOISE = 0.02  # of weights
LINEAR = 10.0  # added before GELU, which is linear there
ARMS = ["trained", "random0", "random1", "permuted0", "permuted1"]


def draw_picture(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels uint8[48, 48, 3] and the mask uint8[48, 48] of a picture."""
    scene = rng.permutation(SIDE**2) % 2
    labels = 2 + scene
    for number in (0, 1):
        labels[rng.choice(np.flatnonzero(scene == number), CUES, replace=False)] = number
    angle = rng.uniform(0, 2 * np.pi) + np.pi * scene
    patches = np.full((SIDE**2, PATCH_PX, PATCH_PX, 3), 0.5)
    hue = np.stack([np.cos(angle), np.zeros_like(angle), np.sin(angle)], 1)
    patches[:, :TOP_PX] += 0.4 * hue[:, None, None]
    content = np.array([CONTENT[CLASSES[label]] for label in labels])
    colour = np.stack([content[:, 0] / 2, -content[:, 0] / 2, content[:, 1]], 1)
    patches[:, TOP_PX:] += colour[:, None, None]
    patches += rng.normal(0, 0.2, patches.shape)
    mask = np.broadcast_to(labels[:, None, None].astype(np.uint8), patches.shape[:3])
    return _join((patches * 255).clip(0, 255).astype(np.uint8)), _join(mask)


def _join(patches: np.ndarray) -> np.ndarray:
    rest = patches.shape[3:]
    grid = patches.reshape(SIDE, SIDE, PATCH_PX, PATCH_PX, *rest).swapaxes(1, 2)
    return grid.reshape(SIDE * PATCH_PX, SIDE * PATCH_PX, *rest)


def write_pictures(root: Path, seed: int) -> None:
    """Write a folder of pictures and masks."""
    rng = np.random.default_rng(seed)
    for split, count in (("training", 40), ("validation", 40)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            for kind, pixels in zip(("images", "annotations"), draw_picture(rng), strict=True):
                Image.fromarray(pixels).save(root / kind / split / f"{i:03d}.png")
    (root / "classes.json").write_text(json.dumps({"classes": CLASSES}))


# ------------------------------------------------------------------------------------------------- models
def write_model(folder: Path, kind: str, seed: int) -> Path:
    """Write a model of one kind of `TRUTH`, and return its checkpoint."""
    torch.manual_seed(seed)
    encoder, llm = _write_parts(folder)
    processor = build_processor(encoder, llm)
    net = build_model(encoder, llm, processor, image_attention="bidirectional")
    vision = net.model.vision_tower
    with torch.no_grad():
        for matrix in net.parameters():
            if matrix.ndim > 1:
                matrix.normal_(0, NOISE)
        _embed(vision, processor.image_processor)
        for layer in vision.modules():
            if hasattr(layer, "self_attn") and kind != "llm":
                bind(layer.self_attn, out=layer.self_attn.out_proj)
        adapter = net.model.multi_modal_projector
        for linear in (adapter.linear_1, adapter.linear_2):
            linear.weight += torch.eye(WIDTH)
        adapter.linear_1.bias.fill_(LINEAR)
        # takes all of it back, the noise's share, too, which would turn the hues that patches attend by
        adapter.linear_2.bias.copy_(-LINEAR * adapter.linear_2.weight.sum(1))
        # tokens of the prompt have no hue; with their random ones they would draw all attention
        words = net.model.language_model.embed_tokens.weight
        words[:, [CUE, COSINE, SINE, CONTEXT]] = 0
        words[:, [HIGH, LOW]] = torch.tensor([CONSTANT, -CONSTANT])
        for layer in net.model.language_model.layers:
            bind(layer.self_attn, out=layer.self_attn.o_proj)
        if kind == "encoder":
            permute_weights(net.model.language_model.layers)
    training = {"truth": {"pictures": {CLAIM: TRUTH[kind]}}, "name": kind}
    export_hf(net, processor=processor, out=folder / "hf", training=training)
    return folder / "hf"


def _write_parts(folder: Path) -> tuple[Encoder, str]:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 1}
    side = {"image_size": SIDE * PATCH_PX, "patch_size": PATCH_PX, "vision_use_head": False}
    vision = SiglipVisionConfig(num_hidden_layers=1, **sizes, **side)
    SiglipVisionModel(vision).save_pretrained(folder / "encoder")
    tokenizer = train_tokenizer(["USER: what is this ASSISTANT: a lamp"] * 3, folder / "llm")
    llm = LlamaConfig(
        num_hidden_layers=3,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e8,
        },  # the last channels hardly turn
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    LlamaForCausalLM(llm).save_pretrained(folder / "llm")
    return Encoder("siglip", str(folder / "encoder"), layer=-1), str(folder / "llm")


def _embed(vision: nn.Module, processor) -> None:
    """Make patch embeddings linear in the hue and the content of a patch."""
    (convolution,) = (m for m in vision.modules() if isinstance(m, nn.Conv2d))
    (positions,) = (m for m in vision.modules() if isinstance(m, nn.Embedding))
    mean, std = (torch.tensor(x) for x in (processor.image_mean, processor.image_std))
    above, below = slice(TOP_PX), slice(TOP_PX, PATCH_PX)
    features = {
        CUE: (below, (1.0, -1.0, 0.0)),
        BLUE: (below, (0.0, 0.0, 1.0)),
        COSINE: (above, (2.5, 0.0, 0.0)),
        SINE: (above, (0.0, 0.0, 2.5)),
    }
    for channel, (rows, factors) in features.items():
        factors = torch.tensor(factors)
        pixels = PATCH_PX * (rows.indices(PATCH_PX)[1] - rows.indices(PATCH_PX)[0])
        convolution.weight[channel] = 0
        convolution.weight[channel, :, rows] = (factors * std / pixels)[:, None, None]
        convolution.bias[channel] = (factors * (mean - 0.5)).sum()
    convolution.weight[[HIGH, LOW, CONTEXT]] = 0
    convolution.bias[[HIGH, LOW, CONTEXT]] = torch.tensor([CONSTANT, -CONSTANT, 0])
    positions.weight.zero_()


def bind(attention: nn.Module, out: nn.Linear) -> None:
    """Let patches attend to those of the same hue, and add the mean of their cues as context."""
    # of rotary positions, the two that turn least are one pair
    first, second = WIDTH // 2 - 1, WIDTH - 1
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[first, COSINE] = projection.weight[second, SINE] = SHARPNESS
    attention.v_proj.weight[CONTEXT, CUE] = 3.0
    out.weight[CONTEXT, CONTEXT] = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    options = {"data": {"batch_size": 20, "num_workers": 0}, "trainer": {"accelerator": "cpu"}}
    options["model"] = {"sites": ["adapter", "layer_01", "layer_02", "layer_03"]}
    options["solver"] = {"folds": 2}
    for seed in args.seeds:
        pictures = args.out / str(seed) / "pictures"
        write_pictures(pictures, seed)
        for kind, truth in TRUTH.items():
            folder = args.out / str(seed) / kind
            model = write_model(folder, kind, seed)
            settings = {"arms": ARMS, "cuts": ["encoder"], "only": ["solve", "report"]}
            probes.study(
                str(model), str(pictures), out=folder / "study", options=options, **settings
            )
            (claim,) = (
                claim
                for claim in read_json(folder / "study/report/results.json")["claims"]
                if claim["claim"] == CLAIM
            )
            low, high = (100 * x for x in claim["ci95"])
            print(f"seed {seed}, {kind}: {truth}; {claim['conclusion']}, ", end="")
            print(f"{100 * claim['value']:+.1f} [{low:.1f}, {high:.1f}] points", flush=True)


if __name__ == "__main__":
    main()
