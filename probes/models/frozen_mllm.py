"""A frozen MLLM: the hidden states of its image tokens at every site, its attention weights and its answers.

Text after the image is dropped where states are read, since no mask lets image tokens attend to it.

Shapes: B images, T image tokens, P tokens before the image, N = P + T, d width of a site, L layers, A heads.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from functools import cached_property, partial
from inspect import signature
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import check_outputs
from llava_bidir.common.images import PhotoLike
from probes.ops.geometry import SQUASH, ResizeRule

from .answers import attend_from_answer, generate_answer, score_answers
from .attention_masks import (
    Masks,
    build_decoder_masks,
    check_masks,
    cut_image,
    decode_under,
    supports_masks,
)
from .encoder_cut import LLM_CUTS, cut_encoder
from .families import Family
from .families.encoder_layers import EncoderLayers, encoder_layers
from .families.our_code import LogitHead
from .frozen_model import FrozenModel
from .knockout import Knockout
from .measured_mask import MeasuredMask, measure_mask
from .prompts import Chat
from .reading import Hooks
from .sites import FINAL_NORM, is_before_adapter, is_in_llm_space, layer_around


class FrozenMLLM(FrozenModel):
    """A multimodal LLM in eval mode without gradients, created by :func:`probes.load`.

    Its sites are "encoder" (input of the adapter; if the adapter merges patches, the patches of a token concatenated),
    "adapter" (the paper's layer 0: input of the LLM at image positions), "layer_01" ... (outputs of the decoder layers
    before any norm) and "final_norm" (last layer after the norm: Hugging Face's ``hidden_states[-1]``). By name, or
    with "all", also the encoder's own layers, "encoder_00" ... (families/encoder_layers.py). By name, or with
    "all_parts", also the parts of layers, "value_01", "attn_01", "mlp_01" ... (families/layer_parts.py).
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
        read_chat: Callable[[], Chat] | None = None,
    ):
        super().__init__(model, family, image_processors, image_attention, resize_rule)
        self._read_chat = read_chat
        self.layer_sites = self.sites[1:-1]
        with suppress(UserError):  # whoever asks for these sites is told why there are none
            self.widths |= dict.fromkeys(self.encoder_sites, self.encoder_layers.width)
        self._image_ids = _image_ids(self.grid, model.config.image_token_id, separator_id)
        for name in ("prefix_ids", "ids", "is_image", "image_positions"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self.set_prefix(prefix_ids)
        self.attention_masks(1)  # raises a UserError if a layer does not support the mask

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

    def with_attention(self, image_attention: str) -> "FrozenMLLM":
        """Return a model with the same weights, not copied, under another mask among image tokens.

        Move neither of the two to another device afterwards: the weights of both would move, but not all inputs.

        Raises:
            UserError: The mask is unknown, or the model does not support it.
        """
        check_masks(image_attention, self.text_config, self.text_config._attn_implementation)
        other = copy(self)
        other._buffers = copy(self._buffers)  # its own prefix
        other.image_attention = image_attention
        other.attention_masks(1)  # raises a UserError if a layer does not support it
        return other

    @cached_property
    def encoder_layers(self) -> EncoderLayers:
        """How to read the encoder's own layers; a UserError says why they cannot be read."""
        return encoder_layers(self.family, self.model.config)

    @property
    def text_config(self) -> PreTrainedConfig:
        """Config of the LLM."""
        return self.model.config.get_text_config()

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the LLM."""
        return self.decoder.layers

    @property
    def decoder(self) -> nn.Module:
        """The LLM's decoder, with `layers` and `embed_tokens`."""
        return self.family.decoder_of(self.model)

    def check_hooks(self, sites: Iterable[str]) -> None:
        """Raise a UserError if one of these is no layer, or features of the image enter the LLM after it, too."""
        super().check_hooks(sites)
        count = self.family.incomplete_sites(self.model.config)
        if wrong := {*sites} & {*self.sites[1 : 1 + count]}:
            kind = self.model.config.model_type
            raise UserError(
                f"hook at {min(wrong)!r}: features of the image enter the LLM of {kind} after it, too, and would stay; "
                f"expected {self.sites[1 + count]} or a later layer"
            )

    @property
    def rows_share_encoder(self) -> bool:
        """True if layers receive the states of image tokens and a mask only."""
        return supports_masks(self.text_config) and self.family.rows_share_encoder

    def run(self, pixels: Tensor) -> None:
        """Run prefix and image."""
        images = len(pixels)
        inputs = self.family.inputs(self.model, pixels, self.is_image.expand(images, -1))
        self.model.model(input_ids=self.ids.expand(images, -1), use_cache=False, **inputs)

    @contextmanager
    def masked(self, knockout: Knockout | None, rows: int, last: str) -> Iterator[None]:
        """Run the layers under the model's masks, cut by a knockout of some rows, up to the last site."""
        masks = self.attention_masks(rows, knockout)
        depth = 0  # layers that run
        if not is_before_adapter(last):
            depth = min(self.sites.index(layer_around(last)) - 1, len(self.layers))
        with ExitStack() as stack:
            knockout = stack.enter_context(cut_encoder(self, knockout, rows))
            if knockout and depth:
                stack.enter_context(
                    knockout.apply(self.layers, masks=masks, is_image=self.is_image, depth=depth)
                )
            if masks is not None:
                stack.enter_context(decode_under(self.decoder, masks))
            yield

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
        if site != FINAL_NORM:
            states = self.final_norm(states)
        logits = head(states)
        check_outputs("logits", {site: logits})
        cap = getattr(self.text_config, "final_logit_softcapping", None)
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
        hooks: Hooks | None = None,
    ) -> str | list[str]:
        """Return the greedy answer to a question about an image, also under a knockout; see answers.py.

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
            generate_answer(
                self,
                pixels=pixels,
                question=question,
                knockout=knockout,
                max_new_tokens=max_new_tokens,
                on_token=on_token,
                hooks=hooks,
            )
            for pixels in images.split(1)
        ]
        if isinstance(image, str | Path | Image.Image):
            return answers[0]
        return answers

    def answer_attention(
        self,
        pixels: Tensor,
        question: str,
        answer: str,
        sites: Sequence[str] | None = None,
        knockout: Knockout | None = None,
        hooks: Hooks | None = None,
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
            self,
            pixels=pixels,
            question=question,
            answer=answer,
            sites=sites,
            knockout=knockout,
            hooks=hooks,
            average_heads=average_heads,
        )

    def answer_log_probs(
        self,
        pixels: Tensor,
        question: str,
        answers: Sequence[str],
        knockout: Knockout | None = None,
        hooks: Hooks | None = None,
    ) -> Tensor:
        """Return the log-probability of each answer to a question, f[B, A], on the CPU.

        One forward computes all of them, except in models with layers without masks (answers.py).

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
        return score_answers(
            self, pixels=pixels, question=question, answers=answers, knockout=knockout, hooks=hooks
        )

    def attention_masks(self, batch: int, knockout: Knockout | None = None) -> Masks | None:
        """Return the masks among prefix and image tokens, bool[B, 1, N, N] (True = may attend), before any knockout.

        A dict by kind of layer if there are several kinds. None if the model supports its own attention only; then a
        knockout raises a UserError.
        """
        if (
            self.image_attention == self.own_image_attention
            and self.cut not in LLM_CUTS
            and (knockout is None or knockout.in_encoder)
            and not supports_masks(self.text_config)
        ):
            return None
        return self.build_masks(self.is_image.expand(batch, -1))

    def build_masks(self, block: Tensor) -> Masks:
        """Return the masks [B, 1, N, N] of prefix, image and what follows, in whose block bool[B, N] the image is."""
        masks = build_decoder_masks(
            self.image_attention,
            text_config=self.text_config,
            is_image=block,
            dtype=self.model.dtype,
        )
        if self.cut not in LLM_CUTS:
            return masks
        if isinstance(masks, dict):
            return {kind: cut_image(mask, self.is_image) for kind, mask in masks.items()}
        return cut_image(masks, self.is_image)

    def measured_mask(self) -> MeasuredMask:
        """Measure which tokens attend to which in each layer, in the model's own code; see measured_mask.py.

        Print the result, or read its `directions()` and `disagreements()` with config and family. Load the model in
        float32 for this.
        """
        return measure_mask(self)

    def cached(self, cache: DynamicCache | None) -> dict[str, DynamicCache | None]:
        """Return the argument of a forward that passes a cache, which transformers renamed in 5.24."""
        if "cache" in signature(self.decoder.forward).parameters:
            return {"cache": cache}
        return {"past_key_values": cache}


def _image_ids(grid: tuple[int, int], image_id: int, separator_id: int | None) -> list[int]:
    """Return the token ids of the image up to its last image token."""
    rows, columns = grid
    row = [image_id] * columns
    if separator_id is None:
        return row * rows
    return [*row, separator_id] * (rows - 1) + row
