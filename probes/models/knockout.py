"""Attention knockout (paper, Eq. 1), among image tokens or between any parts of the prompt.

A(t <- s) = -inf for all image tokens t and all s in B_c: no image token may attend to a blocked token; blocked tokens
still attend to all others. The pairs are removed from the mask of the model; padding, causality and text rows remain.
Beyond the paper, a knockout can be limited to layers, can differ between the rows of a batch, and can be about other
rows and columns of the mask than image tokens. These have names::

    prefix    text before the image
    image     image tokens
    blocked   those of the image tokens that `blocked` names
    question  text after the image, the template's words included, without its last token
    last      last token before the answer, which predicts the answer's first token
    answer    tokens of the answer that predict further ones

At the site "encoder" a knockout is inside the vision encoder instead (encoder_cut.py).

Shapes: B batch, T image tokens, N tokens, the last Q of them as queries, L layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral

import torch
from torch import Tensor, nn

from llava_bidir.common.errors import UserError

from .attention_masks import Masks, as_list, is_allowed, mask_values
from .hooks import with_arguments
from .sites import ENCODER

IMAGE = "image"
BLOCKED = "blocked"
PREFIX = "prefix"
ANSWER = "answer"
TEXT_SETS = ("question", "last", ANSWER)  # after the image
TOKEN_SETS = (PREFIX, IMAGE, BLOCKED, *TEXT_SETS)


@dataclass(frozen=True)
class Knockout:
    """Blocked attention: no token of `rows` attends to a token of `columns`.

    Args:
        blocked: bool[B, T] or on the grid bool[B, h, w], image tokens that no image token may attend to (B_c of Eq. 1);
            `geometry.patches(mask) > 0.5` are those of a mask of pixels. None if neither `rows` nor `columns` names
            "blocked".
        layers: Decoder layers to cut, numbered 1..L as in the site names; or bool[B, L], layers per row of the batch.
            None cuts all layers, as the paper does.
        rows: Tokens that do not attend, as the name of a set of tokens (see above) or several names.
        columns: Tokens that they do not attend to, in the same way.
        site: "encoder" cuts inside the vision encoder, where no patch attends to another one that is blocked: to any
            other one, if `blocked` is None. `layers` are then the encoder's. None cuts the layers of the model.
        keep_extra: At the site "encoder", whether patches still attend to CLS and registers, which attend to all.

    Raises:
        UserError: A name is unknown, `blocked` is given without being named, or an argument is of the other site.
    """

    blocked: Tensor | None = None
    layers: Sequence[int] | Tensor | None = None
    rows: str | Sequence[str] = IMAGE
    columns: str | Sequence[str] = BLOCKED
    site: str | None = None
    keep_extra: bool = True

    def __post_init__(self):
        if self.site not in (None, ENCODER):
            raise UserError(f"site of a knockout is {self.site!r}; expected {ENCODER!r} or None")
        if self.in_encoder and (self.names("rows"), self.names("columns")) != (
            (IMAGE,),
            (BLOCKED,),
        ):
            raise UserError(
                "a knockout in the encoder is among patches; leave out rows and columns"
            )
        if not self.in_encoder and not self.keep_extra:
            raise UserError("keep_extra is about CLS and registers; it needs site='encoder'")
        for axis in ("rows", "columns"):
            names = self.names(axis)
            if not names or not set(names) <= set(TOKEN_SETS):
                raise UserError(
                    f"{axis} of a knockout are {getattr(self, axis)!r}; expected one or several of "
                    f"{', '.join(TOKEN_SETS)}"
                )
        if self.blocked is not None and not self.uses_blocked:
            raise UserError(
                "a knockout has blocked tokens, but neither rows nor columns name them; expected 'blocked' there"
            )

    @property
    def in_encoder(self) -> bool:
        """Whether it cuts the vision encoder, by its site."""
        return self.site == ENCODER

    def names(self, axis: str) -> tuple[str, ...]:
        """Return the names of the sets of "rows" or "columns"."""
        given = getattr(self, axis)
        if isinstance(given, str):
            return (given,)
        return tuple(given)

    @property
    def uses_blocked(self) -> bool:
        """Whether rows or columns are about the blocked tokens."""
        return BLOCKED in (*self.names("rows"), *self.names("columns"))

    def cut(
        self, mask: Tensor, is_image: Tensor, text: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the mask without the pairs of rows and columns.

        With tokens p (prefix) and i (image), the second image token blocked, under a causal mask::

            i  1 1 0 0        i  1 1 0 0
            i  1 1 1 0   ->   i  1 1 0 0
            i  1 1 1 1        i  1 1 0 1

        Args:
            mask: bool[B, 1, Q, N], True = may attend, or what eager attention adds to the scores. Of Eq. 1, its rows
                include all image tokens.
            is_image: bool[N].
            text: bool[N] by name of a set after the image; None where no text after the image runs.

        Raises:
            UserError: `blocked` does not fit the mask, a set does not exist, or a row would have no keys (a softmax
                over nothing attends to all tokens, also later ones, or is NaN).
        """
        tokens = partial(self._tokens, batch=len(mask), is_image=is_image, text=text)
        before = len(is_image) - mask.shape[-2]  # tokens before the queries
        rows = tokens("rows").to(mask.device)[:, before:]
        columns = tokens("columns").to(mask.device)
        _, forbidden = mask_values(mask.dtype)
        cut = mask.masked_fill((rows[:, :, None] & columns[:, None])[:, None], forbidden)
        is_blind = rows & ~is_allowed(cut[:, 0]).any(-1)
        if is_blind.any():
            image, token = is_blind.nonzero()[0].tolist()
            place = f"token {before + token}"
            if is_image[before + token]:
                place = f"image token {int(is_image[: before + token].sum())}"
            raise UserError(
                f"blocking {int(columns[image].sum())} tokens leaves {place} of image {image} in the "
                "batch without any token to attend to; use a prefix before the image or block fewer tokens"
            )
        return cut

    def _tokens(
        self, axis: str, batch: int, is_image: Tensor, text: Mapping[str, Tensor] | None
    ) -> Tensor:
        """Return the tokens of rows or columns, bool[B, N]."""
        tokens = torch.zeros(batch, len(is_image), dtype=torch.bool, device=is_image.device)
        for name in self.names(axis):
            if name == IMAGE:
                tokens |= is_image
            elif name == PREFIX:
                tokens |= is_image.cumsum(0) == 0
            elif name == BLOCKED:
                blocked = self.check_blocked(batch, int(is_image.sum()))
                tokens[:, is_image] |= blocked.to(tokens.device)
            elif text is None:
                raise UserError(
                    f"{axis} of the knockout are the {name}, but no text after the image runs here; ask the model "
                    "(answer, answer_log_probs, answer_attention)"
                )
            else:
                tokens |= text[name].to(tokens.device)
        return tokens

    def check_blocked(self, batch: int, tokens: int) -> Tensor:
        """Return the blocked tokens bool[B, T]; raise a UserError if these are no such tensor, or none is blocked."""
        given = self.blocked
        if isinstance(given, Tensor) and given.ndim == 3:
            given = given.flatten(1)
        fits = isinstance(given, Tensor) and given.shape == (batch, tokens)
        if not fits or given.dtype != torch.bool:
            if isinstance(given, Tensor):
                got = f"{given.dtype} {list(given.shape)}"
            else:
                got = f"{type(given)}, no tensor"
            raise UserError(
                f"blocked must be bool[{batch}, {tokens}] (images, image tokens); got {got}"
            )
        if not given.any():
            raise UserError(
                "blocked has no token, so that the knockout changes nothing; leave it out"
            )
        return given

    def select_layers(self, layers: nn.ModuleList, batch: int = 1) -> Tensor:
        """Return the layers that each row of the batch cuts, bool[B, L].

        `batch` is their number where no tensor says it.

        Raises:
            UserError: A layer is out of range.
        """
        if self.blocked is not None:
            batch = len(self.blocked)
        return _select_layers(self.layers, batch, len(layers))

    @contextmanager
    def apply(
        self,
        layers: nn.ModuleList,
        masks: Masks,
        is_image: Tensor,
        depth: int,
        text: Mapping[str, Tensor] | None = None,
        effect: Tensor | None = None,
    ) -> Iterator[None]:
        """Replace the mask of the chosen decoder layers by the cut one while the context is open.

        `masks` [B, 1, Q, N] are those that the model runs with; `depth` layers run before the forward stops. `text` are
        the tokens of the sets after the image. A caller that runs the answer in later forwards passes `effect` bool[B],
        which becomes True where a pair was cut, and checks it itself.

        Raises:
            UserError: A layer is out of range, or the knockout changes no allowed pair.
            RuntimeError: A chosen layer ran with another mask, so that the knockout would have no effect.
        """
        masks = as_list(masks)
        replaced = []
        chosen = _select_layers(self.layers, len(masks[0]), len(layers))
        in_all_rows = chosen.all(0).tolist()
        on_device = chosen.to(masks[0].device)
        cuts = [(mask, self.cut(mask, is_image, text)) for mask in masks]
        changes = [(cut != mask).flatten(1).any(1) for mask, cut in cuts]  # bool[B] each
        changed = torch.zeros_like(changes[0])
        if effect is not None:
            changed = effect

        def replace(layer: int, arguments: dict) -> dict:
            given = arguments.get("attention_mask")
            rows = on_device[:, layer - 1, None, None, None]
            for (mask, cut), change in zip(cuts, changes, strict=True):
                if given is mask or _is_copy(given, mask):
                    replaced.append(layer)
                    changed.logical_or_(change & on_device[:, layer - 1])
                    new = cut if in_all_rows[layer - 1] else torch.where(rows, cut, mask)
                    return {"attention_mask": new.to(given.device)}
            raise RuntimeError(f"layer {layer} runs with another mask than the one to cut: {given}")

        cut_layers = (chosen.any(0).nonzero().flatten() + 1).tolist()
        with ExitStack() as stack:
            for layer in cut_layers:
                attention = layers[layer - 1].self_attn
                stack.enter_context(with_arguments(attention, partial(replace, layer)))
            yield
        if missed := {layer for layer in cut_layers if layer <= depth} - set(replaced):
            raise RuntimeError(f"the knockout did not reach layers {sorted(missed)}")
        if effect is None:
            self.check_effect(changed, on_device[:, :depth].any(1))

    def check_effect(self, changed: Tensor, is_cut: Tensor) -> None:
        """Raise a UserError if a row of the batch that is cut in some layer keeps all its pairs, both bool[B].

        Eq. 1 may block no token of some images.
        """
        if self.names("rows") == (IMAGE,) and self.names("columns") == (BLOCKED,):
            return
        unchanged = (is_cut & ~changed).nonzero().flatten().tolist()
        if unchanged:
            rows = " and ".join(self.names("rows"))
            columns = " and ".join(self.names("columns"))
            raise UserError(
                f"the knockout changes nothing in row {unchanged[0]} of the batch: under this mask, no token of {rows} "
                f"attends to one of {columns}; name columns that are in the prompt and that the rows may attend to"
            )


