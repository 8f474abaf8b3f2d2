"""The most probable classes and words of each patch, for the page of run.py.

For each image, run, condition and site: the most probable classes of every patch, from the site's probe, and from the
adapter on the most probable words. Words come from the logit lens: the LLM's final norm and output head on the states
(`final_norm` is already normed). The encoder's states are not an input of the LLM.

Conditions are the knockout's (knockout/conditions.py), for the class that most patches of the image are wrongly
predicted as at the adapter. All conditions of an image run in one batch.

Shapes: C conditions, T patches, S sites, W of them with words, k classes, m words, d width, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llava_bidir.common.errors import UserError
from probes.analyses.knockout import KnockoutOptions
from probes.analyses.knockout.cases import ConfusionCase, find_cases
from probes.analyses.knockout.conditions import high_norm_tokens, random_tokens
from probes.analyses.knockout.config import describe, options_of_run
from probes.models.frozen_mllm import FrozenMLLM
from probes.models.knockout import Knockout
from probes.models.prompt_and_pixels import read_tokenizer
from probes.models.sites import ADAPTER, is_in_llm_space
from probes.ops.geometry import GridPlacement
from probes.ops.pixel_counts import patch_labels
from probes.results.probe_run import ProbeRun

log = logging.getLogger(__name__)

Head = Callable[[Tensor], Tensor]  # states to logits

CONDITIONS = ("incorrect", "correct", "random_incorrect", "random_correct")  # besides "none"


@dataclass(frozen=True)
class PatchReadout:
    """Readout of the patches of an image under one condition; the most probable class or word comes first."""

    blocked: Tensor  # bool[T], blocked patches
    classes: Tensor  # long[k, S, T]
    class_probabilities: Tensor  # f[k, S, T], softmax over all classes
    words: Tensor  # long[m, W, T], token ids
    word_probabilities: Tensor  # f[m, W, T], softmax over the vocabulary


@dataclass(frozen=True)
class ImageReadout:
    """Readout of an image by one run."""

    image: int  # index in the validation split
    # left, top, width, height of the grid in fractions of the image
    box: tuple[float, float, float, float]
    truth: Tensor  # long[T], class of most labelled pixels under a patch, -1 for unlabelled patches
    case: ConfusionCase | None  # None if no patch is wrongly predicted as any of the classes
    readings: dict[str, PatchReadout]  # by condition, "none" first


@dataclass(frozen=True)
class RunReadout:
    """Readout of several images by one run."""

    run: ProbeRun
    sites: list[str]  # S sites
    word_sites: list[str]  # W of them
    images: list[ImageReadout]
    vocabulary: dict[int, str]  # text of every token id that occurs
    how: str  # how the knockout differs from the paper's, "" if it does not


def explore(
    run: ProbeRun,
    images: Sequence[int],
    *,
    conditions: Sequence[str] = ("incorrect", "correct"),
    classes: Sequence[str] | None = None,
    top_classes: int = 3,
    top_words: int = 3,
    word_sites: Sequence[str] | None = None,
    seed: int = 0,
) -> RunReadout:
    """Read images of the validation split at all sites of a run.

    Args:
        run, images: A finished probe run, and indices in the split.
        conditions: Knockout conditions, besides the unmodified model; `seed` is that of the random ones.
        classes: Candidates for the wrong class of the case; None for all.
        top_classes, top_words: k and m.
        word_sites: Sites with words; None for every site from the adapter on.

    Raises:
        UserError: An image, class, condition or site does not exist, or a number is below 1.
    """
    names = run.metrics["classes"]
    dataset = run.dataset()
    llm_sites = [site for site in run.sites if is_in_llm_space(site)]
    word_sites = llm_sites if word_sites is None else list(word_sites)
    _check_known("--images", images, range(len(dataset)), f"the validation split of {run.path}")
    _check_known("--conditions", conditions, CONDITIONS, "the knockout")
    _check_known("--classes", classes or [], names, str(run.path))
    _check_known("--word-sites", word_sites, llm_sites, f"{run.path}, from the adapter on,")
    if top_classes < 1 or top_words < 1:
        raise UserError(
            f"--top-classes {top_classes} and --top-words {top_words} must both be at least 1"
        )
    plan = options_of_run(run)  # blocks as the knockout of the run did
    mllm = run.mllm()
    heads = {
        site: partial(read_probe, probe.to(mllm.device)) for site, probe in run.probes().items()
    }
    word_heads = {site: mllm.word_head(site) for site in run.sites if site in word_sites}
    if conditions and ADAPTER not in heads:
        log.warning(
            "%s shows no knockouts: it has no probe at the adapter, which finds the patches to block",
            run.path,
        )
        conditions = ()
    reader = _ImageReader(
        mllm=mllm,
        sites=run.sites,
        classes=len(names),
        heads=heads,
        word_heads=word_heads,
        top_classes=min(top_classes, len(names)),
        top_words=top_words,
        plan=plan,
        conditions=conditions,
        candidates=[k for k, name in enumerate(names) if classes is None or name in classes],
        seed=seed,
    )
    readouts = [
        reader.read(image, dataset[image])
        for image in tqdm(images, desc=f"exploring {run.metrics['image_attention']}", mininterval=5)
    ]
    return RunReadout(
        run,
        run.sites,
        list(word_heads),
        readouts,
        _read_vocabulary(run, readouts),
        describe(plan),
    )


def read_probe(probe: torch.nn.Module, states: Tensor) -> Tensor:
    """Return the logits of a probe, which reads states of any dtype in float32."""
    return probe(states.float())


@dataclass(frozen=True)
class _ImageReader:
    """A model with its probes, and what is read of each image; see :func:`explore`."""

    mllm: FrozenMLLM
    sites: list[str]
    classes: int
    heads: dict[str, Head]  # by site
    word_heads: dict[str, Head]
    top_classes: int
    top_words: int
    plan: KnockoutOptions
    conditions: Sequence[str]
    candidates: list[int]  # classes that a case can be about
    seed: int

    def read(self, image: int, sample: dict) -> ImageReadout:
        """Return the readout of a sample of the data set, whose index is `image`."""
        size = sample["target"].shape
        view = self.mllm.geometry.view(size)
        target = torch.from_numpy(sample["target"])[None]
        truth = patch_labels(target, self.classes, self.mllm.grid, view=view)[0]
        pixels = self.mllm.preprocess([sample["image"]])
        case, blocked = self._find_case(image, pixels, truth)
        cut = torch.stack([*blocked.values()])
        # not all models can be cut
        knockout = Knockout(cut, self.plan.layers) if len(cut) > 1 else None
        states = self.mllm.states(pixels, self.sites, knockout, [0] * len(cut))
        parts = most_probable(states, self.heads, self.top_classes)
        parts += most_probable(states, self.word_heads, self.top_words)
        readings = {}
        for i, (condition, tokens) in enumerate(blocked.items()):
            readings[condition] = PatchReadout(tokens, *(part[i] for part in parts))
        return ImageReadout(image, grid_box(view, size), truth, case, readings)

    def _find_case(
        self, image: int, pixels: Tensor, truth: Tensor
    ) -> tuple[ConfusionCase | None, dict[str, Tensor]]:
        """Return the case of an image, or None, and the patches that each condition blocks, bool[T]."""
        blocked = {"none": torch.zeros_like(truth, dtype=torch.bool)}
        if not self.conditions:
            return None, blocked
        sites = (ADAPTER, self.plan.block_by)
        states = self.mllm.states(pixels, list(set(sites)))
        predicted = [self.heads[site](states[site]).argmax(-1)[0] for site in sites]
        case = most_confused(torch.stack(predicted).cpu(), truth, image, self.candidates)
        if case:
            rng = np.random.default_rng([self.seed, image])
            blocked |= blocked_patches(case, self.conditions, states[ADAPTER][0], rng)
        return case, blocked


def _check_known(
    option: str,
    values: Sequence,
    known: Sequence,
    owner: str,
) -> None:
    for value in values:
        if value not in known:
            listed = (
                f"0..{len(known) - 1}" if isinstance(known, range) else ", ".join(map(str, known))
            )
            raise UserError(f"{option}: {value!r} is unknown; {owner} has {listed}")


def grid_box(view: GridPlacement, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return left, top, width and height of the grid as fractions of an image [H, W]."""
    height, width = size
    rows, cols = view
    return (
        cols.start_px / width,
        rows.start_px / height,
        cols.length_px / width,
        rows.length_px / height,
    )


