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

`--fit` adds `probes`, the trained model with probes that AdamW trained, as the paper does.
"""

import re
from dataclasses import replace
from typing import NamedTuple

from llava_bidir.common.errors import UserError
from probes.analyses.analysis import PlannedRun
from probes.config import RunConfig, StudyOptions
from probes.models.families import family_of, own_image_attention
from probes.models.families.modules import why_unmatched
from probes.models.families.sites import all_sites, chosen_sites
from probes.models.read_config import read_config
from probes.models.sites import layer_around


class Weights(NamedTuple):
    """Which weights of an arm are random, and the sites that they change."""

    parts: tuple[str, ...]
    match: str  # how random layers resemble the trained ones
    # of the model's sites: a random LLM is compared from the adapter on, a random adapter up to it
    sites: slice


ARMS = {
    "trained": Weights((), "none", slice(None)),
    "random": Weights(("llm",), "update", slice(1, None)),
    "permuted": Weights(("llm",), "permuted", slice(1, None)),
    "adapter": Weights(("adapter",), "none", slice(0, 2)),
    "untrained": Weights(("adapter", "llm"), "none", slice(1, None)),
}
ENCODER_ARMS = {
    "trained": ARMS["trained"],
    "random": Weights(("encoder",), "update", slice(None)),
    "permuted": Weights(("encoder",), "permuted", slice(None)),
}
# Of any study: the fewest with an interval. Their spread is pooled with that of the other draws.
PERMUTED_DRAWS = 2


FITTED = "probes"  # the arm of `--fit`: the trained model with probes that AdamW trained
# The paper's protocol (configs/probes/folder.yaml) for it, unless the options say how long to train.
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
        name: "trained", "random0", ..., or "probes".
        run: Mask and sites.
        config: Options of the run.
        why_left_out: Why the model cannot have these weights, "" if it can.
    """

    label: str
    name: str
    run: PlannedRun
    config: RunConfig
    why_left_out: str = ""


def arm_names(study: StudyOptions, has_llm: bool = True) -> list[str]:
    """Return the names of the arms of a model, the trained one first.

    Raises:
        UserError: There is no such arm.
    """
    if not study.arms:
        draws = {"random": study.draws, "permuted": min(study.draws, PERMUTED_DRAWS)}
        draws |= {"adapter": study.draws} if has_llm else {}
        return ["trained", *(f"{kind}{i}" for kind, count in draws.items() for i in range(count))]
    kinds = [*(ARMS if has_llm else ENCODER_ARMS)][1:]
    for name in study.arms:
        if not re.fullmatch(rf"trained|({'|'.join(kinds)})\d{{1,3}}", name):
            known = ", ".join(["trained", *(f"{kind}0" for kind in kinds)])
            of = "" if has_llm else " of a vision encoder"
            raise UserError(
                f"there is no arm {name!r}{of}; expected {known}, or another draw (--arms)"
            )
    return sorted(dict.fromkeys(study.arms), key=lambda name: name != "trained")


def kind_of(arm: str) -> str:
    """Return the kind of an arm: "random" of "random0"."""
    return arm.rstrip("0123456789")


def join(label: str, name: str) -> str:
    """Return the name of a run of a model."""
    return f"{label}/{name}" if label else name


def plan_arms(study: StudyOptions) -> list[Arm]:
    """Return the arms of all models: the trained one first, and the one with trained probes last."""
    arms = []
    for label, path in study.models.items():
        model = replace(study.model, mllm=path)
        config = read_config(path)
        family = family_of(config)
        if model.image_px is not None:
            family.with_side(model.image_px, config)  # an error if it takes no input of this side
        mask = model.image_attention or own_image_attention(config)
        sites = family.sites(config)
        chosen = chosen_sites(family, config, model.sites or None)
        # in forward order, and where each is complete: a part is with its layer, which random weights from there on
        # leave as it is
        probed = {x: layer_around(x) for x in all_sites(family, config) if x in chosen}
        kinds = ARMS if family.has_llm else ENCODER_ARMS
        unmatched = why_unmatched(config)
        names = [*arm_names(study, family.has_llm), *([FITTED] if study.fit else [])]
        for name in names:
            weights = kinds["trained" if name == FITTED else kind_of(name)]
            compared = [*probed]
            options = RunConfig.of(study, model=model, overwrite=False)
            if weights.parts:
                changed = sites[weights.sites]
                compared = [site for site, place in probed.items() if place in changed]
                random = replace(
                    model,
                    untrained=list(weights.parts),
                    match=weights.match,
                    draw=int(name.removeprefix(kind_of(name))),
                    sites=compared,
                )
                options = replace(options, model=random)
            run = PlannedRun(
                name=join(label, name),
                mask=mask,
                sites=compared,
                model_sites=sites,
                has_llm=family.has_llm,
            )
            if name == FITTED and "max_epochs" not in options.trainer:
                options = replace(options, trainer=RECIPE | options.trainer)
            why = unmatched if weights.match == "update" else ""
            if why and study.arms:
                raise UserError(f"arm {name} of {path}: {why} (--arms)")
            arms.append(Arm(label=label, name=name, run=run, config=options, why_left_out=why))
    return arms
