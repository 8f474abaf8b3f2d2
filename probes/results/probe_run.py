"""The files of a probe run, and how the analyses read them back. `write_run.py` writes them.

    RUN/metrics.json          scores by site with intervals, of the main recipe and of further ones (the contract)
    RUN/counts.safetensors    the main recipe's pixel counts by image, of which its scores and intervals are made
    RUN/recipes.safetensors   those of further recipes, if there are any: "NAME/intersection", "NAME/predicted"
    RUN/probes.safetensors    the probes, each of its best epoch: "SITE.head.weight", "recipes/NAME/SITE.head.weight"
    RUN/manifest.json         what ran on what: versions, commit, config, data, hardware

A file appears whole or not at all (`atomic_io.py`); metrics.json comes last and says that the run is finished.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llava_bidir.common.bootstrap import bootstrap_weights
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf_loading import error_context, read_json
from probes.data.registry import open_dataset
from probes.evaluation.metrics import Counts
from probes.models import frozen_mllm as mllms
from probes.models.frozen_mllm import ADAPTER
from probes.training.heads import Probe

from .schema import CONFIG, check, check_manifest, check_metrics

JSON_BYTES = 200_000_000  # 34 sites with 150 classes are 200 kB
# Axes of the counts: S sites, N images, K classes, T image tokens. The last two are not in every run.
COUNTS = {"intersection": "SNK", "predicted": "SNK", "labelled": "NK", "patch_right": "SNT", "patch_valid": "NT"}
COUNTS |= {"confusion": "SKK", "group": "N"}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads safetensors; the error names the file.

    Raises:
        UserError: The file is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); make it again") from None


def check_counts(tensors: dict[str, torch.Tensor], path: Path, sizes: dict[str, int], needed: Sequence[str]) -> None:
    """Raises a UserError that names `path` unless its counts are whole numbers of these sizes, none negative."""
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}; make the run again")
    for name, tensor in tensors.items():
        axes = COUNTS.get(name.rpartition("/")[2], "")
        expected = [sizes[axis] for axis in axes]
        if list(tensor.shape) != expected or tensor.is_floating_point() or tensor.lt(0).any():
            raise UserError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}; metrics.json says whole numbers {expected}, "
                "none of them negative"
            )


@dataclass
class ProbeRun:
    """A finished run, for the analyses.

    Raises:
        UserError: `path` is not the folder of a finished probe run, or a file in it is not as a run leaves it; those
            with tensors are looked at when they are used.
    """

    path: Path

    def __post_init__(self):
        self.path = Path(self.path)
        if not (self.path / "metrics.json").is_file():
            raise UserError(f"{self.path} holds no metrics.json: not a finished probe run (`probes fit --out DIR`)")
        self.metrics = read_json(self.path / "metrics.json", JSON_BYTES)
        self.manifest = read_json(self.path / "manifest.json", JSON_BYTES)
        with error_context(self.path / "metrics.json"):
            check_metrics(self.metrics)
        with error_context(self.path / "manifest.json"):
            check_manifest(self.manifest)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the run's probes do, or what they were trained on; not with where it lies. Analyses write it
        down."""
        settings = {key: value for key, value in self.manifest["config"].items() if key != "mllm"}
        how = json.dumps([settings, self.manifest["data"]["fingerprint"]], sort_keys=True).encode()
        probes = self.path / "probes.safetensors"
        return hashlib.sha256(how + (probes.read_bytes() if probes.is_file() else b"")).hexdigest()[:16]

    def analysis(self, name: str) -> dict[str, Any] | None:
        """What an analysis left in the run's folder, None if there is nothing.

        Raises:
            UserError: The file is damaged, or of other probes than the run has now.
        """
        if not (self.path / name).is_file():
            return None
        facts = read_json(self.path / name, JSON_BYTES)
        if self.fingerprint not in facts.get("runs", [self.fingerprint]):
            raise UserError(
                f"{self.path / name} is of other probes than {self.path} has now; make it again with "
                f"`probes {name.split('.')[0].split('_')[0]}`, or delete it"
            )
        return facts

    @property
    def sites(self) -> list[str]:
        return [site["site"] for site in self.metrics["sites"]]

    @property
    def training(self) -> dict[str, Any]:
        """What the model's training.json said; empty where there was none."""
        return self.manifest["mllm_training"] or {}

    @property
    def layers(self) -> list[str]:
        """The sites that follow each other from layer 0 to L: adapter and decoder layers."""
        return [site for site in self.sites if site == ADAPTER or site.startswith("layer_")]

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = read_tensors(self.path / "counts.safetensors")
        check_counts(tensors, self.path / "counts.safetensors", self._sizes, list(COUNTS)[:5])
        return tensors

    @property
    def _sizes(self) -> dict[str, int]:
        rows, columns = self.metrics["grid"]
        sizes = {"S": len(self.sites), "N": self.metrics["images"], "K": len(self.metrics["classes"])}
        return sizes | {"T": rows * columns}

    @property
    def counts(self) -> Counts:
        """The main recipe's."""
        return Counts(**{name: self._tensors[name] for name in Counts._fields if name in self._tensors})

    def counts_of(self, recipe: str | None) -> Counts:
        """The counts of a recipe, None for the main one. For a further one an image counts as a single patch: by token,
        only the main one is counted."""
        if recipe is None:
            return self.counts
        if recipe not in self.metrics["recipes"]:
            raise UserError(
                f"{self.path} has no recipe {recipe!r}; it has {', '.join(self.metrics['recipes']) or 'none'}"
            )
        tensors, labelled = read_tensors(self.path / "recipes.safetensors"), self.counts.labelled
        needed = [f"{recipe}/{name}" for name in ("intersection", "predicted")]
        check_counts(tensors, self.path / "recipes.safetensors", self._sizes, needed)
        intersection, predicted = (tensors[name] for name in needed)
        right, valid = intersection.sum(-1, keepdim=True), labelled.sum(-1, keepdim=True)
        return Counts(intersection, predicted, labelled, patch_right=right, patch_valid=valid)

    @property
    def confusion(self) -> torch.Tensor | None:
        """i64[S, K, K]: pixels by site, label and prediction, of the main recipe; None where they were not counted."""
        return self._tensors.get("confusion")

    @property
    def groups(self) -> torch.Tensor | None:
        """i64[N]: which group (city) a validation image is of; None where the dataset has none."""
        return self._tensors.get("group")

    def check_same_images(self, other: "ProbeRun", advice: str = "") -> None:
        """Raises a UserError that ends with `advice` unless another run was scored on the same images and classes."""
        if self.manifest["data"]["fingerprint"] != other.manifest["data"]["fingerprint"]:
            raise UserError(f"{self.path} and {other.path} were scored on different images{advice}")

    def dataset(self, split: str = "validation"):
        data = self.manifest["data"]
        return open_dataset(data["dataset"], data["root"], split, data.get("options"))

    @cached_property
    def weights(self) -> torch.Tensor:
        """f[R, N], the bootstrap of all that is said about the run; the same for every run on these images."""
        return bootstrap_weights(len(self.counts.labelled), seed=self.metrics["seed"], groups=self.groups)

    def mllm(self) -> mllms.FrozenMLLM:
        """The model that was probed, as it was then."""
        config = self.manifest["config"]
        with error_context(self.path / "manifest.json"):
            check(config, CONFIG, "config")
        return mllms.load(
            config["mllm"],
            config["image_attention"],
            dtype=config["dtype"],
            image_resize=config["image_resize"],
            untrained=config["untrained"] or (),
            seed=config["seed"],
        )

    def probes(self) -> dict[str, Probe]:
        """The main recipe's probe of each site, in eval mode."""
        tensors, how = read_tensors(self.path / "probes.safetensors"), self.metrics["probe"]
        classes, grid = len(self.metrics["classes"]), tuple(self.metrics["grid"])
        heads = {}
        for site in self.metrics["sites"]:
            name = site["site"]
            with error_context(self.path / "probes.safetensors"):
                head = Probe(site["dim"], classes, grid, how["feature_norm"], how["head"])
                head.load_state_dict(
                    {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
                )
            heads[name] = head.eval().requires_grad_(False)
        return heads
