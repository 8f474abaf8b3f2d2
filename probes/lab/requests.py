"""Requests of the page as checked JSON: numbers and texts, but no paths, class paths or code.

A request names all that its answer depends on, and the server keeps no view. Two tabs cannot mix, and a link restores a
view.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llava_bidir.common.errors import UserError
from llava_bidir.common.images import MAX_GRID_SIDE

Index = Annotated[int, Field(ge=0, le=2**31)]
Number = Annotated[int, Field(ge=1, le=2**31)]
PhotoKey = Annotated[str, Field(pattern=r"^(split:(0|[1-9][0-9]{0,8})|upload:[0-9a-f]{64})$")]
Site = Annotated[str, Field(max_length=32)]
Patches = Annotated[tuple[Index, ...], Field(min_length=1, max_length=MAX_GRID_SIDE**2)]
# more than any LLM's layers
Numbers = Annotated[tuple[Number, ...], Field(min_length=1, max_length=1000)]
# far beyond VQA; the LLM's positions bound it, too
Text = Annotated[str, Field(min_length=1, max_length=4000)]
MAX_ANSWER_TOKENS = 64  # a paragraph; longer answers would block the queue


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Block(_Request):
    """An attention knockout of patches."""

    kind: Literal["block"]
    patches: Patches
    layers: Numbers | None = None


class Replace(_Request):
    """States of patches at a site, replaced by other ones.

    `by` is the mean over the image's patches, another photo, or the same weights under the other mask.
    """

    kind: Literal["replace"]
    patches: Patches
    site: Site
    by: PhotoKey | Literal["mean", "other_mask"]


class View(_Request):
    """A photo, read by a model, with or without an intervention."""

    photo: PhotoKey
    model: Index
    intervention: Annotated[Block | Replace, Field(discriminator="kind")] | None = None


class PatchView(View):
    """A patch of a view at all sites."""

    patch: Index


class SiteView(View):
    """A view at a site."""

    site: Site


class ShownViews(View):
    """All views that the page shows of a model: without and with the intervention, and a photo beside them."""

    beside: PhotoKey | None = None


class PhotoQuestion(View):
    """A question about the photo, asked with and without the intervention."""

    question: Text


class Attention(View):
    """Attention of a patch, and to it, in a layer."""

    patch: Index
    layer: Number


def parse_request(kind: type[View], body: bytes) -> View:
    """Return the request in a JSON body.

    Raises:
        UserError: The body is not JSON of this kind; the message names the key.
    """
    try:
        return kind.model_validate_json(body)
    except (ValidationError, ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise UserError(f"the request is not valid JSON: {error}") from None
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        raise UserError(f"{where}: {first['msg']}") from None
