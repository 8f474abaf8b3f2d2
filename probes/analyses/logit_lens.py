"""What the probes and the LLM's own output head read off each patch, for the page of probes/report/explorer/page.py.

For each image, run, condition and site: the most probable classes of every patch, as the site's probe has them; and
from the adapter on the words that the LLM's output head would say there, the logit lens: its final norm and output
matrix on the states as they are (`final_norm` has been normed already). The encoder's states are no input of the LLM.

The conditions of an image are the knockout's (analyses/knockout), for the class that most of its patches are
wrongly called at the adapter: nothing hidden, the patches hidden that are called so, those hidden that are called what
is right there, or as many at random. They ride in one batch.

Shapes: C conditions, T patches, S sites, W of them with words, k classes, m words, d width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from llava_bidir.common.errors import UserError
from probes.analyses.knockout.cases import ConfusionCase, find_cases
from probes.evaluation.metrics import patch_labels
from probes.models.frozen_mllm import ADAPTER, ENCODER
from probes.models.knockout import Knockout
from probes.models.prompt_and_pixels import read_tokenizer
from probes.ops.geometry import GridPlacement
from probes.results.probe_run import ProbeRun

Head = Callable[[Tensor], Tensor]  # states to logits

CONDITIONS = ("incorrect", "correct", "random_incorrect", "random_correct")  # beside "none"


@dataclass(frozen=True)
class PatchReadout:
    """Patches of an image under one condition; the most probable class or word comes first.

    Args:
        blocked: bool[T], patches that no other may attend to.
        classes: long[k, S, T].
        class_probabilities: f[k, S, T], of the probe's softmax over all classes.
        words: long[m, W, T], token ids.
        word_probabilities: f[m, W, T], of the output head's softmax over the vocabulary.
    """

    blocked: Tensor
    classes: Tensor
    class_probabilities: Tensor
    words: Tensor
    word_probabilities: Tensor


@dataclass(frozen=True)
class ImageReadout:
    """An image as one run sees it.

    Args:
        image: Its index in the validation split.
        box: Left, top, width and height of the patch grid as fractions of the image; a padded square reaches beyond it.
        truth: long[T], the class most labelled pixels under a patch have, -1 where none is labelled.
        case: What the knockout is about; None where no patch is wrongly called any of the classes.
        readings: By condition, "none" first.
    """

    image: int
    box: tuple[float, float, float, float]
    truth: Tensor
    case: ConfusionCase | None
    readings: dict[str, PatchReadout]


@dataclass(frozen=True)
class RunReadout:
    """Images as one run sees them.

    Args:
        run: The probe run.
        sites: S of them.
        word_sites: W of these.
        images: What is seen in each.
        vocabulary: The text of every token id that occurs.
    """

    run: ProbeRun
    sites: list[str]
    word_sites: list[str]
    images: list[ImageReadout]
    vocabulary: dict[int, str]


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
    """Reads images at all sites of a run.

    Args:
        run: A finished probe run.
        images: Indices in the validation split.
        conditions: Of the knockout, beside the unmodified model.
        classes: Wrong classes that are looked for; None for any.
        top_classes: k.
        top_words: m.
        word_sites: Where words are read; None takes every site from the adapter on.
        seed: Of the random controls.

    Raises:
        UserError: An image, class, condition or site that does not exist, or a number below 1.
    """
    names, dataset = run.metrics["classes"], run.dataset()
    readable = [site for site in run.sites if site != ENCODER]
    word_sites = readable if word_sites is None else list(word_sites)
    _check_known("--images", images, range(len(dataset)), f"the validation split of {run.path}")
    _check_known("--conditions", conditions, CONDITIONS, "the knockout")
    _check_known("--knockout", classes or [], names, str(run.path))
    _check_known("--word-sites", word_sites, readable, f"{run.path}, from the adapter on,")
    if top_classes < 1 or top_words < 1:
        raise UserError(f"--top-classes {top_classes} and --top-words {top_words} must both be at least 1")
    mllm = run.mllm()
    heads = {site: probe_head(probe.to(mllm.device)) for site, probe in run.probes().items()}
    word_heads = {site: partial(mllm.logit_lens, site=site) for site in run.sites if site in word_sites}
    wanted = [k for k, name in enumerate(names) if classes is None or name in classes]
    seen = []
    for image in tqdm(images, desc=f"exploring {run.metrics['image_attention']}", mininterval=5):
        sample = dataset[image]
        target = torch.from_numpy(sample["target"])[None]
        view, pixels = mllm.geometry.view(sample["target"].shape), mllm.preprocess([sample["image"]])
        truth = patch_labels(target, len(names), mllm.grid, view=view)[0]
        case = None
        if conditions and ADAPTER in heads:
            called = heads[ADAPTER](mllm.states(pixels, [ADAPTER])[ADAPTER]).argmax(-1)[0].cpu()
            case = most_confused(called, truth, image, wanted)
        blocked = {"none": torch.zeros_like(truth, dtype=torch.bool)}
        rng = np.random.default_rng([seed, image])
        blocked |= {condition: hidden(case, condition, rng) for condition in conditions} if case else {}
        knockout = Knockout(torch.stack(list(blocked.values())))
        states = mllm.states(pixels.expand(len(blocked), -1, -1, -1), run.sites, knockout)
        found = [*top(states, heads, min(top_classes, len(names))), *top(states, word_heads, top_words)]
        readings = {c: PatchReadout(b, *(part[i] for part in found)) for i, (c, b) in enumerate(blocked.items())}
        seen.append(ImageReadout(image, box(view, sample["target"].shape), truth, case, readings))
    return RunReadout(run, run.sites, list(word_heads), seen, _vocabulary(run, seen))


def _check_known(option: str, given: Sequence, known: Sequence, whose: str) -> None:
    for value in given:
        if value not in known:
            listed = f"0..{len(known) - 1}" if isinstance(known, range) else ", ".join(map(str, known))
            raise UserError(f"{option}: {value!r} is unknown; {whose} has {listed}")


def box(view: GridPlacement, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, width and height of the grid as fractions of an image [H, W]."""
    (height, width), (rows, cols) = size, view
    return cols.start_px / width, rows.start_px / height, cols.length_px / width, rows.length_px / height


