"""A probing sweep over random models of real and toy shapes; bench.py times it on a CPU, gpu.py on a GPU."""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig

from llava_bidir import LlavaBidirConfig, LlavaBidirForConditionalGeneration
from probes.data.batches import MaskPreparer
from probes.models.families import FAMILIES
from probes.models.frozen_mllm import FrozenMLLM
from probes.ops.geometry import IGNORE_INDEX
from probes.ops.pixel_counts import count
from probes.solve.objective import SiteProblem
from probes.tasks import SEGMENTATION, TASKS

PREFIX = 36  # tokens before the image
CLASSES = 150  # of ADE20K
VOCABULARY = 2048  # what little of an embedding


CLIP = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size")
LLAMA = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
VIT_L = (1024, 24, 16, 336)  # CLIP ViT-L/14@336
SHAPES = {  # encoder, LLM
    "toy": ((16, 2, 2, 28), (32, 48, 3, 4, 2)),
    "small": ((128, 4, 4, 168), (512, 1376, 8, 8, 8)),
    "1b": (VIT_L, (2048, 5632, 22, 32, 4)),  # TinyLlama 1.1B
    "7b": (VIT_L, (4096, 11008, 32, 32, 32)),  # LLaVA-1.5 7B
}
PATCH_PX = 14


def frozen_model(shape: str, dtype: torch.dtype, device: str) -> FrozenMLLM:
    """Return a model of random weights under the bidirectional mask."""
    torch.manual_seed(0)
    encoder, llm = SHAPES[shape]
    width, *_, side = encoder
    vision = dict(zip(CLIP, encoder, strict=True))
    text = dict(zip(LLAMA, llm, strict=True))
    config = LlavaBidirConfig(
        vision_config=CLIPVisionConfig(**vision, intermediate_size=4 * width, patch_size=PATCH_PX),
        text_config=LlamaConfig(**text, vocab_size=VOCABULARY),
        image_token_index=VOCABULARY - 1,
        image_seq_length=(side // PATCH_PX) ** 2,
        image_attention="bidirectional",
    )
    with torch.device(device):
        model = LlavaBidirForConditionalGeneration._from_config(config, dtype=dtype).eval()
    mllm = FrozenMLLM(
        model=model,
        family=FAMILIES["llava_bidir"],
        image_processors=[CLIPImageProcessorPil()],
        prefix_ids=list(range(1, PREFIX + 1)),
        image_attention="bidirectional",
    )
    return mllm.to(device)


class Sweep:
    """Linear probes on a batch of random images, whose masks have regions of 32 x 32 pixels, a tenth of them ignored.

    Args:
        shape: of the model, one of SHAPES.
        images: B.
        mask_px: H = W.
        dtype: of the model; probes are in float32.
        device: of everything.
    """

    def __init__(
        self,
        shape: str,
        images: int,
        mask_px: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ):
        self.mllm = frozen_model(shape, dtype, device)
        side = self.mllm.geometry.image_px
        self.pixels = torch.randn(images, 3, side, side, device=device)
        regions = torch.randint(
            0, CLASSES, (images, mask_px // 32, mask_px // 32), dtype=torch.uint8
        )
        regions[torch.rand(regions.shape) < 0.1] = IGNORE_INDEX
        self.target = regions.repeat_interleave(32, 1).repeat_interleave(32, 2).to(device)
        self.sites = list(self.mllm.sites)
        self.heads = nn.ModuleDict(
            {s: nn.Linear(d, CLASSES, device=device) for s, d in self.mllm.widths.items()}
        )
        self.optimizers = {}
        self.task = TASKS[SEGMENTATION]
        self.masks = MaskPreparer(self.mllm.geometry, CLASSES, nodes=3)(self.target)

    def forward(self, sites: list[str] | None = None) -> dict[str, Tensor]:
        """The frozen model alone."""
        return self.mllm.states(self.pixels, sites)

    def logits(self, states: dict[str, Tensor]) -> Tensor:
        """As ProbeModule.logits."""
        logits = torch.stack([self.heads[site](x.float()) for site, x in states.items()])
        return logits.transpose(-1, -2).unflatten(-1, self.mllm.grid)

    def losses(self, logits: Tensor) -> Tensor:
        """The mean loss of each site's probe."""
        total, count = self.task.training_losses(logits, self.masks, self.mllm.geometry)
        return total / count

    def step(self, sites: list[str] | None = None) -> None:
        """A training step of the probes of these sites, or of all."""
        states = self.forward(sites)
        self.losses(self.logits(states)).sum().backward()
        self.update(tuple(states))

    def naive_logits(self) -> Iterator[Tensor]:
        """Yield the logits of all pixels, site by site."""
        for site, x in self.forward().items():
            logits = self.logits({site: x})[0]
            yield F.interpolate(logits, self.target.shape[1:], mode="bilinear")

    def naive_step(self) -> None:
        """The same, with all logits of all pixels, site by site lest memory runs out."""
        for up in self.naive_logits():
            F.cross_entropy(up, self.target.long(), ignore_index=IGNORE_INDEX).backward()
        self.update(tuple(self.sites))

    def update(self, sites: tuple[str, ...]) -> None:
        if sites not in self.optimizers:
            parameters = [p for site in sites for p in self.heads[site].parameters()]
            self.optimizers[sites] = torch.optim.AdamW(parameters, fused=True)
        self.optimizers[sites].step()
        self.optimizers[sites].zero_grad()

    @torch.no_grad()
    def add_gradients(self) -> None:
        """An evaluation of `probes solve`: exact losses and gradients of three strengths at each site."""
        for site, x in self.forward().items():
            head = self.heads[site]
            probes = torch.cat([head.weight, head.bias[:, None]], 1).double().expand(3, -1, -1)
            problem = SimpleNamespace(
                loss=self.task.loss,
                states=x,
                folds=[torch.arange(len(x))],
                space=SimpleNamespace(mean=probes.new_zeros(x.shape[-1])),
            )
            SiteProblem.sums(problem, fold=0, probes=probes, masks=self.masks)

    @torch.no_grad()
    def score(self) -> None:
        """A validation step."""
        count(self.logits(self.forward()), self.target)

    @torch.no_grad()
    def naive_score(self) -> None:
        """The same with all logits of all pixels, and a table of label and prediction an image."""
        image = torch.arange(len(self.target), device=self.target.device).view(-1, 1, 1)
        for up in self.naive_logits():
            best = up.argmax(1)
            pair = ((image * CLASSES + self.target) * CLASSES + best)[self.target != IGNORE_INDEX]
            torch.bincount(pair, minlength=len(image) * CLASSES**2)
