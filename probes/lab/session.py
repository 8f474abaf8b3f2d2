"""Operations of the lab: each takes a request and returns JSON, computed by the public API only.

Maps, words and pixel maps of a view come from one forward: its states are kept, and recomputed when they were dropped.

Shapes: S sites, T image tokens, K classes, k most probable ones, d width.
"""

import base64
from collections import OrderedDict
from typing import NotRequired, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_bidir.common.errors import UserError
from probes.analyses.sinks import relative_norms
from probes.models.features import pca_colours
from probes.models.knockout import Knockout
from probes.models.reading import Replacement
from probes.models.sites import layer_site

from .models import LabModel, ModelFacts, open_split
from .photos import Photos, encode_image
from .requests import (
    MAX_ANSWER_TOKENS,
    Attention,
    PatchView,
    PhotoQuestion,
    Replace,
    ShownViews,
    SiteView,
    View,
)
from .worker import Job

# per patch
TOP_CLASSES = 3
TOP_WORDS = 3
Words = list[tuple[str, float]]  # with their probabilities, the most probable first
STATE_BYTES = 1 << 30  # states kept: about six views of a 7B model at 16 bits


class LabFacts(TypedDict):
    """What the page is drawn from."""

    models: list[ModelFacts]
    grid: tuple[int, int]
    classes: list[str]
    palette: list[list[int]]
    images: int  # of the data set
    no_images: str  # why there are none


class Answers(TypedDict):
    """What the model answers."""

    answer: str
    blocked: NotRequired[str]  # under the intervention
    log_probability: NotRequired[list[float]]  # of the answer, without and under it


