"""Models of a lab, loaded from finished probe runs or from a checkpoint, and what the page needs to know of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, TypedDict

from transformers import PreTrainedTokenizerBase

import probes
from llava_bidir.common.errors import UserError
from llava_bidir.common.tokenizer import load_tokenizer
from probes.data.image_dataset import palette_of
from probes.heads import Probe
from probes.models.frozen_model import FrozenModel
from probes.models.sites import ENCODER, is_in_llm_space
from probes.report.words import site_name
from probes.runs.compare import check_one_lab
from probes.runs.read import ProbeRun
from probes.runs.study import given_labels


class ModelFacts(TypedDict):
    """What the page knows of a model."""

    label: str
    name: str
    sites: list[str]
    titles: list[str]
    scores: list[float]
    word_sites: list[str]
    first_site: int
    change_sites: list[str]
    has_llm: bool
    layers: int
    other_mask: str | None
    cannot_answer: str | None


@dataclass
class LabModel:
    """A frozen model, with the probes of a run or without.

    Args:
        label: Name on the page.
        source: Folder of the run or of the checkpoint, or its hub id.
        mllm: The model.
        run: The run, None for a checkpoint alone.
        probes: Probe of each site, {} without a run.
    """

    label: str
    source: str
    mllm: FrozenModel
    run: ProbeRun | None
    probes: dict[str, Probe]

    @property
    def sites(self) -> list[str]:
        """Sites that the page shows."""
        return self.mllm.sites if self.run is None else self.run.sites

    @property
    def word_sites(self) -> list[str]:
        """Sites whose states are in the LLM's space; [] of a bare encoder."""
        if not self.mllm.has_llm:
            return []
        return [site for site in self.sites if is_in_llm_space(site)]

    @property
    def first_site(self) -> int:
        """Index of the site that the page opens at: the run's best layer; 0 without a run or layers."""
        if self.run is None or self.run.peak_layer is None:
            return 0
        return self.sites.index(self.run.peak_layer)

    @property
    def change_sites(self) -> list[str]:
        """Sites at which states can be replaced."""
        return [site for site in self.sites if site in self.mllm.layer_sites]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, [] without probes."""
        return [] if self.run is None else self.run.metrics["classes"]

    @property
    def scores(self) -> list[float]:
        """Score of each site as the run has it, mIoU from 0 to 1; [] without probes."""
        if self.run is None:
            return []
        return [site[self.run.task.score] for site in self.run.metrics["sites"]]

    @property
    def checkpoint(self) -> str:
        """Folder or hub id of the checkpoint."""
        if self.run is None:
            return self.source
        return self.run.manifest["config"]["mllm"]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer, for the words of the logit lens."""
        return load_tokenizer("tokenizer", self.checkpoint)

    @cached_property
    def cannot_answer(self) -> str | None:
        """Reason why the model cannot be asked, None if it can."""
        if not self.mllm.has_llm:
            return "it is a vision encoder without an LLM"
        try:
            _ = self.mllm.chat
        except UserError as error:
            return str(error)
        return None

    @property
    def other_mask(self) -> str | None:
        """The mask among image tokens that the same weights can be run under for comparison; None of an encoder."""
        if not self.mllm.has_llm:
            return None
        return "bidirectional" if self.mllm.image_attention == "causal" else "causal"

    def describe(self) -> ModelFacts:
        """Return the facts that the page needs."""
        return {
            "label": self.label,
            "name": self.source,
            "sites": self.sites,
            "titles": [site_name(site) for site in self.sites],
            "scores": self.scores,
            "word_sites": self.word_sites,
            "first_site": self.first_site,
            "change_sites": self.change_sites,
            "has_llm": self.mllm.has_llm,
            "layers": len(self.mllm.layers),
            "other_mask": self.other_mask,
            "cannot_answer": self.cannot_answer,
        }


def load_runs(paths: Sequence[str], trust: bool = False) -> list[LabModel]:
    """Load finished probe runs with equal images, classes, sites and grids; `trust` as of a run.

    Raises:
        UserError: A run is not finished, or two runs differ in one of these.
    """
    runs = [ProbeRun(path, trust=trust) for path in paths]
    for run in runs:
        run.check_classes()
        check_one_lab(runs[0], run)
    models = []
    for run in runs:
        mllm, heads = run.loaded
        label = label_of_run(run)
        models.append(LabModel(label=label, source=str(run.path), mllm=mllm, run=run, probes=heads))
    return models


def label_of_run(run: ProbeRun) -> str:
    """Return what tells a run from others: its label in its study, its mask, its weights unless trained."""
    parts = []
    study, folder = run.path.parent.parent, run.path.parent.name
    if folder in given_labels(study):
        parts.append(folder)
    if run.has_llm:
        parts.append(run.mask)
    if run.arm != "trained":
        parts.append(run.arm)
    return ", ".join(dict.fromkeys(parts)) or run.path.parent.name


def open_checkpoint(path: str, trust: bool = False) -> list[LabModel]:
    """Load a checkpoint without probes."""
    mllm = probes.load(path, trust=trust)
    label = mllm.image_attention if mllm.has_llm else ENCODER
    return [LabModel(label=label, source=path, mllm=mllm, run=None, probes={})]


def open_split(model: LabModel) -> tuple[Any, list[list[int]], str]:
    """Return the validation split of a model's run, the colours of its classes, and why there is no split, else ""."""
    if model.run is None:
        return None, [], "without a probe run there is no data set"
    try:
        dataset = model.run.dataset()
    except UserError as error:  # it may be on another machine; photos can still be dropped
        return None, palette_of(SimpleNamespace(classes=model.classes)).tolist(), str(error)
    return dataset, palette_of(dataset).tolist(), ""
