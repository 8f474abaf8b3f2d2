"""A page of classes, words and knockouts by image, layer and patch."""

from dataclasses import dataclass
from pathlib import Path

from llava_bidir.common.options import Count, Indices, Seed, positional
from probes.analyses.base import Analysis


@dataclass(frozen=True, kw_only=True)
class ExploreOptions:
    """What the page shows.

    Args:
        runs: Finished probe runs on the same images, one per mask.
        out: Folder for explorer.html, a self-contained file.
        images: Indices in the validation split.
        conditions: Knockouts to show, of incorrect, correct, random_incorrect, random_correct.
        classes: Wrong classes to knock out (default: each image's most frequent).
        top_classes: Most probable classes per patch.
        top_words: Most probable words per patch.
        word_sites: Sites with words (default: all from the adapter on).
        seed: Random seed of the controls.
    """

    runs: tuple[Path, ...] = positional()
    out: Path
    images: Indices
    conditions: tuple[str, ...] = ("incorrect", "correct")
    classes: tuple[str, ...] | None = None
    top_classes: Count = 3
    top_words: Count = 3
    word_sites: tuple[str, ...] | None = None
    seed: Seed = 0


ANALYSIS = Analysis(
    help="write a page of classes, words and knockouts by image, layer and patch, to OUT/explorer.html",
    question="What do probes and logit lens read at a patch, and what does a knockout change there?",
    options=ExploreOptions,
    result="explorer.html",
    of="page",
    reads=("knockout",),
    in_study={"images": tuple(range(12))},
)