class Session:
    """Models and photos of a lab. Its operations run in one thread.

    Args:
        models: The models.
    """

    def __init__(self, models: list[LabModel]):
        self.models = models
        dataset, self.palette, self.no_split = open_split(models[0])
        self.photos = Photos([model.mllm.geometry for model in models], dataset)
        self._states: OrderedDict[View, dict[str, Tensor]] = OrderedDict()

    def describe(self) -> LabFacts:
        """Return the facts that the page is drawn from."""
        images = 0
        if self.photos.dataset is not None:
            images = len(self.photos.dataset)
        return {
            "models": [model.describe() for model in self.models],
            "grid": self.models[0].mllm.grid,
            "classes": self.models[0].classes,
            "palette": self.palette,
            "images": images,
            "no_images": self.no_split,
        }

    def check(self, request: View) -> None:
        """Raise a UserError if a request names a model, patch, layer or site that there is not."""
        if request.model >= len(self.models):
            raise UserError(
                f"there is no model {request.model}; the lab has 0..{len(self.models) - 1}"
            )
        model = self.models[request.model]
        tokens = model.mllm.image_tokens
        last = max(getattr(request, "patch", 0), *getattr(request.intervention, "patches", (0,)))
        if last >= tokens:
            raise UserError(f"there is no patch {last}; an image has 0..{tokens - 1}")
        blocked_layers = getattr(request.intervention, "layers", None) or ()
        layer = max(getattr(request, "layer", 1), *blocked_layers, 1)
        if layer_site(layer) not in model.mllm.sites:
            raise UserError(f"there is no layer {layer} in {model.label}")
        for part in (request, request.intervention):
            site = getattr(part, "site", model.sites[0])
            if site not in model.sites:
                expected = ", ".join(model.sites)
                raise UserError(f"there is no site {site!r}; expected one of {expected}")

    # ----------------------------------------------------------------------------------------------- operations
    def read(self, request: View, job: Job) -> dict[str, str | None]:
        """Return the most probable classes u8[k, S, T] and their probabilities f32[k, S, T] of a view."""
        states = self._read_states(request, job)
        model = self.models[request.model]
        if not model.probes:
            return {"classes": None}
        shown = min(TOP_CLASSES, len(model.classes))
        logits = {site: probe(states[site].float()) for site, probe in model.probes.items()}
        classes, probabilities = most_probable(logits, shown)
        kind = np.uint8
        if len(model.classes) > 256:
            kind = np.uint16
        return {"classes": _pack(classes, kind), "probabilities": _pack(probabilities)}

    def words_of_patch(self, request: PatchView, job: Job) -> dict[str, list[Words]]:
        """Return the most probable words of a patch, [[text, probability], ...] for each site with words."""
        model = self.models[request.model]
        states = self._read_states(request, job)
        words = []
        for site in model.word_sites:
            words += words_of_states(model, site, states[site][:, [request.patch]])
        return {"words": words}

    def words_of_site(self, request: SiteView, job: Job) -> dict[str, list[Words]]:
        """Return the most probable words of each patch at a site."""
        states = self._read_states(request, job)
        model = self.models[request.model]
        return {"words": words_of_states(model, request.site, states[request.site])}

    def pixel_map(self, request: SiteView, job: Job) -> dict[str, str]:
        """Return the classes predicted for each pixel, from upsampled logits, as a coloured PNG of the size shown."""
        model = self.models[request.model]
        states = self._read_states(request, job)
        preview = self.photos.get(request.photo).preview
        probe = model.probes[request.site]
        logits = probe(states[request.site].float()).mT
        size = (preview.height, preview.width)
        maps = logits[0].unflatten(-1, model.mllm.grid)
        view = model.mllm.geometry.view(size)
        task = model.run.task
        prediction = task.predict_pixels(maps, size, view)
        coloured = task.colorize(prediction, np.array(self.palette, np.uint8))
        png = encode_image(Image.fromarray(coloured), "PNG")
        return {"png": base64.b64encode(png).decode()}

    def similarity(self, request: PatchView, job: Job) -> dict[str, str]:
        """Return the cosine of each patch with one at all sites, f32[S, T]."""
        mllm = self.models[request.model].mllm
        states = self._read_states(request, job)
        cosines = mllm.similarity(states, divmod(request.patch, mllm.grid[1]))
        return {"similarity": _pack(torch.stack([*cosines.values()]))}

    def norms(self, request: View, job: Job) -> dict[str, str]:
        """Return the norm of each patch at all sites, in medians of the site, f32[S, T]."""
        states = self._read_states(request, job)
        return {"norms": _pack(torch.stack([relative_norms(x[0]) for x in states.values()]))}

    def pca(self, request: ShownViews, job: Job) -> dict[str, list[str]]:
        """Return PCA colours u8[S, T, 3] of each view shown of a model, fitted over all of them together."""
        plain = request.model_copy(update={"intervention": None})
        views = [plain]
        if request.intervention:
            views.append(request)
        if request.beside:
            views.append(plain.model_copy(update={"photo": request.beside}))
        states_of_views = [self._read_states(view, job) for view in views]
        to_grid = self.models[request.model].mllm.to_grid
        states = {}
        for site in states_of_views[0]:
            states[site] = to_grid(torch.cat([of_view[site] for of_view in states_of_views]))
        colours = torch.stack([*pca_colours(states).values()], 1)
        return {"colours": [_pack((255 * x).round(), np.uint8) for x in colours]}

    def ask(self, request: PhotoQuestion, job: Job) -> Answers:
        """Return the answer without the intervention and with it, and the first one's log-probability under both.

        Answers are reported while they grow.
        """
        mllm = self.models[request.model].mllm
        square = self.photos.get(request.photo).squares[request.model]
        knockout = self._knockout(request)

        def answer(knockout: Knockout | None) -> str:
            def report(text):
                return job.report({"text": text, "blocked": knockout is not None})

            return mllm.answer(square, request.question, knockout, MAX_ANSWER_TOKENS, report)

        def log_probability(knockout: Knockout | None) -> float:
            pixels = mllm.preprocess([square])
            return mllm.answer_log_probs(
                pixels, question=request.question, answers=[text], knockout=knockout
            ).item()

        with job.watched(mllm):
            text = answer(None)
            result: Answers = {"answer": text}
            if knockout is not None:
                result["blocked"] = answer(knockout)
                if text:
                    result["log_probability"] = [log_probability(None), log_probability(knockout)]
        return result

    def attention(self, request: Attention, job: Job) -> dict[str, str]:
        """Return the attention of a patch to all patches and of all patches to it in a layer, f32[T] each."""
        mllm = self.models[request.model].mllm
        site = layer_site(request.layer)
        with job.watched(mllm):
            pixels = self._pixels(request)
            attention = mllm.attention(pixels, [site], self._knockout(request))
        weights = attention[site][0]
        return {"to": _pack(weights[request.patch]), "from": _pack(weights[:, request.patch])}

    # ----------------------------------------------------------------------------------------------- parts
    def _pixels(self, request: View, photo: str | None = None) -> Tensor:
        """Return the photo of a request, or another one, f[1, 3, H, W] for its model."""
        square = self.photos.get(photo or request.photo).squares[request.model]
        return self.models[request.model].mllm.preprocess([square])

    def _read_states(self, request: View, job: Job) -> dict[str, Tensor]:
        """Return the states of a view at all sites of its model, f[1, T, d]."""
        view = View(photo=request.photo, model=request.model, intervention=request.intervention)
        if view not in self._states:
            model = self.models[request.model]
            pixels = self._pixels(request)
            with job.watched(model.mllm):
                hooks = self._hooks(request)
                knockout = None
                if not hooks:
                    knockout = self._knockout(request)
                states = model.mllm.states(pixels, model.sites, knockout, hooks=hooks)
                self._states[view] = states
        self._states.move_to_end(view)
        while len(self._states) > 1 and self._state_bytes() > STATE_BYTES:
            self._states.popitem(last=False)
        return self._states[view]

    def _state_bytes(self) -> int:
        return sum(x.nbytes for states in self._states.values() for x in states.values())

    def _knockout(self, request: View) -> Knockout | None:
        if request.intervention is None:
            return None
        if isinstance(request.intervention, Replace):
            raise UserError(
                "answers and attention are read under blocked patches only, not under replaced states"
            )
        block = request.intervention
        blocked = _as_mask(self.models[request.model], block.patches)
        return Knockout(blocked[None], block.layers)

    def _hooks(self, request: View) -> dict[str, Replacement]:
        """Return the hook that replaces states; {} for a request without one."""
        change = request.intervention
        if not isinstance(change, Replace):
            return {}
        model = self.models[request.model]
        mllm = model.mllm
        if change.by == "other_mask":
            mllm = mllm.with_attention(model.other_mask)
        other_photo = None
        if change.by not in ("mean", "other_mask"):
            other_photo = change.by
        pixels = self._pixels(request, other_photo)
        new = mllm.states(pixels, [change.site])[change.site]
        if change.by == "mean":
            new = new.mean(1, keepdim=True)
        patches = _as_mask(model, change.patches).to(new.device)[:, None]
        return {change.site: lambda states: torch.where(patches, new, states)}


