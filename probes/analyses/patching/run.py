"""`probes patching`: replace states of image tokens at one layer by those of another forward, and read what follows.

The donor is a forward of the same picture and weights under another mask among image tokens. The set is the tokens of
the class with the most patches in the image, an object's. At each layer from 0, the adapter, to the one before the
read-out, its states are replaced by the donor's at the same tokens and layer. The probe of the read-out site then gives
the log-odds of each labelled patch's true class, log p / (1 - p), in nats. The change against the unpatched forward is
averaged per image over the labelled patches of the set ("patched") and over all others ("others"): what the set's
tokens have passed on after that layer. The control replaces as many random tokens outside of the set ("random"); its
"others", and those of the set in the difference, are the patches in neither.

    patching.json          settings and effects by layer, see effects.py
    patching.safetensors   "total" f[N]: donor minus unpatched, over all labelled patches
                           "patched", "others", "random", "difference" f[N, L], NaN without patches
    patching.partial/      finished batches, removed at the end

Shapes: N images, B of a batch, T image tokens, L layers, D draws.
"""

import shutil
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import exclusive_run_lock, write_files
from probes.analyses.base import check_has_llm
from probes.analyses.batch_cache import cached_batches
from probes.analyses.replacement import check_replaceable
from probes.heads import Probe
from probes.models.frozen_mllm import FrozenMLLM
from probes.models.sites import ADAPTER, FINAL_NORM, is_layer, layer_site
from probes.runs.probe_run import ProbeRun
from probes.score.true_classes import true_classes

from . import PatchingOptions
from .effects import patching_effects, print_effects

# Change of log-odds that rounding explains: some processors sum a batch in another order than a part of it.
NO_EFFECT = 1e-6


class Batch(NamedTuple):
    """Pictures whose states are replaced."""

    index: list[int]
    pixels: Tensor  # f[B, 3, H, W]
    truth: Tensor  # long[B, T], class of most labelled pixels of each patch, -1 if unlabelled
    tokens: Tensor  # bool[B, T], of the class with the most patches


def read_batch(
    mllm: FrozenMLLM,
    dataset,
    index: list[int],
    classes: int,
) -> Batch:
    """Return images of a split, with the tokens whose states are replaced."""
    samples = [dataset[i] for i in index]
    pixels = mllm.preprocess([sample["image"] for sample in samples])
    targets = [torch.from_numpy(sample["target"]) for sample in samples]
    truth = true_classes(targets, classes, mllm)
    patches = F.one_hot(truth + 1, classes + 1).sum(1)[:, 1:]
    return Batch(index, pixels, truth, truth == patches.argmax(1, keepdim=True))


@dataclass(frozen=True)
class Experiment:
    """The forward that is patched, and the donor's."""

    mllm: FrozenMLLM
    donor: FrozenMLLM
    probe: Probe
    plan: PatchingOptions

    @torch.no_grad()
    def patch(self, batch: Batch) -> dict[str, Tensor]:
        """Return the results of a batch by "total" and group, f[B] and f[B, L]."""
        sites = [_site(layer) for layer in self.plan.layers]
        new = self.donor.states(batch.pixels, [*sites, self.plan.site])
        unpatched = self.mllm.states(batch.pixels, [self.plan.site])
        plain = self._log_odds(unpatched[self.plan.site], batch.truth)
        donated = self._log_odds(new[self.plan.site], batch.truth)
        random = random_tokens_outside(
            batch.tokens, self.plan.draws, [[self.plan.seed, i] for i in batch.index]
        )
        by_layer = [
            self._patch_set(
                batch,
                site,
                new[site],
                random,
                plain,
            )
            for site in sites
        ]
        total = mean_over(donated - plain, batch.truth >= 0)
        return {"total": total} | {
            key: torch.stack([entry[key] for entry in by_layer], 1) for key in by_layer[0]
        }

    def _patch_set(
        self,
        batch: Batch,
        site: str,
        new: Tensor,
        random: Tensor,
        plain: Tensor,
    ) -> dict[str, Tensor]:
        """Return the changes by group, f[B], when the states of the set, or random ones, are replaced at a site."""
        tokens = batch.tokens
        replaced = torch.cat([tokens[None], random])  # bool[1 + D, B, T]
        images = list(range(len(plain))) * len(replaced)
        change = (
            self._run_patched(
                batch,
                site,
                new,
                replaced.flatten(0, 1),
                images,
            )
            - plain[images]
        )
        of_set, *of_draws = change.unflatten(0, replaced.shape[:2])
        labelled = batch.truth >= 0
        neither = [labelled & ~tokens & ~drawn for drawn in random]
        draws = list(zip(of_draws, neither, strict=True))
        return {
            "patched": mean_over(of_set, labelled & tokens),
            "others": mean_over(of_set, labelled & ~tokens),
            "random": torch.stack([mean_over(drawn, patches) for drawn, patches in draws]).mean(0),
            "difference": torch.stack(
                [mean_over(of_set - drawn, patches) for drawn, patches in draws]
            ).mean(0),
        }

    def _run_patched(
        self,
        batch: Batch,
        site: str,
        new: Tensor,
        replaced: Tensor,
        images: list[int],
    ) -> Tensor:
        """Return the log-odds f[R, T] of R forwards that replace the states of the tokens bool[R, T]."""
        chosen = replaced.to(new.device)[..., None]

        def replace(states):
            return torch.where(chosen, new[images], states)

        states = self.mllm.states(
            batch.pixels,
            [self.plan.site],
            rows=images,
            hooks={site: replace},
        )
        return self._log_odds(states[self.plan.site], batch.truth[images])

    def _log_odds(self, states: Tensor, truth: Tensor) -> Tensor:
        """Return log p / (1 - p) of the true class, f[B, T] on the CPU; 0 where there is none."""
        logits = self.probe(states.float()).cpu()
        true = truth.clamp(min=0)[..., None]
        others = logits.scatter(-1, true, -torch.inf).logsumexp(-1)
        return torch.where(truth >= 0, logits.gather(-1, true)[..., 0] - others, 0)


