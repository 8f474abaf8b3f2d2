"""A frozen MLLM: the hidden states of its image tokens at every site, its attention weights and its answers.

Text after the image is dropped where states are read, since no mask lets image tokens attend to it. Keys and values of
the prompt before the image are cached if the model allows it.

Shapes: B images, T image tokens, P tokens before the image, N = P + T, d width of a site, L layers, A heads.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from functools import cached_property, partial
from inspect import signature
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import check_outputs
from llava_bidir.common.images import PhotoLike
from probes.ops.geometry import SQUASH, ResizeRule

from .answering import attend_from_answer, generate_answer, score_answers
from .attention_masks import (
    Masks,
    as_list,
    build_decoder_masks,
    check_masks,
    is_allowed,
    supports_masks,
)
from .families import Family
from .families.encoder_layers import EncoderLayers, encoder_layers
from .families.our_code import LogitHead
from .frozen_model import FrozenModel
from .knockout import Knockout
from .measured_mask import MeasuredMask, measure_mask
from .prompt_and_pixels import Chat
from .read_states import read_states
from .shared_layers import DistinctRows
from .sites import FINAL_NORM, is_before_adapter, is_in_llm_space
from .steering import Replacement


class FrozenMLLM(FrozenModel):
    """A multimodal LLM in eval mode without gradients, created by :func:`probes.load`.

    Its sites are "encoder" (input of the adapter; if the adapter merges patches, the patches of a token concatenated),
    "adapter" (the paper's layer 0: input of the LLM at image positions), "layer_01" ... (outputs of the decoder layers
    before any norm) and "final_norm" (last layer after the norm: Hugging Face's ``hidden_states[-1]``). By name, or
    with "all", also the encoder's own layers, "encoder_00" ... (families/encoder_layers.py). By name, or with
    "all_parts", also the parts of layers, "value_01", "attn_01", "mlp_01" ... (families/layer_parts.py).

    Attributes:
        prefix_is_shared: True if the prompt before the image does not attend to it, and is cached.

    The cached prompt follows edits of the LLM's weights (in place, `load_state_dict`, `.to`). Call
    :meth:`clear_prefix_cache` after in-place edits of `parameter.data` and after adding or removing hooks on the LLM.
    """

    def __init__(
        self,
        model,
        family: Family,
        image_processors: Sequence,
        prefix_ids: list[int],
        image_attention: str,
        resize_rule: ResizeRule = SQUASH,
        separator_id: int | None = None,
        revision: str | None = None,
        read_chat: Callable[[], Chat] | None = None,
    ):
        super().__init__(model, family, image_processors, image_attention, resize_rule, revision)
        self._read_chat = read_chat
        self.layer_sites = self.sites[1:-1]
        with suppress(UserError):  # whoever asks for these sites is told why there are none
            self.widths |= dict.fromkeys(self.encoder_sites, self.encoder_layers.width)
        self._image_ids = _image_ids(self.grid, model.config.image_token_id, separator_id)
        for name in ("prefix_ids", "ids", "is_image", "image_positions"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self.set_prefix(prefix_ids)

    def set_prefix(self, prefix_ids: list[int]) -> None:
        """Replace the token ids before the image.

        Raises:
            UserError: The image's placeholder is one of them.
        """
        if self.model.config.image_token_id in prefix_ids:
            raise UserError(
                "the prefix contains the image's placeholder; give the text before the image only"
            )

        def new(ids):
            return torch.tensor([ids], dtype=torch.long, device=self.device)

        self.prefix_ids = new(prefix_ids)
        self.ids = new(prefix_ids + self._image_ids)
        self.is_image = self.ids[0] == self.model.config.image_token_id
        # i64[T]; with these, no forward waits for the device
        self.image_positions = self.is_image.nonzero().flatten()
        self._prefix_kv: list[tuple[Tensor, Tensor]] | None = None
        self._prefix_weights: tuple = ()  # the weights that it was computed with
        # Checked once, because reading the answer would synchronise a GPU in each forward.
        self.prefix_is_shared = self._shares_prefix(self.attention_masks(1))

    def with_attention(self, image_attention: str) -> "FrozenMLLM":
        """Return a model with the same weights, not copied, under another mask among image tokens.

        Move neither of the two to another device afterwards: the weights of both would move, but not all inputs.

        Raises:
            UserError: The mask is unknown, or the model does not support it.
        """
        text_config = self.model.config.get_text_config()
        check_masks(image_attention, text_config, text_config._attn_implementation)
        other = copy(self)
        other._buffers = copy(self._buffers)  # its own prefix
        other.image_attention = image_attention
        other.clear_prefix_cache()
        other.prefix_is_shared = other._shares_prefix(other.attention_masks(1))
        return other

    @cached_property
    def encoder_layers(self) -> EncoderLayers:
        """How to read the encoder's own layers; a UserError says why they cannot be read."""
        return encoder_layers(self.family, self.model.config)

    @property
    def encoder_sites(self) -> list[str]:
        """Names of the encoder's own layers in forward order; a UserError says why they cannot be read."""
        return self.encoder_layers.sites

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the LLM."""
        return self.decoder.layers

    @property
    def decoder(self) -> nn.Module:
        """The LLM's decoder, with `layers` and `embed_tokens`."""
        return self.family.decoder_of(self.model)

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last layer of the LLM."""
        return self.family.norm_of(self.model)

    def check_hooks(self, sites: Iterable[str]) -> None:
        """Raise a UserError if features of the image enter the LLM after one of these sites, too."""
        count = self.family.incomplete_sites(self.model.config)
        if wrong := {*sites} & {*self.sites[1 : 1 + count]}:
            kind = self.model.config.model_type
            raise UserError(
                f"hook at {min(wrong)!r}: features of the image enter the LLM of {kind} after it, too, and would stay; "
                f"expected {self.sites[1 + count]} or a later layer"
            )

    def clear_prefix_cache(self) -> None:
        """Drop the cached keys and values of the prompt; the next forward recomputes them."""
        self._prefix_kv = None

    def _apply(self, *args, **kwargs) -> "FrozenMLLM":
        self.clear_prefix_cache()
        return super()._apply(*args, **kwargs)

    @torch.no_grad()
    def states(
        self,
        pixels: Tensor,
        sites: Sequence[str] | None = None,
        knockout: Knockout | None = None,
        rows: Sequence[int] | None = None,
        hooks: Mapping[str, Replacement] | None = None,
        known: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the hidden states of the image tokens at each site. Calling the model does the same.

        Args:
            pixels: f[B, 3, H, W] from :meth:`preprocess`.
            sites: Sites to return, None for `mllm.sites`. The forward stops after the last of them.
            knockout: Attention knockout, of Eq. 1 or between other parts of prefix and image.
            rows: Image of each row of the knockout, or of what the hooks receive, to run several on one image. Under a
                knockout, rows of an image share the encoder and all layers up to the first that is cut differently
                (shared_layers.py).
            hooks: Functions by site, "adapter" or a layer, that receive the states f[B, T, d] and return what the
                forward continues with, to patch or steer them.
            known: What this method returned for the same pixels without knockout and hooks. The forward then starts at
                the first layer that they change if it runs on image tokens only (prefix cached, no separators). The
                pixels and the mask are compared, except for a plain dict of states. Not used for `rows` of a knockout.

        Returns:
            f[B, T, d] per site, image tokens in raster order, in the dtype of the model; f[R, T, d] for R `rows`.

        Raises:
            UserError: A site is unknown, the knockout, a hook's states or the known ones do not fit the model, or
                states are NaN or infinite.
        """
        wanted = self.check_sites(sites)
        return (
            read_states(self, pixels, wanted, knockout, rows, hooks or {}, known) if wanted else {}
        )

    forward = states

    @torch.no_grad()
    def logit_lens(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the logits of the LLM's output head at each site, for what :meth:`states` returns.

        Args:
            states: f[..., d] per site.

        Returns:
            f[..., V] per site from "adapter" on, V tokens of the vocabulary; those of the encoder have none.

        Raises:
            UserError: As :meth:`word_head`, all sites are the encoder's, or logits are NaN or infinite.
        """
        if not isinstance(states, Mapping):
            kind = type(states).__name__
            raise UserError(
                f"logit_lens takes states by site, as mllm.states returns them; got {kind}"
            )
        in_llm = [site for site in states if not is_before_adapter(site)]
        return {site: self.word_head(site)(states[site]) for site in in_llm or states}

    def word_head(self, site: str) -> Callable[[Tensor], Tensor]:
        """Return the function from states f[..., d] of a site to the logits f[..., V] of the LLM's output head.

        It applies the final norm first, except at "final_norm". Logits are those of the model's forward: soft-capped if
        it does so (Gemma), in our own models also scaled (Granite, Cohere).

        Raises:
            UserError: The site is unknown, or its states are not in the LLM's space (encoder, values).
        """
        self.check_sites([site])
        if not is_in_llm_space(site):
            raise UserError(
                f"states of {site!r} are not in the LLM's space; use a later site for the logit lens"
            )
        return partial(self._token_logits, site=site)

    def _token_logits(self, states: Tensor, site: str) -> Tensor:
        """Return the logits f[..., V] for the states f[..., d] of a site; see :meth:`word_head`."""
        if states.shape[-1] != self.widths[site]:
            raise UserError(
                f"states of {site} have {states.shape[-1]} channels; expected {self.widths[site]}"
            )
        head = self.model.get_output_embeddings()
        states = states.to(head.weight.device, self.model.dtype)
        logits = head(states if site == FINAL_NORM else self.final_norm(states))
        check_outputs("logits", {site: logits})
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        if cap is None or isinstance(head, LogitHead):  # which caps its logits itself
            return logits
        return cap * torch.tanh(logits / cap)

    @cached_property
    def chat(self) -> Chat:
        """Tokenizer and chat template of the checkpoint, read on first use."""
        return self._read_chat()

    def answer(
        self,
        image: PhotoLike | Sequence[PhotoLike],
        question: str,
        knockout: Knockout | None = None,
        max_new_tokens: int = 256,
        on_token: Callable[[str], None] | None = None,
        hooks: Mapping[str, Replacement] | None = None,
    ) -> str | list[str]:
        """Return the greedy answer to a question about an image, also under a knockout; see answering.py.

        Args:
            image: Path or PIL image. Of a list of these, each is asked about by itself.
            question: Question, the first of its conversation.
            knockout: Attention knockout, of one row; it holds for each image.
            max_new_tokens: Maximum tokens of an answer.
            on_token: Called after each token with the answer so far, to show it; an exception there ends the answer.
            hooks: Functions by site that replace the states of the image tokens, as in :meth:`states`.

        Returns:
            The answer; for a list of images, a list of their answers.

        Raises:
            UserError: There is no chat template, an image cannot be read, the question is too long, or the knockout or
                a hook does not fit the model.
        """
        images = self.preprocess(image)
        answers = [
            generate_answer(self, pixels, question, knockout, max_new_tokens, on_token, hooks)
            for pixels in images.split(1)
        ]
        return answers[0] if isinstance(image, str | Path | Image.Image) else answers

    def answer_attention(
        self,
        pixels: Tensor,
        question: str,
        answer: str,
        sites: Sequence[str] | None = None,
        knockout: Knockout | None = None,
        hooks: Mapping[str, Replacement] | None = None,
        average_heads: bool = True,
    ) -> dict[str, Tensor]:
        """Return the attention weights of an answer's tokens to the image tokens in each layer, from one forward.

        Those of an answer's token are the weights with which it is predicted, i.e. of the token before it.

        Args:
            pixels: f[B, 3, H, W] from :meth:`preprocess`.
            question: Question, the first of its conversation.
            answer: Its answer, n tokens (`chat.answer_ids`); the model need not have generated it.
            sites: Layers such as "layer_01"; None for all.
            knockout: Attention knockout, of Eq. 1 or between other parts of the prompt.
            hooks: Functions by site that replace the states of the image tokens, as in :meth:`states`.
            average_heads: If False, return the weights of each head.

        Returns:
            f[B, n, T] per layer, or f[B, A, n, T] by head: float32, on the CPU. A row sums to 1 minus the attention to
            text.

        Raises:
            UserError: As :meth:`answer`, or a text is empty, or a site is not a layer.
        """
        sites = self._check_layers(sites)
        return attend_from_answer(
            self, pixels, question, answer, sites, knockout, hooks, average_heads
        )

    def answer_log_probs(
        self,
        pixels: Tensor,
        question: str,
        answers: Sequence[str],
        knockout: Knockout | None = None,
        hooks: Mapping[str, Replacement] | None = None,
    ) -> Tensor:
        """Return the log-probability of each answer to a question, f[B, A], on the CPU.

        One forward computes all of them, except in models with layers without masks (answering.py).

        It is the sum over the answer's tokens without the end token, so that an answer which begins with another one
        is never the more probable of the two.

        Args:
            pixels: f[B, 3, H, W] from :meth:`preprocess`; one image can be in several rows, with other knockouts.
            question: Question, the first of its conversation.
            answers: A answers to it.
            knockout: Attention knockout, of Eq. 1 or between other parts of the prompt.
            hooks: Functions by site that replace the states of the image tokens, as in :meth:`states`.

        Raises:
            UserError: As :meth:`answer`, or a text is empty.
        """
        return score_answers(self, pixels, question, answers, knockout, hooks)

    def attention_masks(self, batch: int, knockout: Knockout | None = None) -> Masks | None:
        """Return the masks among prefix and image tokens, bool[B, 1, N, N] (True = may attend), before any knockout.

        A dict by kind of layer if there are several kinds. None if the model supports its own attention only; then a
        knockout raises a UserError.
        """
        text_config = self.model.config.get_text_config()
        if (
            self.image_attention == self.own_image_attention
            and knockout is None
            and not supports_masks(text_config)
        ):
            return None
        return build_decoder_masks(
            self.image_attention, text_config, self.is_image.expand(batch, -1), self.model.dtype
        )

    def measured_mask(self) -> MeasuredMask:
        """Measure which tokens attend to which in each layer, in the model's own code; see measured_mask.py.

        Print the result, or read its `directions()` and `disagreements()` with config and family. Load the model in
        float32 for this.
        """
        return measure_mask(self)

    def _shares_prefix(self, masks: Masks | None) -> bool:
        """Return True if the prefix does not attend to the image, and so is the same for all images."""
        prefix = self.prefix_ids.shape[1]
        if masks is None or not self.family.shared_prefix:
            return False
        return not any(is_allowed(mask)[:, :, :prefix, prefix:].any() for mask in as_list(masks))

    @torch.no_grad()
    def prefill_prefix(self) -> int:
        """Cache the prompt before the image if forwards share it; return how many tokens of it they do not run."""
        if not self.prefix_is_shared:
            return 0
        self.prefix_cache(1)
        return self.prefix_ids.shape[1]

    def cached(self, cache: DynamicCache | None) -> dict[str, DynamicCache | None]:
        """Return the argument of a forward that passes a cache, which transformers renamed in 5.24."""
        name = (
            "cache" if "cache" in signature(self.decoder.forward).parameters else "past_key_values"
        )
        return {name: cache}

    def prefix_cache(self, images: int, plan: Sequence[DistinctRows] | None = None) -> DynamicCache:
        """Return keys and values of the prefix, computed for one image and shared by the rows of each layer."""
        weights = self.weights_key()
        if self._prefix_kv is None or weights != self._prefix_weights:
            cache = DynamicCache()
            prefix = self.prefix_ids.shape[1]
            if prefix:
                masks = self.attention_masks(1)
                if isinstance(masks, dict):
                    masks = {kind: mask[:, :, :prefix, :prefix] for kind, mask in masks.items()}
                else:
                    masks = masks[:, :, :prefix, :prefix]
                self.decoder(
                    input_ids=self.prefix_ids,
                    attention_mask=masks,
                    use_cache=True,
                    **self.cached(cache),
                )
            self._prefix_kv = [(layer.keys, layer.values) for layer in cache.layers]
            self._prefix_weights = weights
        if plan is None:
            counts = [images] * len(self._prefix_kv)
        else:
            counts = [len(rows.first) for rows in plan]
        repeated = []
        for (keys, values), count in zip(self._prefix_kv, counts, strict=True):
            shape = (count, -1, -1, -1)
            repeated.append((keys.expand(shape), values.expand(shape)))
        return DynamicCache(ddp_cache_data=repeated)


def _image_ids(grid: tuple[int, int], image_id: int, separator_id: int | None) -> list[int]:
    """Return the token ids of the image up to its last image token."""
    separator = [] if separator_id is None else [separator_id]
    return ([image_id] * grid[1] + separator) * (grid[0] - 1) + [image_id] * grid[1]