def _as_mask(model: LabModel, patches: tuple[int, ...]) -> Tensor:
    """Return patches as bool[T]."""
    mask = torch.zeros(model.mllm.image_tokens, dtype=torch.bool)
    mask[list(patches)] = True
    return mask


def most_probable(logits: dict[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return the most probable classes and their probabilities, [count, S, T], of logits f[1, T, K] by site."""
    best = [of_site[0].float().softmax(-1).topk(count) for of_site in logits.values()]
    classes = [top.indices.mT.cpu() for top in best]
    probabilities = [top.values.mT.cpu() for top in best]
    return torch.stack(classes, 1), torch.stack(probabilities, 1)


def words_of_states(model: LabModel, site: str, states: Tensor) -> list[Words]:
    """Return the most probable words of each patch and their probabilities, from states f[1, T, d] of a site."""
    logits = model.mllm.word_head(site)(states)
    best = logits[0].float().softmax(-1).topk(TOP_WORDS)
    words = []
    for tokens, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        texts = [token_text(model.tokenizer, token) for token in tokens]
        words.append(list(zip(texts, probabilities, strict=True)))
    return words


def token_text(tokenizer, token: int) -> str:
    """Return the text of a token, or its name if the text is not visible (a blank, a part of a character)."""
    if token >= len(tokenizer):
        return f"<row {token}>"  # an output matrix can have more rows than the tokenizer has tokens
    text = tokenizer.decode([token]).strip()
    if text.isprintable() and text and "\ufffd" not in text:
        return text
    return tokenizer.convert_ids_to_tokens(token)


def _pack(values: Tensor, kind: type = np.float32) -> str:
    """Return numbers as base64 of their little-endian bytes, which the page reads without rounding."""
    array = values.cpu().numpy().astype(np.dtype(kind).newbyteorder("<"))
    return base64.b64encode(array.tobytes()).decode()
