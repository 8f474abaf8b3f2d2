"""A frozen MLLM and the states of its image tokens at every site.

One forward, the stock model's own, gives all sites; hooks read them. Nothing after the image is computed, since under
none of the masks does an image token see later text; what stands before it (system prompt) is computed once and kept as
keys and values where the model allows it.

Shapes: B images, T image tokens, P tokens before the image, N of both, d width of a site.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf_loading import load_weights
from probes.ops.geometry import Geometry

from .attention_masks import Masks, build_masks, check_name, each, last_rows, supports_masks
from .families import Family, family_of, own_image_attention
from .knockout import Knockout
from .prompt_and_pixels import check_numbers, image_processors, prefix_ids, read_config, row_end_id
from .random_init import reinitialize

ENCODER, ADAPTER, FINAL_NORM = "encoder", "adapter", "final_norm"


def layer_site(layer: int) -> str:
    """The name of decoder layer 1..L: "layer_07"."""
    return f"layer_{layer:02d}"


def site_names(layers: int) -> list[str]:
    """All sites of a model with so many decoder layers, in the order in which they are computed."""
    return [ENCODER, ADAPTER, *(layer_site(i) for i in range(1, layers + 1)), FINAL_NORM]


class _StopForward(Exception):
    """Raised by a hook behind the last site that was asked for, to end the forward there."""


class FrozenMLLM(nn.Module):
    """A model in eval mode without gradients, read at the sites. Made by :func:`load`.

    Attributes:
        sites: "encoder" (what enters the adapter; where that merges patches, those of a token side by side), "adapter"
            (the paper's layer 0: the LLM's input at image positions), "layer_01" ... (outputs of the decoder layers,
            before any norm) and "final_norm" (the last one normed: Hugging Face's ``hidden_states[-1]``).
        widths: d of each site.
        grid: Image tokens down and across, the same at all sites; T is their product.
        geometry: How it sees images: where the grid lies on an image and its mask.
        image_attention: The mask it runs under.
        own_image_attention: The one it was trained with.
    """

    def __init__(
        self,
        model,
        family: Family,
        image_processors: Sequence,
        prefix_ids: list[int],
        image_attention: str,
        image_resize: str = "squash",
        row_end_id: int | None = None,
    ):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.family, self.image_processors = family, image_processors
        self.image_attention, self.own_image_attention = image_attention, own_image_attention(model.config)
        self.grid = family.grid(model.config)
        image_px, colour = family.image_px(model.config), [int(255 * x) for x in image_processors[0].image_mean]
        self.geometry = Geometry(self.grid, image_px, family.covered_px(model.config), image_resize, tuple(colour))
        self.sites = site_names(len(self._decoder.layers))
        width = model.config.get_text_config().hidden_size
        self.widths = dict.fromkeys(self.sites, width) | {ENCODER: family.encoder_width(model.config)}
        ids = prefix_ids + _image_ids(self.grid, model.config.image_token_id, row_end_id)
        self.register_buffer("prefix_ids", torch.tensor([prefix_ids], dtype=torch.long), persistent=False)
        self.register_buffer("ids", torch.tensor([ids]), persistent=False)
        self.register_buffer("is_image", self.ids[0] == model.config.image_token_id, persistent=False)
        self._prefix_kv: list[tuple[Tensor, Tensor]] | None = None
        # Asked once: on a GPU the answer would have to be waited for in each forward. And a mask that the decoder
        # cannot be given is an error here and not in the first forward.
        self._prefix_is_shared = self._shares_prefix(self._masks(1))

    @property
    def _decoder(self) -> nn.Module:
        return self.family.decoder_of(self.model)

    @property
    def device(self) -> torch.device:
        return self.prefix_ids.device

    def train(self, mode: bool = True) -> "FrozenMLLM":
        return super().train(False)  # a frozen model stays in eval mode whatever its owner does

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pixels f[B, 3, H, W]; each image fills the encoder's square as a whole, nothing is cropped.

        Three channels more for each further normalisation that the family wants.
        """
        squares = [self.geometry.place(image) for image in images]
        pixels = [processor(squares, return_tensors="pt")["pixel_values"] for processor in self.image_processors]
        return torch.cat(pixels, dim=1)

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
            f[B, T, d] by site, image tokens only, in raster order.

        Raises:
            UserError: An unknown site, or a knockout that does not fit the model.
        """
        wanted = self.known_sites(sites)
        if not wanted:
            return {}
        depth = max(self.sites.index(site) - 1 for site in wanted)
        pixels = pixels.to(self.device, self.model.dtype)
        masks = self._masks(len(pixels), knockout)
        start = self.prefix_ids.shape[1] if self._prefix_is_shared else 0
        cache = self._prefix_cache(len(pixels)) if start and depth > 0 else None
        rows = last_rows(masks, self.ids.shape[1] - start)
        layers = self._decoder.layers
        cut = knockout.applied(layers, rows, self.is_image, depth) if knockout and depth > 0 else nullcontext()
        with self._under(rows), cut, self._captured(wanted, len(pixels), start) as states, suppress(_StopForward):
            self.model.model(
                input_ids=self.ids[:, start:].expand(len(pixels), -1),
                past_key_values=cache,
                use_cache=cache is not None,
                **self.family.inputs(self.model, pixels, self.is_image[start:].expand(len(pixels), -1)),
            )
        if missing := [site for site in wanted if site not in states]:
            raise UserError(f"no states of {missing[0]}: the forward does not pass the module that its family names")
        return {site: states[site] for site in wanted}

    def known_sites(self, sites: Sequence[str] | None) -> list[str]:
        """`sites`, or all of them for None.

        Raises:
            UserError: The model has no such site.
        """
        unknown = set(sites or ()) - set(self.sites)
        if unknown:
            raise UserError(f"unknown site {min(unknown)!r}; this model has {', '.join(self.sites)}")
        return list(self.sites if sites is None else sites)

    def _masks(self, batch: int, knockout: Knockout | None = None) -> Masks | None:
        """bool[B, 1, N, N]: what prefix and image attend to; None leaves it to a model that can only run as it is."""
        text_config = self.model.config.get_text_config()
        as_it_is = self.image_attention == self.own_image_attention and knockout is None
        if as_it_is and not supports_masks(text_config):
            return None
        return build_masks(self.image_attention, text_config, self.is_image.expand(batch, -1), self.model.dtype)

    def _shares_prefix(self, masks: Masks | None) -> bool:
        """Whether the prefix is the same for all images: it must not see them."""
        prefix = self.prefix_ids.shape[1]
        if masks is None or not self.family.shared_prefix:
            return False
        return not any(mask[:, :, :prefix, prefix:].any() for mask in each(masks))

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
    def _under(self, masks: Masks | None) -> Iterator[None]:
        """The decoder runs under these masks, if any, whatever it is called with."""
        if masks is None:
            yield
            return
        handle = self._decoder.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "attention_mask": masks}), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _captured(self, wanted: list[str], batch: int, start: int) -> Iterator[dict[str, Tensor]]:
        """Collects states at the wanted sites while open, and ends the forward behind the last one of them."""
        states: dict[str, Tensor] = {}
        last = max(wanted, key=self.sites.index)
        rows = self.is_image[start:]

        def keep(site: str, state: Tensor) -> None:
            states[site] = state
            if site == last:
                raise _StopForward

        def entering(_, args) -> None:
            keep(ENCODER, self._encoder_states(args, batch))

        def embedded(_, args, kwargs) -> None:
            keep(ADAPTER, (args[0] if args else kwargs["hidden_states"])[:, rows])

        def after(site: str):
            return lambda _, args, output: keep(site, (output[0] if isinstance(output, tuple) else output)[:, rows])

        layers = self._decoder.layers
        handles = [
            self.family.entry_of(self.model).register_forward_pre_hook(entering),
            layers[0].register_forward_pre_hook(embedded, with_kwargs=True),
        ]
        modules = dict(zip(self.sites[2:], [*layers, self._decoder.norm], strict=True))
        handles += [modules[site].register_forward_hook(after(site)) for site in wanted if site in modules]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def _encoder_states(self, args: tuple, batch: int) -> Tensor:
        """What enters the adapter, f[B, T, d]."""
        states, width = self.family.encoder_states(self.model, args), self.widths[ENCODER]
        tokens = self.grid[0] * self.grid[1]
        if states.numel() != batch * tokens * width:
            raise UserError(
                f"the encoder gives {states.numel() / (batch * width):g} tokens an image, {width} wide, where the grid "
                f"{self.grid} has {tokens}: were tokens dropped from an encoder without a CLS token, or not dropped "
                "from one with? Or has the family's entry another token_px or encoder_width than the model?"
            )
        return states.reshape(batch, tokens, width)


def _image_ids(grid: tuple[int, int], image_id: int, row_end_id: int | None) -> list[int]:
    """The image in the LLM's sequence, up to its last token."""
    row_end = [] if row_end_id is None else [row_end_id]
    ids = ([image_id] * grid[1] + row_end) * grid[0]
    return ids[: len(ids) - len(row_end)]


def load(
    path: str,
    image_attention: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    *,
    image_resize: str = "squash",
    prefix: str | None = None,
    untrained: Sequence[str] = (),
    seed: int = 0,
) -> FrozenMLLM:
    """Loads a checkpoint, frozen and in eval mode.

    Args:
        path: Directory or hub id, one of ours or of a registered family (probes/families).
        image_attention: Runs it under another mask than it was trained with; None keeps its own.
        dtype: Of the weights, "bfloat16" as well as torch.bfloat16; None or "auto" keeps the checkpoint's.
        device: None takes the GPU if there is one.
        image_resize: How images become squares: "squash" (resized) or "pad" (LLaVA's own), see probes/ops/geometry.py.
        prefix: Text before the image; None takes the checkpoint's chat template up to the image.
        untrained: Parts ("adapter", "llm") whose weights are drawn anew: the controls that show what the architecture
            does without training.
        seed: Of those draws.

    Raises:
        UserError: Not a checkpoint of a registered family, a damaged one, or an unknown mask or part.
    """
    config = read_config(path)
    family = family_of(config)
    check_numbers(path, family, config)
    attention = image_attention or own_image_attention(config)
    check_name(attention)
    model = load_weights("MLLM", family.loader, path, config, dtype=dtype or "auto", attn_implementation="sdpa")
    reinitialize(model, family, untrained, seed)
    mllm = FrozenMLLM(
        model,
        family,
        image_processors(path, family),
        prefix_ids(path, family, prefix),
        attention,
        image_resize,
        row_end_id(path, family),
    )
    return mllm.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
