"""A frozen model with patches: what MLLMs and bare vision encoders have in common.

Shapes: B images, T patches or image tokens, d width of a site, L layers, A heads.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from llava_bidir.common.errors import UserError
from llava_bidir.common.images import PhotoLike, read_photos
from probes.ops.geometry import ResizeRule

from .attention_weights import read_attention
from .families import own_image_attention
from .families.chosen_sites import all_sites, chosen_sites, encoder_sites
from .families.encoders import AnyFamily
from .families.layer_parts import part_width
from .features import similarity
from .knockout import Knockout
from .pixels import geometry_of
from .reading import Hooks, describe_shape, read_states
from .sites import layer_around, layer_number, layer_site, part_of


class FrozenModel(nn.Module):
    """A model in eval mode without gradients, created by :func:`probes.load`.

    Attributes:
        has_llm: True for an MLLM, which has an adapter, a prompt and answers; False for a bare vision encoder.
        sites: Names of the sites in forward order; without the encoder's own layers in an MLLM, and without parts
            of layers, which are read by name.
        layers: The layers, whose inputs and outputs are `layer_sites`.
        widths: d per site, also of those that are read by name.
        grid: Rows and columns of patches, the same at all sites; `image_tokens`, T, is their product.
        geometry: How images become squares, and the position of the grid on an image and its mask.
        image_attention, own_image_attention: Mask among patches that the model runs with, and the one of its training.
        image_positions: i64[T] of the patches among the tokens that the layers run on.
        revision: Commit hash of a checkpoint from the hub; None for a local directory.
        update_scales: Factor of each layer's update, of a random model that is matched to the trained one; else None.
        cut: Where patches see only themselves in every forward (encoder_cut.py); None for nowhere.
        rows_share_encoder: True if rows of an image differ in the states and masks of the layers only.
    """

    layers: nn.ModuleList
    layer_sites: list[str]
    is_image: Tensor
    image_positions: Tensor
    rows_share_encoder = False
    cut: str | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        family: AnyFamily,
        image_processors: Sequence,
        image_attention: str,
        resize_rule: ResizeRule,
    ):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.family = family
        self.has_llm = family.has_llm
        self.image_processors = image_processors
        self.revision: str | None = None
        self.update_scales: list[float] | None = None
        self.image_attention = image_attention
        self.own_image_attention = own_image_attention(model.config)
        self.grid = family.grid(model.config)
        self.image_tokens = self.grid[0] * self.grid[1]
        self.sites = family.sites(model.config)
        self.widths = LazyWidths(family.widths(model.config), self._part_width)
        self.geometry = geometry_of(family, model.config, image_processors, resize_rule)
        self.eval()

    def state_bytes(self, sites: Iterable[str]) -> int:
        """Return the memory of the states of an image at some sites, in bytes."""
        channels = sum(self.widths[site] for site in sites)
        return self.image_tokens * channels * self.model.dtype.itemsize

    def __repr__(self) -> str:
        rows, columns = self.grid
        side = self.geometry.image_px
        lines = [
            f"{type(self).__name__} of {self.model.config.model_type}, {self.model.dtype} on {self.device}",
            f"  sites: {', '.join(self.sites[:3])}, ..., {self.sites[-1]} ({len(self.sites)})",
            f"  grid: {rows} x {columns} = {self.image_tokens} tokens of a {side} px square",
            f"  images become squares by: {self.geometry.rule.describe(side)}",
        ]
        if self.has_llm:
            trained_with = self.own_image_attention
            lines.append(f"  image attention: {self.image_attention} (trained with {trained_with})")
        return "\n".join(lines)

    @property
    def device(self) -> torch.device:
        """Device of the inputs and of the returned states."""
        return self.image_positions.device

    def train(self, mode: bool = True) -> "FrozenModel":
        """Keep eval mode: a frozen model never trains, even if the module that contains it does."""
        return super().train(False)

    def preprocess(self, images: PhotoLike | Sequence[PhotoLike]) -> Tensor:
        """Return the pixels f[B, 3, H, W] of images, resized by `geometry`; 3 channels for each normalisation.

        Of an image that is read in windows, each is an entry of its own, row by row.

        Args:
            images: Path or PIL image, or a list of these. Photos are turned as their EXIF tag says; those of a data
                set have none (common/images.py).

        Raises:
            UserError: There is no image, or one cannot be read.
        """
        squares = [
            square for image in read_photos(images) for square in self.geometry.squares(image)
        ]
        return self.normalise(squares)

    def normalise(self, squares: Sequence[Image.Image]) -> Tensor:
        """Return the pixels f[B, 3, H, W] of squares as they are; what one lacks of the model's square is 0.

        An image smaller than a window is padded at the right and the bottom, a window on all sides.
        """
        side = self.geometry.image_px
        before = (side - self.geometry.window_px) // 2
        normal = [processor([*squares])["pixel_values"] for processor in self.image_processors]
        pixels = []
        for of_square in zip(*normal, strict=True):
            square = torch.from_numpy(np.concatenate(of_square))
            after = [side - before - length for length in square.shape[1:]]
            pixels.append(pad(square, (before, after[1], before, after[0])))
        return torch.stack(pixels)

    def to_grid(self, states: Tensor) -> Tensor:
        """Reshape values per image token, f[..., T, d], to the token grid, f[..., h, w, d]."""
        return states.unflatten(-2, self.grid)

    def similarity(self, states: Mapping[str, Tensor], patch: tuple[int, int]) -> dict[str, Tensor]:
        """Return the cosine of each patch of the first image with patch (row, column), f32[h, w] by site."""
        index = patch[0] * self.grid[1] + patch[1]
        return {site: similarity(x[0], index).view(self.grid) for site, x in states.items()}

    @torch.no_grad()
    def states(
        self,
        pixels: Tensor,
        sites: Sequence[str] | None = None,
        knockout: Knockout | None = None,
        rows: Sequence[int] | None = None,
        hooks: Hooks | None = None,
    ) -> dict[str, Tensor]:
        """Return the hidden states of the image tokens at each site. Calling the model does the same.

        Args:
            pixels: f[B, 3, H, W] from :meth:`preprocess`.
            sites: Sites to return, None for `sites` of the model. The forward stops after the last of them.
            knockout: Attention knockout, of Eq. 1 or, in an MLLM, between other parts of prefix and image.
            rows: Image of each row of the knockout, or of what the hooks receive, to run several on one image; an MLLM
                encodes each image once if it can.
            hooks: Functions by site, one of `layer_sites`, that receive the states f[B, T, d] and return what the
                forward continues with, to patch or steer them.

        Returns:
            f[B, T, d] per site, image tokens in raster order, in the dtype of the model; f[R, T, d] for R `rows`.

        Raises:
            UserError: A site is unknown, the knockout or a hook's states do not fit the model, or states are NaN or
                infinite.
        """
        wanted = self.check_sites(sites)
        if not wanted:
            return {}
        return read_states(
            self, pixels=pixels, sites=wanted, knockout=knockout, rows=rows, hooks=hooks or {}
        )

    forward = states

    def run(self, pixels: Tensor) -> None:
        """Run the model's own forward on pixels f[B, 3, H, W], and text before the image if it has any."""
        raise NotImplementedError

    def masked(
        self, knockout: Knockout | None, rows: int, last: str
    ) -> AbstractContextManager[None]:
        """Run the layers under the model's masks, cut by a knockout of some rows, up to the last site."""
        raise NotImplementedError

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last layer."""
        return self.family.norm_of(self.model)

    def check_hooks(self, sites: Iterable[str]) -> None:
        """Raise a UserError if states cannot be replaced at one of these sites."""
        if unknown := [site for site in sites if site not in self.layer_sites]:
            raise UserError(f"hook at {unknown[0]!r}: expected {' or '.join(self.layer_sites)}")

    def attention(
        self,
        pixels: Tensor,
        sites: Sequence[str] | None = None,
        knockout: Knockout | None = None,
        hooks: Hooks | None = None,
        average_heads: bool = True,
    ) -> dict[str, Tensor]:
        """Return the attention weights among image tokens in each layer.

        Args:
            pixels: f[B, 3, H, W] from :meth:`preprocess`.
            sites: Layers such as "layer_01"; None for all.
            knockout: Attention knockout, as in :meth:`states`.
            hooks: Functions by site that replace the states of the image tokens, as in :meth:`states`.
            average_heads: If False, return the weights of each head.

        Returns:
            f[B, T, T] per layer, or f[B, A, T, T] by head, from a token (row) to each one (column): float32, on the
            CPU. A row sums to 1 minus the attention to tokens outside of the image.

        Raises:
            UserError: A site is not a layer, or the model does not attend through transformers' sdpa interface.
        """
        sites = self._check_layers(sites)
        every_token = torch.ones(self.image_tokens, dtype=torch.bool)
        queries = [(image, every_token) for image in range(len(pixels))]
        weights = read_attention(
            self,
            pixels=pixels,
            sites=sites,
            queries=queries,
            knockout=knockout,
            hooks=hooks,
            average_heads=average_heads,
        )
        return {site: torch.stack([of_image[site] for of_image in weights]) for site in sites}

    def check_pixels(self, pixels: Tensor) -> None:
        """Raise a UserError unless pixels are f[B, 3, H, W] as :meth:`preprocess` returns them."""
        expected = (3 * len(self.image_processors), self.geometry.image_px, self.geometry.image_px)
        if not isinstance(pixels, Tensor) or pixels.shape[1:] != expected or len(pixels) == 0:
            raise UserError(
                f"pixels must be a tensor f[images, {', '.join(map(str, expected))}], got {describe_shape(pixels)}"
            )

    @property
    def encoder_sites(self) -> list[str]:
        """Names of the encoder's own layers in an MLLM, before `sites`; a UserError says why they cannot be read."""
        return encoder_sites(self.family, self.model.config)

    @cached_property
    def all_sites(self) -> list[str]:
        """Names of all sites in forward order; without those that cannot be read."""
        return all_sites(self.family, self.model.config)

    def check_sites(self, sites: str | Sequence[str] | None) -> list[str]:
        """Return `sites` as a list: `self.sites` for None, also `encoder_sites` for "all", `all_sites` for "all_parts".

        Raises:
            UserError: A site is unknown or cannot be read; see families/chosen_sites.py.
        """
        return chosen_sites(self.family, self.model.config, sites)

    def _part_width(self, site: str) -> int:
        """Return the width of a part of a layer."""
        if part_of(site) is None or site not in self.all_sites:
            raise KeyError(site)
        width = self.widths[layer_around(site)]
        return part_width(self.layers[layer_number(site) - 1], site, width)

    def _check_layers(self, sites: Sequence[str] | None) -> list[str]:
        """Return sites that attend as a list, or all of them for None; raise a UserError if one does not."""
        layers = [layer_site(i) for i in range(1, len(self.layers) + 1)]
        if sites is None:
            return layers
        if not sites or set(sites) - {*layers}:
            got = ", ".join(map(repr, sites)) or "none"
            raise UserError(
                f"attention is that of layers; expected sites from {layers[0]} to {layers[-1]}, or None for all, got "
                f"{got}"
            )
        return list(sites)


class LazyWidths(dict[str, int]):
    """Widths by site; those of parts are computed when they are asked for."""

    def __init__(self, widths: Mapping[str, int], compute: Callable[[str], int]):
        super().__init__(widths)
        self._compute = compute

    def __missing__(self, site: str) -> int:
        return self._compute(site)