def mean_over(values: Tensor, patches: Tensor) -> Tensor:
    """Return the mean of f[B, T] over the patches bool[B, T] of each image, f[B]; NaN without patches."""
    return torch.where(patches, values, 0).sum(1) / patches.sum(1)


def random_tokens_outside(tokens: Tensor, draws: int, seeds: list[list[int]]) -> Tensor:
    """Return as many random tokens as each row of bool[B, T] has, outside of it, bool[D, B, T].

    Where there are fewer outside, all of them. `seeds` has the numbers of each row's seed.
    """
    drawn = torch.zeros(draws, *tokens.shape, dtype=torch.bool)
    for row, (chosen, seed) in enumerate(zip(tokens, seeds, strict=True)):
        outside = (~chosen).nonzero().flatten().numpy()
        count = min(int(chosen.sum()), len(outside))
        for draw in range(draws):
            drawn[
                draw,
                row,
                np.random.default_rng([*seed, draw]).choice(outside, count, replace=False),
            ] = True
    return drawn


def patch_states(run: ProbeRun, options: PatchingOptions) -> dict[str, Any]:
    """Patch the images, write the files named above, and return the content of patching.json.

    The same call resumes after the last finished batch if a previous one was killed.

    Raises:
        UserError: The options do not fit the run, or there is a result of other options or runs, which may not be
            replaced.
        RuntimeError: The patched states changed nothing, so that they did not reach the model.
    """
    out = options.folder
    mllm = run.mllm()
    classes = len(run.metrics["classes"])
    dataset = run.dataset()
    plan = complete_options(options, run)
    made_from = {"runs": [run.fingerprint]} | plan.settings
    check_replaceable(out / "patching.json", made_from, plan.overwrite)
    probe = run.probes()[plan.site].to(mllm.device)
    experiment = Experiment(mllm, mllm.with_attention(plan.mask), probe, plan)
    partial = out / "patching.partial"

    def patch(index: list[int]) -> dict[str, Tensor]:
        return experiment.patch(read_batch(mllm, dataset, index, classes))

    indices = list(range(len(dataset)))[: plan.limit]
    tensors = cached_batches(partial, made_from, indices, plan.batch_size, patch)
    if any(plan.layers):  # what enters the LLM is the same under both masks
        check_effects(tensors["patched"])
    results = {key: run.metrics[key] for key in ("image_attention", "untrained")} | made_from
    results |= patching_effects(tensors, plan.layers, plan.seed, run.groups)
    write_files({out / "patching.safetensors": tensors, out / "patching.json": results})
    shutil.rmtree(partial)
    return results


def check_effects(changes: Tensor) -> None:
    """Raise a RuntimeError if replaced states changed nothing, not even at their own labelled patches, if any."""
    if not changes.isnan().all() and changes.nan_to_num().abs().max() < NO_EFFECT:
        raise RuntimeError("the replaced states changed nothing: they had no effect")


def complete_options(options: PatchingOptions, run: ProbeRun) -> PatchingOptions:
    """Return the options with the site, the mask and the layers that are their defaults for a run.

    Raises:
        UserError: There is no such site, the mask is the run's, or a layer is not before the read-out.
    """
    site = run.check_site(options.site)
    mask = options.mask or ("causal" if run.mask != "causal" else "bidirectional")
    if mask == run.mask:
        raise UserError(
            f"--mask is {mask}, the mask of the run; name another one, whose states replace its own"
        )
    sites = run.mllm().sites
    before = sites[1 : sites.index(site)] if is_layer(site) or site == FINAL_NORM else []
    if not before:
        raise UserError(
            f"no layer is before the read-out {site}; name a decoder layer or final_norm by --site"
        )
    layers = tuple(range(len(before)))
    if options.layers is not None:
        layers = tuple(sorted(set(options.layers)))
    if wrong := [layer for layer in layers if _site(layer) not in before]:
        raise UserError(
            f"--layers {wrong[0]} is not before the read-out {site}; expected 0 to {len(before) - 1}"
        )
    return replace(
        options,
        site=site,
        mask=mask,
        layers=layers,
    )


def _site(layer: int) -> str:
    return layer_site(layer) if layer else ADAPTER


def run(options: PatchingOptions) -> None:
    """Run `probes patching`."""
    probe_run = ProbeRun(options.probes, trust=options.trust)
    check_has_llm(probe_run, "patching")
    with exclusive_run_lock(options.folder, "patching.json"):
        print_effects(patch_states(probe_run, options))