def knockout_of(blocked: Tensor, layers: Sequence[int] | Tensor | None) -> Knockout | None:
    """Return the knockout of tokens; None if there are none, whose knockout would be an error."""
    if not blocked.any():
        return None
    return Knockout(blocked, layers)


def _is_copy(given: Tensor | None, mask: Tensor) -> bool:
    """Return True if `given` is the mask on another device; a device map copies the inputs of layers."""
    return (
        isinstance(given, Tensor)
        and given.device != mask.device
        and torch.equal(given.to(mask.device), mask)
    )


def _select_layers(chosen: Sequence[int] | Tensor | None, rows: int, count: int) -> Tensor:
    """Return the chosen layers, numbered 1..count, per row of the batch, bool[rows, count]."""
    if isinstance(chosen, Tensor):
        if chosen.dtype != torch.bool or chosen.shape != (rows, count):
            raise UserError(
                f"layers must be bool[{rows}, {count}] (images, layers), got {chosen.dtype} {list(chosen.shape)}"
            )
        return chosen
    layers = range(1, count + 1)
    if chosen is None:
        chosen = layers
    if not len(chosen):
        raise UserError("layers of a knockout are none, so that it changes nothing; leave it out")
    for number in chosen:
        is_number = isinstance(number, Integral) and not isinstance(number, bool)
        if not is_number or not 1 <= number <= count:
            raise UserError(
                f"knockout layer {number!r} is out of range; this model has layers 1..{count}"
            )
    return torch.tensor([number in chosen for number in layers]).expand(rows, count)
