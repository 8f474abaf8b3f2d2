"""A frozen MLLM and the states of its image tokens at every site.

One forward gives all sites. Nothing after the image is computed, since under none of the masks does an image token see
later text; what stands before it (system prompt) is computed once and kept as keys and values.

Shapes: B images, T image tokens, P tokens before the image, d width of a site.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, DynamicCache

from .families import FAMILIES, Family, build_mask, family_of, image_attention_of
from .geometry import Geometry
from .knockout import Knockout

ENCODER, ADAPTER, FINAL_NORM = "encoder", "adapter", "final_norm"


def layer_site(layer: int) -> str:
    """The name of decoder layer 1..L: "layer_07"."""
    return f"layer_{layer:02d}"


def site_names(layers: int) -> list[str]:
    """All sites of a model with so many decoder layers, in the order in which they are computed."""
    return [ENCODER, ADAPTER, *(layer_site(i) for i in range(1, layers + 1)), FINAL_NORM]


class _Enough(Exception):
    """Raised by a hook behind the last site that was asked for, to end the forward there."""


class FrozenMLLM(nn.Module):
    """A model in eval mode without gradients, read at the sites. Made by :func:`load`.

    Attributes:
        sites: "encoder", "adapter" (the paper's layer 0: the LLM's input at image positions), "layer_01" ... (outputs
            of the decoder layers, before any norm) and "final_norm" (the last one normed: Hugging Face's
            ``hidden_states[-1]``).
        grid: Image tokens down and across; T is their product.
        geometry: How it sees images: where the grid lies on an image and its mask.
        image_attention: The mask it runs under.
    """

    def __init__(
        self,
        model,
        family: Family,
        image_processor,
        prefix_ids: list[int],
        image_attention: str,
        image_aspect: str = "square",
    ):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.family, self.image_processor = family, image_processor
        self.image_attention = image_attention
        self.grid = family.grid(model.config)
        image_px, colour = family.image_px(model.config), [int(255 * x) for x in image_processor.image_mean]
        self.geometry = Geometry(self.grid, image_px, family.seen_px(model.config), image_aspect, tuple(colour))
        self.sites = site_names(len(self._decoder.layers))
        width = model.config.get_text_config().hidden_size
        self.widths = dict.fromkeys(self.sites, width) | {ENCODER: family.encoder_width(model.config)}
        self.register_buffer("prefix_ids", torch.tensor([prefix_ids], dtype=torch.long), persistent=False)
        self._prefix_kv: list[tuple[Tensor, Tensor]] | None = None

    @property
    def _decoder(self) -> nn.Module:
        return self.family.language_model(self.model)

    @property
    def device(self) -> torch.device:
        return self.prefix_ids.device

    def train(self, mode: bool = True) -> "FrozenMLLM":
        return super().train(False)  # a frozen model stays in eval mode whatever its owner does

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pixels f[B, 3, H, W]; each image fills the encoder's square as a whole, nothing is cropped."""
        squares = [self.geometry.place(image) for image in images]
        return self.image_processor(squares, do_pad=False, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def states(
        self, pixels: Tensor, sites: Sequence[str] | None = None, knockout: Knockout | None = None
    ) -> dict[str, Tensor]:
        """The states of the image tokens at each site.

        Args:
            pixels: f[B, 3, H, W] from :meth:`preprocess`.
            sites: Those to return, None for all; what lies behind the last one is not computed.
            knockout: Cuts attention among image tokens (Eq. 1).

        Returns:
            f[B, T, d] by site, image tokens only.

        Raises:
            ValueError: An unknown site, or a knockout that does not fit the model.
        """
        wanted = self._known(sites)
        pixels = pixels.to(self.device, self.model.dtype)
        encoder, adapter = self._encode(pixels)
        found = {ENCODER: encoder, ADAPTER: adapter}
        depth = max((self.sites.index(site) - 1 for site in wanted), default=0)
        if depth > 0:
            found |= self._decode(adapter, min(depth, len(self._decoder.layers)), FINAL_NORM in wanted, knockout)
        return {site: found[site] for site in wanted}

    def _known(self, sites: Sequence[str] | None) -> list[str]:
        unknown = set(sites or ()) - set(self.sites)
        if unknown:
            raise ValueError(f"unknown site {min(unknown)!r}; this model has {', '.join(self.sites)}")
        return list(self.sites if sites is None else sites)

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the adapter and what leaves it, f[B, T, d] each."""
        entered = []
        hook = self.family.adapter(self.model).register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        try:
            adapter = self.family.image_features(self.model, pixels)
        finally:
            hook.remove()
        tokens = self.grid[0] * self.grid[1]
        for site, states in ((ENCODER, entered[0]), (ADAPTER, adapter)):
            if states.shape[1] != tokens:
                raise ValueError(
                    f"the {site} gives {states.shape[1]} tokens an image where the grid {self.grid} has {tokens}: were "
                    "tokens dropped from an encoder without a CLS token, or not dropped from one with?"
                )
        return entered[0], adapter

    def _decode(self, adapter: Tensor, depth: int, normed: bool, knockout: Knockout | None) -> dict[str, Tensor]:
        """States behind the first `depth` decoder layers, and behind the final norm if `normed`."""
        tokens = adapter.shape[1]
        mask = self._mask(adapter)
        reuse = not mask[:, :, :-tokens, -tokens:].any()  # the prefix is the same for all images unless it sees them
        if reuse:
            inputs, cache = adapter, self._prefix_cache(len(adapter))
            rows = mask[:, :, -tokens:]
        else:
            inputs, cache, rows = self._with_prefix(adapter), None, mask
        cut = nullcontext() if knockout is None else knockout.applied(self._decoder.layers, rows, depth)
        with cut, self._captured(depth, normed) as states:
            try:
                self._decoder(inputs_embeds=inputs, attention_mask=rows, past_key_values=cache, use_cache=reuse)
            except _Enough:
                pass
        return {site: state[:, -tokens:] for site, state in states.items()}

    def _mask(self, adapter: Tensor) -> Tensor:
        """bool[B, 1, P + T, P + T]: what prefix and image attend to."""
        batch, tokens = adapter.shape[:2]
        is_image = torch.arange(self.prefix_ids.shape[1] + tokens, device=self.device) >= self.prefix_ids.shape[1]
        is_image = is_image.expand(batch, -1)
        return build_mask(self.image_attention, self.model.config.get_text_config(), is_image, dtype=self.model.dtype)

    def _with_prefix(self, adapter: Tensor) -> Tensor:
        prefix = self._decoder.get_input_embeddings()(self.prefix_ids)
        return torch.cat([prefix.expand(len(adapter), -1, -1), adapter], dim=1)

    def _prefix_cache(self, batch: int) -> DynamicCache:
        """Keys and values of the prefix, computed at batch 1 and shared by all images."""
        if self._prefix_kv is None:
            cache = DynamicCache()
            if self.prefix_ids.shape[1]:
                self._decoder(input_ids=self.prefix_ids, past_key_values=cache, use_cache=True)
            self._prefix_kv = [(layer.keys, layer.values) for layer in cache.layers]
        return DynamicCache(
            ddp_cache_data=[(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in self._prefix_kv]
        )

    @contextmanager
    def _captured(self, depth: int, normed: bool) -> Iterator[dict[str, Tensor]]:
        """Collects the layers' outputs while open, and ends the forward behind the last one that is needed."""
        states: dict[str, Tensor] = {}

        def keep(site: str, output) -> None:
            states[site] = output[0] if isinstance(output, tuple) else output
            if site == (FINAL_NORM if normed else layer_site(depth)):
                raise _Enough

        modules = {layer_site(i + 1): layer for i, layer in enumerate(self._decoder.layers[:depth])}
        modules |= {FINAL_NORM: self._decoder.norm} if normed else {}
        handles = [
            module.register_forward_hook(lambda _, args, output, site=site: keep(site, output))
            for site, module in modules.items()
        ]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()


def load(
    path: str,
    image_attention: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    image_aspect: str = "square",
    prefix: str | None = None,
    untrained: Sequence[str] = (),
    seed: int = 0,
) -> FrozenMLLM:
    """Loads a checkpoint, frozen and in eval mode.

    Args:
        path: Directory or hub id, one of ours or of a registered family.
        image_attention: Runs it under another mask than it was trained with; None keeps its own.
        dtype: Of the weights; None keeps the checkpoint's.
        device: None takes the GPU if there is one.
        image_aspect: How images become squares: "square" (resized) or "pad" (LLaVA's own), see probes/geometry.py.
        prefix: Text before the image; None takes the checkpoint's chat template up to the image.
        untrained: Parts ("adapter", "llm") whose weights are drawn anew: the controls that show what the architecture
            does without training.
        seed: Of those draws.

    Raises:
        ValueError: Not a checkpoint of a registered family, or an unknown mask or part.
    """
    config = read_config(path)
    family = family_of(config)
    model = family.model_class.from_pretrained(path, dtype=dtype or "auto", attn_implementation="sdpa")
    processor = AutoProcessor.from_pretrained(path)
    _draw_anew(model, family, untrained, seed)
    mllm = FrozenMLLM(
        model,
        family,
        processor.image_processor,
        _prefix_ids(processor, path, prefix),
        image_attention_of(config, image_attention),
        image_aspect,
    )
    return mllm.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def read_config(path: str):
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} holds no config.json; expected a Hugging Face checkpoint directory, such as RUN/hf")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint of {', '.join(FAMILIES)}: {error}") from None


