"""Train tiny stand-ins for CLIP and Vicuna on the toy world: an encoder on its images, an LLM on its text.

Neither is taught to distinguish look-alikes in images. The encoder's nouns merge each pair, and the LLM sees pictures
only as words, some of which are replaced by their look-alike.

Shapes: B batch, T patches, K nouns, d width.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from llava_bidir.data.collate import pad
from llava_bidir.data.conversation import SYSTEM, encode

from .binding import PATCH_PX
from .canvas import CLASSES, PAIR_OF, SIZE_PX


def train_encoder(
    images: np.ndarray, masks: np.ndarray, out: Path, *, steps: int, seed: int
) -> None:
    """Train a two-layer CLIP tower to denoise patches and predict each noun's share of the picture. Write it to `out`.

    The shares stand in for CLIP's captions: an image-level signal in words, with one word for both look-alikes.

    Args:
        images: uint8[n, H, W, 3].
        masks: uint8[n, H, W].
        out: Hugging Face directory.
        steps: Number of optimizer steps.
        seed: Seed of initialisation and batches.
    """
    torch.manual_seed(seed)
    width = 64
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE_PX,
        patch_size=PATCH_PX,
        projection_dim=width,
    )
    encoder = CLIPVisionModel(config)
    to_pixels = nn.Linear(width, 3 * PATCH_PX**2)
    to_nouns = nn.Linear(width, len(CLASSES))
    pixels = normalize(images)
    shares = _noun_shares(masks)

    def loss() -> Tensor:
        index = torch.randint(len(pixels), (32,))
        clean = pixels[index]
        noisy = clean + 0.2 * torch.randn_like(clean)
        states = encoder(noisy).last_hidden_state[:, 1:]
        patches = F.unfold(clean, PATCH_PX, stride=PATCH_PX).transpose(1, 2)
        denoised = F.mse_loss(to_pixels(states), patches)
        predicted = to_nouns(states).softmax(-1).mean(1).clamp_min(1e-6)
        likelihood = (shares[index] * predicted.log()).sum(-1).mean()
        return denoised - 2.0 * likelihood

    train(
        [*encoder.parameters(), *to_pixels.parameters(), *to_nouns.parameters()],
        loss,
        steps,
        name="encoder",
        rate=2e-3,
        betas=(0.9, 0.999),
        floor=0.0,
        clip=math.inf,
    )
    encoder.save_pretrained(out)


def normalize(images: np.ndarray) -> Tensor:
    """Return f[n, 3, H, W], normalised with CLIP's pixel statistics like the processor of the trained model."""
    mean = torch.tensor(OPENAI_CLIP_MEAN)[:, None, None]
    std = torch.tensor(OPENAI_CLIP_STD)[:, None, None]
    pixels = torch.from_numpy(images).movedim(-1, 1) / 255
    return (pixels - mean) / std


def _noun_shares(masks: np.ndarray) -> Tensor:
    """Return f[n, K], the share of the picture per noun. Look-alikes share the noun of the first of the pair."""
    count = len(CLASSES)
    noun_of = np.full(256, count)  # of pixels without a class
    noun_of[:count] = np.minimum(np.arange(count), PAIR_OF)
    nouns = noun_of[masks]
    shares = np.stack([np.mean(nouns == noun, (1, 2)) for noun in range(count)], 1)
    return torch.from_numpy(shares).float()


def train_tokenizer(texts: list[str], out: Path) -> LlamaTokenizer:
    """Train a Llama tokenizer (BPE on words, byte fallback) and write it to `out`."""
    bpe = Tokenizer(tokenizer_models.BPE())
    lines = pre_tokenizers.Split("\n", "isolated")
    words = pre_tokenizers.Metaspace(prepend_scheme="never")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([lines, words])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=specials, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)
    # One token for the system prompt: its 30 constant tokens would be a large part of a toy sequence.
    tokenizer.add_tokens([SYSTEM], special_tokens=True)
    tokenizer.save_pretrained(out)
    return tokenizer


def train_llm(
    documents: Iterator[list[dict]], tokenizer: LlamaTokenizer, out: Path, *, steps: int, seed: int
) -> None:
    """Train a small Llama on all tokens of conversations about pictures in words. Write it to `out`.

    Args:
        documents: Endless conversations.
        tokenizer: Tokenizer of the LLM.
        out: Hugging Face directory.
        steps: Number of optimizer steps.
        seed: Seed of the initialisation.
    """
    torch.manual_seed(seed)
    width = 96
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=5 * width // 2,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=512,
    )
    llm = LlamaForCausalLM(config)

    def loss() -> Tensor:
        rows = [encode(next(documents), tokenizer)[0] for _ in range(24)]
        ids = pad(rows, 0)
        mask = pad([[1] * len(row) for row in rows], 0)
        labels = ids.masked_fill(mask == 0, -100)
        return llm(input_ids=ids, attention_mask=mask, labels=labels).loss

    train(list(llm.parameters()), loss, steps, "LLM", floor=0.1)
    llm.save_pretrained(out)


def train(
    parameters: list[nn.Parameter],
    loss: Callable[[], Tensor],
    steps: int,
    name: str,
    *,
    rate: float = 3e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    floor: float = 0.05,
    clip: float = 1.0,
) -> None:
    """Minimise a loss by AdamW, with 3% warm-up and a cosine schedule down to `floor` of the peak rate."""
    optimizer = torch.optim.AdamW(parameters, rate, betas=betas, weight_decay=0.0, fused=True)
    warmup = max(1, int(0.03 * steps))

    def factor(step):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1, (step + 1) / warmup) * (floor + (1 - floor) * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    progress = tqdm(range(steps), desc=f"training the tiny {name}", mininterval=5)
    for step in progress:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            progress.set_postfix(loss=f"{value.item():.3f}", refresh=False)
