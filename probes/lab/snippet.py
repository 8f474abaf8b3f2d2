"""Python code of public API that reproduces a view of the lab."""

from probes.models.sites import layer_site

from .models import LabModel
from .requests import MAX_ANSWER_TOKENS, Block, Export, Painting, Replace, View

HEADER = '''"""Reproduces a view of `probes lab`. Needs the package `llava-bidir`."""
import torch
from PIL import Image, ImageOps

import probes
'''


def write_snippet(model: LabModel, request: Export, names: dict[str, str]) -> str:
    """Return the code of a view; `names` are the file names of its photos by key.

    The code defines `states` (f[1, T, d] by site), `probabilities` (f[T, K] by site) if there are probes, and
    `answer` if there is a question. If the view shows attention, it defines `attention` of a word, or
    `attention_of_patch` and `attention_to_patch`, f[A, T] each. It opens uploaded photos by their file name.
    """
    lines = [HEADER]
    if model.run is None:
        lines.append(f"mllm = probes.load({model.source!r})")
    else:
        lines += [f"run = probes.ProbeRun({model.source!r})", "mllm = run.mllm()"]
    lines += _open("image", request.photo, names)
    lines += ["pixels = mllm.preprocess([image])", *_change(model, request, names)]
    sites = "mllm.sites" if model.run is None else "run.sites"
    lines.append(f"states = mllm.states(pixels, {sites}{_argument(request.intervention)})")
    if request.painting is not None:
        lines += _teach(request.painting, names)
        read = "taught.probes.logits(states[site].cpu(), site).softmax(-1)[0]"
        lines.append(f"probabilities = {{site: {read} for site in states}}")
    elif model.run is not None:
        read = "probe.to(mllm.device)(states[site].float()).softmax(-1)[0]"
        lines.append(f"probabilities = {{site: {read} for site, probe in run.probes().items()}}")
    if not isinstance(request.intervention, Replace):
        knockout = ", knockout=knockout" if request.intervention else ""
        if request.question:
            more = f"{knockout}, max_new_tokens={MAX_ANSWER_TOKENS}"
            lines.append(f"answer = mllm.answer(image, {request.question!r}{more})")
        lines += _attention(request, knockout)
    return "\n".join(lines) + "\n"


def _attention(request: Export, knockout: str) -> list[str]:
    """Return the lines that read the shown attention."""
    if request.attention is None:
        return []
    site = layer_site(request.layer)
    by_head = f"{knockout}, average_heads=False"
    if request.attention == "answer_attention":
        text = f"{request.question!r}, {request.answer!r}"
        return [
            f"weights = mllm.answer_attention(pixels, {text}, [{site!r}]{by_head})",
            f"attention = weights[{site!r}][0, :, {request.token}]",
        ]
    patch = request.patch
    return [
        f"weights = mllm.attention(pixels, [{site!r}]{by_head})[{site!r}][0]",
        f"attention_of_patch, attention_to_patch = weights[:, {patch}], weights[:, :, {patch}]",
    ]


def _teach(painting: Painting, names: dict[str, str]) -> list[str]:
    """Return the lines that teach the painted concepts."""
    lines = ["", "def grid(*patches):", "    painted = torch.zeros(mllm.grid, dtype=torch.bool)"]
    lines += ["    painted.view(-1)[list(patches)] = True", "    return painted", ""]
    for i, photo in enumerate(painting.photos, 1):
        lines += _open(f"photo_{i}", photo.photo, names)
    for k, concept in enumerate(painting.concepts):
        # The first concept lists all photos, so that they have the lab's order, and with it the same folds.
        pairs = [
            (i, photo.patches[k])
            for i, photo in enumerate(painting.photos, 1)
            if photo.patches[k] or not k
        ]
        pairs = ", ".join(
            f"(photo_{i}, grid({', '.join(map(str, sorted(patches)))}))" for i, patches in pairs
        )
        lines.append(f"{'    ' if k else 'painted = {'}{concept!r}: [{pairs}],")
    return [*lines, "}", f"taught = mllm.teach(painted, rest_is_background={painting.rest})"]


def _open(variable: str, photo: str, names: dict[str, str]) -> list[str]:
    kind, _, key = photo.partition(":")
    if kind == "split":
        return [f'{variable} = run.dataset()[{key}]["image"]']
    return [
        f'{variable} = ImageOps.exif_transpose(Image.open({names[photo]!r})).convert("RGB")  # sha256 {key}'
    ]


def _argument(change: Block | Replace | None) -> str:
    if change is None:
        return ""
    return ", knockout" if isinstance(change, Block) else ", hooks=hooks"


def _change(model: LabModel, request: View, names: dict[str, str]) -> list[str]:
    """Return the lines that define `knockout` or `hooks`."""
    change = request.intervention
    if change is None:
        return []
    lines = ["patches = torch.zeros(1, mllm.grid[0] * mllm.grid[1], dtype=torch.bool)"]
    lines.append(f"patches[0, {sorted(set(change.patches))}] = True")
    if isinstance(change, Block):
        return [
            *lines,
            f"knockout = probes.Knockout(patches, layers={change.layers and list(change.layers)})",
        ]
    new = "states.mean(1, keepdim=True)"
    site = repr(change.site)
    if change.by == "other_mask":
        lines.append(
            f"other = mllm.with_attention({model.other_mask!r}).states(pixels, [{site}])[{site}]"
        )
        new = "other"
    elif change.by != "mean":
        lines += _open("other_image", change.by, names)
        lines.append(f"other = mllm.states(mllm.preprocess([other_image]), [{site}])[{site}]")
        new = "other"
    hook = f"lambda states: torch.where(patches[..., None].to(mllm.device), {new}, states)"
    return [*lines, f"hooks = {{{change.site!r}: {hook}}}"]
