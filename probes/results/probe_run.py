"""The files of a finished probe run, and how analyses read them; `write_run.py` writes them.

    RUN/metrics.json          scores per site with intervals, of the main variant and of further ones
    RUN/counts.safetensors    pixel counts per image of the main variant, from which its scores are computed
    RUN/recipes.safetensors   counts of further variants, if any: "NAME/intersection", "NAME/predicted"
    RUN/path.safetensors      counts and losses at every strength of regularisation, of `probes solve`
    RUN/probes.safetensors    the probes of their best epochs: "SITE.head.weight", "recipes/NAME/SITE.head.weight"
    RUN/manifest.json         versions, commit, configuration, data, hardware

Files are written atomically, metrics.json last: it marks the run as finished.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from llava_bidir.common.atomic_io import read_json
from llava_bidir.common.bootstrap import bootstrap_weights
from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.identity import check_same_identity, named_identity
from probes.data.registry import open_dataset, split_identity
from probes.evaluation.metrics import Counts
from probes.models.sites import ADAPTER
from probes.ops.bilinear import upsampled_argmax
from probes.training.heads import Probe
from probes.training.run_schema import (
    Manifest,
    Metrics,
    ModelConfig,
    ModelTraining,
    check_schema,
    read_run_file,
    rename_old_keys,
)

if TYPE_CHECKING:
    from probes.models.frozen_mllm import FrozenMLLM

log = logging.getLogger(__name__)

# Axes of the counts: S sites, N images, K classes, T image tokens. The last two are not in every run.
COUNTS = {"intersection": "SNK", "predicted": "SNK", "labelled": "NK", "patch_right": "SNT", "patch_valid": "NT"}
COUNTS |= {"confusion": "SKK", "group": "N"}
PATH = {"intersection": "RSNK", "predicted": "RSNK", "cross_entropy": "RSN"}  # R strengths


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        UserError: If the file is damaged; the message names it.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); make it again") from None


def check_counts(tensors: dict[str, torch.Tensor], path: Path, sizes: dict[str, int], required: Sequence[str]) -> None:
    """Raise a UserError that names `path` unless its counts are non-negative integers of these sizes."""
    missing = [name for name in required if name not in tensors]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}; make the run again")
    for name, tensor in tensors.items():
        axes = COUNTS.get(name.rpartition("/")[2], "")
        expected = [sizes[axis] for axis in axes]
        if list(tensor.shape) != expected or tensor.is_floating_point() or tensor.lt(0).any():
            raise UserError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}; expected non-negative integers {expected} "
                "according to metrics.json; make the run again"
            )


def check_path(tensors: dict[str, torch.Tensor], path: Path, sizes: dict[str, int], instrument: str) -> None:
    """Raise a UserError that names `path` unless an instrument's counts and losses are valid and of these sizes."""
    for key, axes in PATH.items():
        name, floating = f"{instrument}/{key}", key == "cross_entropy"
        if name not in tensors:
            raise UserError(f"{path} has no {name}; make the run again")
        tensor, expected = tensors[name], [sizes[axis] for axis in axes]
        valid = list(tensor.shape) == expected and tensor.is_floating_point() == floating
        if not valid or not (tensor >= 0).all() or (floating and not tensor.isfinite().all()):
            kind = "finite numbers" if floating else "integers"
            raise UserError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}; expected non-negative {kind} {expected} "
                "according to metrics.json; make the run again"
            )


