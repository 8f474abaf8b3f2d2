"""The arms of a study: a model with trained or random weights.

The name of an arm says which:

    trained       the checkpoint as it is
    random0, ...  a random LLM whose layers change the states as much as the trained ones, draw 0, 1, ...
    permuted0     the trained LLM with the entries of each weight matrix permuted
    adapter0      a random adapter
    untrained0    a random adapter and a random LLM

Of a bare vision encoder, `random` and `permuted` are the encoder's layers, and there are no other controls.

A claim is compared with `random` and with `permuted` arms, and must hold beyond both: a model that has learned nothing
can differ from all draws of one kind, e.g. by the scale of its weights (experiments/beyond_random/beyond_random.md).

`--cuts` adds the trained, random and permuted arms again, as `cut_encoder_trained` ..., under each cut; of an encoder
with CLS or registers also `cut_encoder_alone_trained` ..., whose patches do not see these.

`--blank` adds `blank`, the trained model on blank pictures: what its prompt and positions tell.

`--fit` adds `probes`, the trained model with probes that AdamW trained, as the paper does; with `--model.head mlp` also
`probes_mlp`, the same with another head. Only linear probes are solved, so heads are compared as trained ones.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from llava_bidir.common.errors import UserError
from probes.analyses.analysis import PlannedRun
from probes.config import Cut, ModelOptions, RunConfig, StudyOptions
from probes.heads import LINEAR
from probes.models.chosen import ChosenModel
from probes.models.encoder_cut import check_cut, extra_tokens
from probes.models.families.chosen_sites import all_sites
from probes.models.families.modules import why_unmatched
from probes.models.sites import every_nth, layer_around
from probes.runs.study import CONTROLS

TRAINED = "trained"  # the arm of the checkpoint as it is
BLANK = "blank"  # the arm of `--blank`: the trained model on blank pictures
FITTED = "probes"  # the arm of `--fit`: the trained model with probes that AdamW trained


class Weights(NamedTuple):
    """Which weights of an arm are random, and the sites that they change."""

    parts: tuple[str, ...]
    match: str  # how random layers resemble the trained ones
    # of the model's sites: a random LLM is compared from the adapter on, a random adapter up to it
    sites: slice


ARMS = {
    TRAINED: Weights((), "none", slice(None)),
    "random": Weights(("llm",), "update", slice(1, None)),
    "permuted": Weights(("llm",), "permuted", slice(1, None)),
    "adapter": Weights(("adapter",), "none", slice(0, 2)),
    "untrained": Weights(("adapter", "llm"), "none", slice(1, None)),
}
ENCODER_ARMS = {
    TRAINED: ARMS[TRAINED],
    "random": Weights(("encoder",), "update", slice(None)),
    "permuted": Weights(("encoder",), "permuted", slice(None)),
}
# what the claim of a cut needs; random adapters come after the encoder
ARMS_OF_CUTS = (TRAINED, "random", "permuted")
# Draws of permuted weights in any study: the fewest with an interval. Their spread is pooled with that of other draws.
PERMUTED_DRAWS = 2
# The paper's protocol (configs/probes/folder.yaml) for FITTED, unless the options say how long to train.
RECIPE = {
    "max_epochs": -1,
    "max_steps": 6320,
    "val_check_interval": 316,
    "check_val_every_n_epoch": None,
}


class Arm(NamedTuple):
    """An arm of a model: a probe run.

    Args:
        label: Of the model in the study.
        name: "trained", "random0", ..., "probes", or "probes_HEAD".
        run: Mask and sites.
        config: Options of the run, with the cut of attention.
        why_left_out: Why the model cannot have these weights, "" if it can.
    """

    label: str
    name: str
    run: PlannedRun
    config: RunConfig
    why_left_out: str = ""

    @property
    def is_trained(self) -> bool:
        """Whether the model is as it is, and its probes are solved."""
        return self.name == TRAINED and not self.cut

    @property
    def cut(self) -> str | None:
        """Where attention is cut, None if nowhere."""
        return self.config.model.cut


def plan_arms(study: StudyOptions, models: Mapping[str, ChosenModel]) -> list[Arm]:
    """Return the arms of all models by label: the trained one first, and those with trained probes last.

    Raises:
        UserError: A model cannot have an arm that was asked for.
    """
    arms = []
    for label, model in models.items():
        arms += [make_arm(study, label, model, cut, name) for cut, name in arms_of(study, model)]
    return arms


def arms_of(study: StudyOptions, model: ChosenModel) -> Iterator[tuple[Cut | None, str]]:
    """Yield cut and name of each arm of a model: all without a cut, then those of each cut.

    Raises:
        UserError: There is no such arm, or the model cannot be cut.
    """
    names = arm_names(study, model.family.has_llm)
    for name in names:
        yield None, name
    if study.blank:
        yield None, BLANK
    if study.fit:
        yield None, FITTED
        if study.model.head != LINEAR:
            yield None, f"{FITTED}_{study.model.head}"
    for cut in cuts_of(study, model):
        for name in names:
            if kind_of(name) in ARMS_OF_CUTS:
                yield cut, name


def make_arm(
    study: StudyOptions, label: str, model: ChosenModel, cut: Cut | None, name: str
) -> Arm:
    """Return an arm of a model.

    Raises:
        UserError: Its layers cannot be made random in the way that was asked for.
    """
    path = study.models[label]
    family = model.family
    weights = weights_of_arm(name, family.has_llm)
    why_left_out = ""
    if weights.match == "update":
        why_left_out = why_unmatched(model.config)
    if why_left_out and study.arms:
        raise UserError(f"arm {name} of {path}: {why_left_out} (--arms)")
    sites = compared_sites(study, model, name, weights)
    options = replace(study.model, mllm=path, head=LINEAR, cut=cut)
    trainer = study.trainer
    if weights.parts:
        options = random_model(options, name, weights, sites)
    if is_fitted(name):
        head = name.removeprefix(FITTED).removeprefix("_") or LINEAR
        options = replace(options, head=head)
        if "max_epochs" not in trainer:
            trainer = RECIPE | trainer
    data = study.data
    if name == BLANK:
        data = replace(data, blank=True)
    run = PlannedRun(
        name=join(label, f"cut_{cut}_{name}" if cut else name),
        mask=model.mask,
        sites=sites,
        model_sites=family.sites(model.config),
        has_llm=family.has_llm,
    )
    config = RunConfig.of(study, model=options, data=data, trainer=trainer, overwrite=False)
    return Arm(label=label, name=name, run=run, config=config, why_left_out=why_left_out)


def compared_sites(
    study: StudyOptions, model: ChosenModel, name: str, weights: Weights
) -> list[str]:
    """Return the sites of a model in forward order that an arm is compared at: those that its weights change."""
    in_order = all_sites(model.family, model.config)
    sites = [site for site in in_order if site in model.sites]
    if not weights.parts:
        return sites
    changed = model.family.sites(model.config)[weights.sites]
    # a part is with its layer: random weights from there on leave it as it is
    sites = [site for site in sites if layer_around(site) in changed]
    if kind_of(name) in CONTROLS["llm"]:
        sites = every_nth(sites, study.control_sites)
    return sites


def cuts_of(study: StudyOptions, model: ChosenModel) -> Iterator[Cut]:
    """Yield the cuts of a model; where its encoder has extra tokens, which tell patches of others, also without these.

    Raises:
        UserError: The model cannot be cut.
    """
    for cut in dict.fromkeys(study.cuts):
        check_cut(cut, model.family, model.config)
        yield cut
        if cut != "llm" and extra_tokens(model.family, model.config):
            yield f"{cut}_alone"


def arm_names(study: StudyOptions, has_llm: bool = True) -> list[str]:
    """Return the names of the arms of a model, the trained one first.

    Raises:
        UserError: There is no such arm.
    """
    if not study.arms:
        draws = {"random": study.draws, "permuted": min(study.draws, PERMUTED_DRAWS)}
        if has_llm:
            draws["adapter"] = study.draws
        return [TRAINED, *(f"{kind}{i}" for kind, count in draws.items() for i in range(count))]
    kinds = [kind for kind in weights_by_kind(has_llm) if kind != TRAINED]
    for name in study.arms:
        if not re.fullmatch(rf"trained|({'|'.join(kinds)})\d{{1,3}}", name):
            expected = ", ".join([TRAINED, *(f"{kind}0" for kind in kinds)])
            of_model = "" if has_llm else " of a vision encoder"
            raise UserError(
                f"there is no arm {name!r}{of_model}; expected {expected}, or another draw (--arms)"
            )
    return sorted(dict.fromkeys(study.arms), key=lambda name: name != TRAINED)


def weights_of_arm(name: str, has_llm: bool) -> Weights:
    """Return the weights of an arm; of blank pictures, and under probes that AdamW trained, the trained model's."""
    kind = kind_of(name)
    if is_fitted(name) or name == BLANK:
        kind = TRAINED
    return weights_by_kind(has_llm)[kind]


def weights_by_kind(has_llm: bool) -> Mapping[str, Weights]:
    """Return the weights of the kinds of arms that an MLLM, or a bare vision encoder, can have."""
    return ARMS if has_llm else ENCODER_ARMS


def random_model(model: ModelOptions, arm: str, weights: Weights, sites: list[str]) -> ModelOptions:
    """Return the options of a model with the random weights of an arm, which is compared at some sites."""
    return replace(
        model,
        untrained=list(weights.parts),
        match=weights.match,
        draw=int(arm.removeprefix(kind_of(arm))),
        sites=sites,
    )


def is_fitted(arm: str) -> bool:
    """Return whether AdamW trained the probes of an arm."""
    return arm.startswith(FITTED)


def kind_of(arm: str) -> str:
    """Return the kind of an arm: "random" of "random0"."""
    return arm.rstrip("0123456789")


def join(label: str, name: str) -> str:
    """Return the name of a run of a model."""
    return f"{label}/{name}" if label else name