def most_confused(called: Tensor, truth: Tensor, image: int, classes: Sequence[int]) -> ConfusionCase | None:
    """The case of the class that most patches of an image are wrongly called, among `classes`; None if none is.

    Args:
        called: long[T], predictions at the adapter.
        truth: long[T], -1 where unlabelled.
        image: Its index.
        classes: Those that count.
    """
    mistaken = called[(called != truth) & (truth >= 0)].tolist()
    count, wrong_class = max(((mistaken.count(k), -k) for k in classes), default=(0, 0))
    if not count:
        return None
    (case,) = find_cases(called[None, None], truth[None], torch.tensor([image]), -wrong_class)
    return case


def hidden(case: ConfusionCase, condition: str, rng: np.random.Generator) -> Tensor:
    """bool[T], the patches that a condition hides; "random_X" hides as many as X, drawn from all."""
    of = case.blocked[condition.removeprefix("random_")]
    if not condition.startswith("random_"):
        return of
    drawn = torch.from_numpy(rng.permutation(len(of))[: int(of.sum())])
    return torch.zeros_like(of).index_fill_(0, drawn, True)


def probe_head(probe: nn.Module) -> Head:
    """States f[C, T, d] to the probe's logits f[C, T, K]."""
    return lambda states: probe(states.float())


class Top(NamedTuple):
    """The most probable classes or words: ids long[C, k, S, T] and their probabilities f[C, k, S, T]."""

    ids: Tensor
    shares: Tensor


def top(states: dict[str, Tensor], heads: dict[str, Head], count: int) -> Top:
    """The `count` most probable of what each head gives, one condition at a time: V is large."""
    conditions, tokens = next(iter(states.values())).shape[:2]
    ids = torch.zeros(conditions, count, len(heads), tokens, dtype=torch.long)
    shares = torch.zeros(ids.shape)
    for s, (site, head) in enumerate(heads.items()):
        for c in range(conditions):
            logits = head(states[site][c : c + 1])[0].float()
            if count > logits.shape[-1]:
                raise UserError(
                    f"the {count} most probable of {logits.shape[-1]} at {site} were asked for; ask for fewer"
                )
            best = logits.softmax(-1).topk(count)
            ids[c, :, s], shares[c, :, s] = best.indices.mT.cpu(), best.values.mT.cpu()
    return Top(ids, shares)


def _vocabulary(run: ProbeRun, seen: list[ImageReadout]) -> dict[int, str]:
    tokenizer = read_tokenizer(run.manifest["config"]["mllm"])
    ids = {int(i) for image in seen for reading in image.readings.values() for i in reading.words.unique()}
    return {i: token_text(tokenizer, i) for i in sorted(ids)}


def token_text(tokenizer, token: int) -> str:
    """What a token reads as; its own name where that cannot be seen: a blank, a part of a character."""
    if token >= len(tokenizer):
        return f"<row {token}>"  # an output matrix can have more rows than the tokenizer has tokens
    text = tokenizer.decode([token]).strip()
    return text if text.isprintable() and text and "\ufffd" not in text else tokenizer.convert_ids_to_tokens(token)