@dataclass
class ProbeRun:
    """A finished run, for analyses.

    Args:
        path: Folder of the run.

    Raises:
        UserError: If `path` is not a finished run, or a JSON file is invalid. Tensors are checked on first use.
    """

    path: Path

    def __post_init__(self):
        self.path = Path(self.path)
        if not (self.path / "metrics.json").is_file():
            raise UserError(f"{self.path} has no metrics.json: not a finished probe run (`probes fit --out DIR`)")
        self.metrics = read_run_file(Metrics, self.path / "metrics.json")
        self.manifest = read_run_file(Manifest, self.path / "manifest.json")
        check_schema(ModelTraining, self.training, f"{self.path / 'manifest.json'}: mllm_training")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of probes, settings and data, independent of the path; every analysis stores it."""
        settings = {key: value for key, value in self.manifest["config"].items() if key != "mllm"}
        text = json.dumps([settings, self.manifest["data"]["fingerprint"]], sort_keys=True).encode()
        probes = self.path / "probes.safetensors"
        return hashlib.sha256(text + (probes.read_bytes() if probes.is_file() else b"")).hexdigest()[:16]

    def analysis(self, name: str) -> dict[str, Any] | None:
        """Return the results of an analysis in the run's folder, None if there are none.

        Raises:
            UserError: If the file is damaged, or was made from other probes.
        """
        file = self.path / name
        if not file.is_file():
            return None
        results = read_json(file)
        if self.fingerprint not in results.get("runs", [self.fingerprint]):
            command = name.split(".")[0].split("_")[0]
            raise UserError(
                f"{file} was made from other probes than {self.path} has now; run `probes {command}` again or delete it"
            )
        return results

    @property
    def sites(self) -> list[str]:
        """All sites of the run, in the order of the forward."""
        return [site["site"] for site in self.metrics["sites"]]

    @property
    def training(self) -> dict[str, Any]:
        """Content of the model's training.json, {} if there was none."""
        return self.manifest["mllm_training"] or {}

    @property
    def layers(self) -> list[str]:
        """Sites of layers 0 to L: the adapter and the decoder layers."""
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
        """Counts of the main variant."""
        return Counts(**{name: self._tensors[name] for name in Counts._fields if name in self._tensors})

    def counts_of(self, variant: str | None) -> Counts:
        """Return the counts of a variant, None for the main one; further variants have one patch per image.

        Raises:
            UserError: If the run has no such variant, or its counts are damaged.
        """
        if variant is None:
            return self.counts
        if variant not in self.metrics["recipes"]:
            raise UserError(
                f"{self.path} has no variant {variant!r}; it has {', '.join(self.metrics['recipes']) or 'none'}"
            )
        tensors, labelled = read_tensors(self.path / "recipes.safetensors"), self.counts.labelled
        names = [f"{variant}/{name}" for name in ("intersection", "predicted")]
        check_counts(tensors, self.path / "recipes.safetensors", self._sizes, names)
        intersection, predicted = (tensors[name] for name in names)
        right, valid = intersection.sum(-1, keepdim=True), labelled.sum(-1, keepdim=True)
        return Counts(intersection, predicted, labelled, patch_right=right, patch_valid=valid)

    def path_counts(self, instrument: str) -> list[tuple[Counts, torch.Tensor]]:
        """Return counts and summed losses per image, f64[S, N], at each strength; counts have one patch per image.

        Args:
            instrument: A key of metrics.json["path"] with strengths: "closed_form" or "optimum".

        Raises:
            UserError: If the run has no such path, or its file is damaged.
        """
        solved, path = (self.metrics.get("path") or {}).get(instrument), self.path / "path.safetensors"
        if solved is None:
            raise UserError(f"{self.path} has no path of the instrument {instrument!r} (`probes solve`)")
        tensors, labelled = read_tensors(path), self.counts.labelled
        sizes = self._sizes | {"R": len(solved["strengths"])}
        check_path(tensors, path, sizes, instrument)
        intersection, predicted, loss = (tensors[f"{instrument}/{name}"] for name in PATH)
        valid = labelled.sum(-1, keepdim=True)
        return [
            (Counts(right, total, labelled, patch_right=right.sum(-1, keepdim=True), patch_valid=valid), losses)
            for right, total, losses in zip(intersection, predicted, loss, strict=True)
        ]

    @property
    def confusion(self) -> torch.Tensor | None:
        """i64[S, K, K]: pixels per site, label and prediction of the main variant; None if not counted."""
        return self._tensors.get("confusion")

    @property
    def groups(self) -> torch.Tensor | None:
        """i64[N]: group (city) of each validation image; None for a dataset without groups."""
        return self._tensors.get("group")

    def check_same_images(self, other: "ProbeRun", advice: str = "") -> None:
        """Raise a UserError that ends with `advice` unless both runs have the same images, read in the same way."""
        if self.manifest["data"]["fingerprint"] != other.manifest["data"]["fingerprint"]:
            raise UserError(f"{self.path} and {other.path} were scored on different images or classes{advice}")
        for key in ("image_resize", "dtype"):
            values = [run.metrics.get(key) for run in (self, other)]
            if None not in values and values[0] != values[1]:
                raise UserError(
                    f"{self.path} was scored with {key} {values[0]}, but {other.path} with {values[1]}{advice}"
                )

    def dataset(self, split: str = "validation"):
        """Return a split of the dataset.

        Raises:
            UserError: If its images or masks are not those of the run any more.
        """
        data = self.manifest["data"]
        task = data.get("task", "segmentation")
        dataset = open_dataset(data["dataset"], data["root"], split, data.get("options"), task)
        self._check_unchanged("data", lambda: split_identity(split, dataset))
        return dataset

    def _check_unchanged(self, section: str, compute: Callable[[], dict[str, str]]) -> None:
        """Raise unless the parts of the identity that `compute` returns are still those of the run."""
        if self.manifest.get("identity") is None:
            log.warning("%s does not record its %s; whether it has changed since is not checked", self.path, section)
            return
        now = compute()
        saved = {key: value for key, value in self.manifest["identity"][section].items() if key in now}
        advice = "restore what was probed, or make the run again"
        check_same_identity({section: saved}, {section: now}, str(self.path), advice)

    @cached_property
    def weights(self) -> torch.Tensor:
        """f[R, N]: bootstrap weights, the same for every run on these images."""
        return bootstrap_weights(len(self.counts.labelled), groups=self.groups)

    def mllm(self) -> "FrozenMLLM":
        """Load the probed model with the settings of the run.

        Raises:
            UserError: If it cannot be loaded, or its weights or config are not those that were probed.
        """
        config = rename_old_keys(self.manifest["config"])
        check_schema(ModelConfig, config, f"{self.path / 'manifest.json'}: config")
        from probes.models.load import load  # transformers takes seconds to import, and a report needs no model

        self._check_unchanged("model", lambda: named_identity({"mllm": config["mllm"]}))
        return load(
            config["mllm"],
            config["image_attention"],
            dtype=config["dtype"],
            image_resize=config["image_resize"],
            prefix=config.get("prefix"),
            untrained=config["untrained"] or (),
            match=config.get("match", "none"),
            draw=config.get("draw", 0),
            update_scales=config.get("update_scales"),
            seed=config["seed"],
        )

    def probes(self) -> dict[str, Probe]:
        """Return the main variant's probe of each site, in eval mode."""
        tensors, settings = read_tensors(self.path / "probes.safetensors"), self.metrics["probe"]
        classes, grid = len(self.metrics["classes"]), tuple(self.metrics["grid"])
        probes = {}
        for site in self.metrics["sites"]:
            prefix = f"{site['site']}."
            with error_context(self.path / "probes.safetensors"):
                probe = Probe(site["dim"], classes, grid, settings["feature_norm"], settings["head"])
                probe.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            probes[site["site"]] = probe.eval().requires_grad_(False)
        return probes

    @cached_property
    def _segmenter(self) -> tuple["FrozenMLLM", dict[str, Probe]]:
        mllm = self.mllm()
        return mllm, {site: probe.to(mllm.device) for site, probe in self.probes().items()}

    @property
    def peak_layer(self) -> str | None:
        """Decoder layer with the highest mIoU, if any was probed."""
        return self.metrics["summary"]["peak_site"]

    def check_site(self, site: str | None) -> str:
        """Return `site`, or the best decoder layer for None.

        Raises:
            UserError: If the run has no such site.
        """
        site = site or self.peak_layer or self.sites[0]
        if site not in self.sites:
            raise UserError(f"{self.path} has no site {site!r}; it has {', '.join(self.sites)}")
        return site

    @torch.no_grad()
    def predict(self, image: Image.Image, site: str | None = None):
        """Return the predicted class of each pixel of an image, as a NumPy array uint8[H, W].

        The model is loaded on the first call.

        Args:
            image: A PIL image of any size and 8-bit mode; its EXIF orientation is ignored.
            site: Site of the probe; None for the best decoder layer.

        Raises:
            UserError: If the run has no such site, or the image has more than 8 bits per channel.
        """
        site = self.check_site(site)
        mllm, probes = self._segmenter
        states = mllm.states(mllm.preprocess([image]), [site])[site]
        logits = probes[site](states.float()).transpose(-1, -2).unflatten(-1, mllm.grid)
        size = (image.height, image.width)
        return upsampled_argmax(logits[0], size, mllm.geometry.view(size)).to(torch.uint8).cpu().numpy()
