"""A probing sweep over random models of real and toy shapes, which bench.py times."""

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig

from llava_bidir import LlavaBidirConfig, LlavaBidirForConditionalGeneration
from probes.data.batches import MaskPreparer
from probes.evaluation.metrics import IGNORE_INDEX
from probes.models.families import FAMILIES
from probes.models.frozen_mllm import FrozenMLLM
from probes.training.module import ProbeModule

PREFIX, CLASSES, VOCABULARY = 36, 150, 2048  # tokens before the image; ADE20K's classes; what little of an embedding

CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_LARGE |= {"image_size": 336, "patch_size": 14}
CLIP_SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
CLIP_SMALL |= {"image_size": 168, "patch_size": 14}
CLIP_DEMO = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP_DEMO |= {"image_size": 96, "patch_size": 12}


def llama(width: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SHAPES = {  # encoder, LLM
    "demo": (CLIP_DEMO, llama(96, 240, 6, 6, 6)),  # toy_world/tiny_models.py
    "small": (CLIP_SMALL, llama(512, 1376, 8, 8, 8)),
    "1b": (CLIP_LARGE, llama(2048, 5632, 22, 32, 4)),  # CLIP ViT-L/14@336 and TinyLlama 1.1B
}


def random_model(image_attention: str, shape: str = "small") -> LlavaBidirForConditionalGeneration:
    torch.manual_seed(0)
    vision, text = SHAPES[shape]
    config = LlavaBidirConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text, vocab_size=VOCABULARY),
        image_token_index=VOCABULARY - 1,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        image_attention=image_attention,
    )
    return LlavaBidirForConditionalGeneration._from_config(config).eval()


def frozen_model(shape: str = "small") -> FrozenMLLM:
    model, prefix = random_model("bidirectional", shape), list(range(1, PREFIX + 1))
    return FrozenMLLM(model, FAMILIES["llava_bidir"], [CLIPImageProcessorPil()], prefix, "bidirectional")


class Sweep:
    """Linear probes on a batch of random images, whose masks have regions of 32 x 32 pixels, a tenth of them ignored.

    Args:
        shape: of the model, one of SHAPES.
        images: B.
        mask_px: H = W.
    """

    def __init__(self, shape: str, images: int, mask_px: int):
        self.mllm = frozen_model(shape)
        side = self.mllm.geometry.image_px
        self.pixels = torch.randn(images, 3, side, side)
        regions = torch.randint(0, CLASSES, (images, mask_px // 32, mask_px // 32), dtype=torch.uint8)
        regions[torch.rand(regions.shape) < 0.1] = IGNORE_INDEX
        self.target = regions.repeat_interleave(32, 1).repeat_interleave(32, 2)
        self.sites = list(self.mllm.sites)
        self.heads = nn.ModuleDict({s: nn.Linear(d, CLASSES) for s, d in self.mllm.widths.items()})
        self.optimizers, self.task = {}, None  # segmentation
        self.masks = MaskPreparer(self.mllm.geometry, CLASSES, nodes=3)(self.target)

    def forward(self, sites: list[str] | None = None) -> dict[str, Tensor]:
        """The frozen model alone."""
        return self.mllm.states(self.pixels, sites)

    def logits(self, states: dict[str, Tensor]) -> Tensor:
        """As ProbeModule.logits."""
        logits = torch.stack([self.heads[site](x.float()) for site, x in states.items()])
        return logits.transpose(-1, -2).unflatten(-1, self.mllm.grid)

    def losses(self, logits: Tensor) -> Tensor:
        return ProbeModule.losses(self, logits, self.masks)

    def step(self, sites: list[str] | None = None) -> None:
        """A training step of the probes of these sites, or of all."""
        states = self.forward(sites)
        self.losses(self.logits(states)).sum().backward()
        self.update(tuple(states))

    def update(self, sites: tuple[str, ...]) -> None:
        if sites not in self.optimizers:
            parameters = [p for site in sites for p in self.heads[site].parameters()]
            self.optimizers[sites] = torch.optim.AdamW(parameters, fused=True)
        self.optimizers[sites].step()
        self.optimizers[sites].zero_grad()