def most_confused(
    predicted: Tensor,
    truth: Tensor,
    image: int,
    classes: Sequence[int],
) -> ConfusionCase | None:
    """Return the case of the class that most patches are wrongly predicted as, among `classes`; None without one.

    Takes the predictions at the adapter and at the site that defines the blocked tokens, long[2, T], and the true
    classes, long[T], -1 for unlabelled patches.
    """
    wrong = predicted[0][(predicted[0] != truth) & (truth >= 0)].tolist()
    count, wrong_class = max(((wrong.count(k), -k) for k in classes), default=(0, 0))
    if not count:
        return None
    (case,) = find_cases(
        predicted[:, None],
        truth[None],
        torch.tensor([image]),
        -wrong_class,
        1,
    )
    return case


def blocked_patches(
    case: ConfusionCase,
    conditions: Sequence[str],
    states: Tensor,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """Return the patches that each condition blocks, bool[T]; random ones from the same pool as the knockout's.

    Of the tokens, with states f[T, d] at the adapter, those of high norm are not drawn while others are left.
    """
    high_norm = high_norm_tokens(states)

    def draw(tokens):
        return torch.from_numpy(random_tokens(tokens.numpy(), high_norm, rng))

    blocked = {
        condition: case.blocked[condition.removeprefix("random_")] for condition in conditions
    }
    return {
        name: draw(tokens) if name.startswith("random_") else tokens
        for name, tokens in blocked.items()
    }


def most_probable(
    states: dict[str, Tensor], heads: dict[str, Head], count: int
) -> tuple[Tensor, Tensor]:
    """Return the `count` most probable classes or words and their probabilities, [C, count, S, T] each."""
    conditions, tokens = next(iter(states.values())).shape[:2]
    ids = torch.zeros(
        conditions,
        count,
        len(heads),
        tokens,
        dtype=torch.long,
    )
    probabilities = torch.zeros(ids.shape)
    for s, (site, head) in enumerate(heads.items()):
        for c in range(conditions):  # one at a time, since V is large
            logits = head(states[site][c : c + 1])[0].float()
            if count > logits.shape[-1]:
                raise UserError(
                    f"asked for the {count} most probable of {logits.shape[-1]} at {site}; ask for fewer"
                )
            best = logits.softmax(-1).topk(count)
            ids[c, :, s] = best.indices.mT.cpu()
            probabilities[c, :, s] = best.values.mT.cpu()
    return ids, probabilities


def _read_vocabulary(run: ProbeRun, readouts: list[ImageReadout]) -> dict[int, str]:
    tokenizer = read_tokenizer(run.manifest["config"]["mllm"])
    ids = {
        int(i)
        for image in readouts
        for reading in image.readings.values()
        for i in reading.words.unique()
    }
    return {i: token_text(tokenizer, i) for i in sorted(ids)}


def token_text(tokenizer, token: int) -> str:
    """Return the text of a token, or its name if the text is not visible (a blank, a part of a character)."""
    if token >= len(tokenizer):
        return f"<row {token}>"  # an output matrix can have more rows than the tokenizer has tokens
    text = tokenizer.decode([token]).strip()
    if text.isprintable() and text and "\ufffd" not in text:
        return text
    return tokenizer.convert_ids_to_tokens(token)