def _prefix_ids(processor, path: str, prefix: str | None) -> list[int]:
    """Ids of what stands before the image, begin-of-sequence token included."""
    tokenizer = processor.tokenizer
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if prefix is None:
        if processor.chat_template is None:
            raise ValueError(f"{path} has no chat template that says what stands before the image; pass prefix='...'")
        chat = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
        prefix = chat.partition(processor.image_token)[0]
    # alone and behind no other token, as LLaVA tokenises what stands before an image
    return start + tokenizer.encode(prefix.removeprefix(tokenizer.bos_token or ""), add_special_tokens=False)


def _draw_anew(model, family: Family, parts: Sequence[str], seed: int) -> None:
    """Puts parts of the model back to before training: the adapter drawn as torch does (times the checkpoint's own
    gain), the LLM as transformers does."""
    modules = {ADAPTER: family.adapter(model), "llm": family.language_model(model)}
    unknown = set(parts) - set(modules)
    if unknown:
        raise ValueError(f"untrained knows {', '.join(modules)}, got {min(unknown)!r}")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in parts:
            for module in modules[part].modules():
                if part == "llm":
                    _reset_llm_module(module, model.config.get_text_config().initializer_range)
                elif hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        if ADAPTER in parts and getattr(model.config, "adapter_gain", 1.0) != 1.0:
            modules[ADAPTER].linear_2.weight *= model.config.adapter_gain


def _reset_llm_module(module: nn.Module, spread: float) -> None:
    """N(0, initializer_range) for weights, 0 for biases, 1 for norms, as transformers' `_init_weights`."""
    for name, parameter in module.named_parameters(recurse=False):
        if name == "bias":
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1)
        else:
            parameter.normal_(0, spread)
