"""A finished run of probes of any task, read back for the analyses; `write.py` writes its files.

    RUN/metrics.json          scores per site with intervals; "task" and "scores" of another task than segmentation
    RUN/counts.safetensors    what the task counts of each image, from which the scores are computed (probes/tasks)
    RUN/effects.safetensors   effects with their resamplings, from which a report evaluates claims
    RUN/probes.safetensors    the probes of their best epochs: "SITE.head.weight"
    RUN/manifest.json         versions, commit, configuration, data, hardware, SHA-256 of the files above

Files are written atomically, metrics.json last: it marks the run as finished.

Axes: S sites, N images, M sums per image.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llava_bidir.common.bootstrap import RESAMPLINGS, bootstrap_weights
from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json, sha256
from llava_bidir.common.hf import DTYPE_ADVICE
from llava_bidir.common.identity import check_same_identity, code_of_user, named_identity
from llava_bidir.common.images import PhotoLike, read_photo
from llava_bidir.common.imports import HINT
from probes.data.registry import identity_of_splits, open_split
from probes.heads import Probe, factory_of
from probes.models.sites import ADAPTER, is_layer
from probes.ops.geometry import Geometry
from probes.ops.pixel_counts import Counts
from probes.runs.files import open_tensors, read_tensors
from probes.score.effects import EFFECTS_FILE, EffectSource, read_effect_file
from probes.score.estimate import Estimate, dataset_scores, resampled_scores
from probes.score.strengths import CLOSED_FORM, Strengths
from probes.tasks import SEGMENTATION, TASKS

if TYPE_CHECKING:
    from probes.models.frozen_mllm import FrozenMLLM
    from probes.models.knockout import Knockout

NUMBERS_AT_ONCE = 2**20  # 8 MB in float64, of which scores take a few copies
PROBES_FILE = "probes.safetensors"


@dataclass
class ProbeRun:
    """A finished run of any task.

    Args:
        path: Folder of the run.
        model: Name of the model in a report, if it has been told one.
        label: What its user calls it, if that names a mask of a model.
        trust: Whether the model's code is run if it is a function in a file (probes/models/module_sources.py).

    Attributes:
        metrics, manifest: Contents of the JSON files.
        task_name, task: Task of the run, see `data.task`, and what its probes predict.
        mask: Attention mask among image tokens that the model ran with.
        draw: Number of the draw of random weights; 0 without such.
        has_llm: False if the model is a bare vision encoder.
        strengths: The path of strengths of a run of `probes solve`; None of another one.
        is_solved: True if the run was made by `probes solve`.
        probe_kind: How the probes were made: "solved" or "trained".
        head: Kind of the probes, see probes/heads.py.
        sites: All sites of the run, in the order of the forward.
        layers: Sites of layers 0 to L: the adapter and the decoder layers; of a bare encoder, all its layers.
        last_layer: The model's last layer, probed or not.
        peak_layer: Decoder layer with the best score, None if none was probed.
        training: Content of the model's training.json, {} if there was none.

    Raises:
        UserError: If `path` is not a finished run, or a JSON file is invalid or has changed since the run. Tensors are
            checked on first use.
    """

    path: Path
    model: str | None = None
    trust: bool = False
    label: str | None = None

    def __post_init__(self):
        self.path = Path(self.path)
        if not (self.path / "metrics.json").is_file():
            raise UserError(
                f"{self.path} has no metrics.json: not a finished probe run (`probes fit --out DIR`)"
            )
        metrics = self.metrics = read_json(self.path / "metrics.json")
        self.manifest = read_json(self.path / "manifest.json")
        self._written("metrics.json")
        self.task_name: str = metrics.get("task", SEGMENTATION)
        if self.task_name not in TASKS:
            raise UserError(
                f"{self.path} is a run of {self.task_name}; expected one of {', '.join(TASKS)}; {HINT}"
            )
        self.task = TASKS[self.task_name]
        self.mask: str = metrics["image_attention"]
        self.cut: str | None = metrics.get("cut")
        self.draw: int = metrics["draw"]
        self.has_llm = metrics["model_kind"] == "mllm"
        self.is_solved = "path" in metrics
        self.strengths: Strengths | None = None
        self.probe_kind = "trained"
        self.head: str = metrics["probe"]["head"]
        if self.is_solved:
            self.probe_kind = "solved"
            ((solver, strengths),) = metrics["path"].items()
            self.strengths = Strengths(
                strengths["sites"], score=self.task.score, exact=solver == CLOSED_FORM
            )
        self.sites: list[str] = [site["site"] for site in metrics["sites"]]
        self.layers = [site for site in self.sites if site == ADAPTER or is_layer(site)]
        self.last_layer: str | None = metrics["last_layer"]
        self.peak_layer: str | None = metrics["summary"]["peak_site"]
        self.training: dict[str, Any] = self.manifest["mllm_training"] or {}

    def check_classes(self) -> None:
        """Raise a UserError if the probes do not predict classes."""
        if self.task_name != SEGMENTATION:
            raise UserError(
                f"{self.path} has probes of the task {self.task_name}, but this is about classes; expected a run of "
                "segmentation"
            )

    def _written(self, name: str) -> Path:
        """Return the path of a file of the run.

        Raises:
            UserError: It is not the one that the run wrote.
        """
        path = self.path / name
        hashes = self.manifest.get("files", {})
        if name in hashes and not (path.is_file() and hashes[name] == sha256(path)):
            raise UserError(
                f"{path} is not the file that the run wrote: its SHA-256 is not the one in manifest.json; restore the "
                "file or make the run again"
            )
        return path

    @property
    def arm(self) -> str:
        """Which weights the model has: trained, random, permuted, adapter or untrained (probes/studies/README.md).

        It is "blank" of the trained model on blank pictures.
        """
        if self.metrics.get("blank"):
            return "blank"
        untrained = sorted(self.metrics["untrained"])
        match = self.metrics["match"]
        if untrained in (["llm"], ["encoder"]):
            return {"update": "random", "permuted": "permuted"}.get(match, "random, unmatched")
        return {(): "trained", ("adapter",): "adapter"}.get(tuple(untrained), "untrained")

    def check_site(self, site: str | None) -> str:
        """Return `site`, or the best decoder layer for None.

        Raises:
            UserError: If the run has no such site.
        """
        site = site or self.peak_layer or self.sites[0]
        if site not in self.sites:
            raise UserError(f"{self.path} has no site {site!r}; it has {', '.join(self.sites)}")
        return site

    @cached_property
    def fingerprint(self) -> str:
        """Hash of probes, settings and data, independent of the path; every analysis stores it."""
        settings = {key: value for key, value in self.manifest["config"].items() if key != "mllm"}
        text = json.dumps([settings, self.manifest["data"]["fingerprint"]], sort_keys=True)
        probes = (self.path / PROBES_FILE).read_bytes()
        return hashlib.sha256(text.encode() + probes).hexdigest()[:16]

    def analysis(self, name: str) -> dict[str, Any] | None:
        """Return the results of an analysis in the run's folder, None if there are none.

        Raises:
            UserError: If the file is damaged, or was made from other probes.
        """
        file = self.path / name
        if not file.is_file():
            return None
        results = read_json(file)
        if self.fingerprint not in results.get("runs", ()):
            raise UserError(
                f"{file} was made from other probes than {self.path} has now; run `probes {file.stem}` again or delete "
                "it"
            )
        return results

    # ------------------------------------------------------------------------------------------------ scores
    @cached_property
    def effects(self) -> dict[str, Estimate]:
        """The effects of the run's probes by name, with their resamplings: what claims are differences of.

        They are in units of its main score.

        Raises:
            UserError: The file is damaged.
        """
        return read_effect_file(self._written(EFFECTS_FILE))[0]

    def effects_among(self, layers: Sequence[str]) -> dict[str, Estimate]:
        """Return the effects of the run's scores with the best of these layers only; other sites are as they are."""
        sites = [site for site in self.sites if site in layers or site not in self.layers]
        last = None if self.has_llm else self.last_layer
        source = EffectSource(
            sites, last_layer=last, task=self.task, weights=self.weights, groups=self.groups
        )
        return source.effects(self.sums_at(sites))

    @cached_property
    def _counts_file(self) -> Path:
        return self._written("counts.safetensors")

    def _counted(self, names: Sequence[str], sites: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return what was counted of each image by name; only these sites are read.

        Those of all sites would be gigabytes: 34 sites x 2,000 images x 150 classes are 80 MB a tensor, 34 x 2,000 x
        576 tokens 313 MB.
        """
        rows = [self.sites.index(site) for site in sites]
        tensors = {}
        with open_tensors(self._counts_file) as file:
            for name in {*names}.intersection(file.keys()):
                counts = file.get_slice(name)
                if len(counts.get_shape()) > 2:  # of each site
                    tensors[name] = torch.cat([counts[row : row + 1] for row in rows])
                else:
                    tensors[name] = counts[:]
        return tensors

    @property
    def counts(self) -> Counts:
        """Counts of probes of classes."""
        return Counts(**self._counted(Counts._fields, self.sites))

    @property
    def patch_classes(self) -> Tensor:
        """Class of most labelled pixels under each token, long[N, T]; -1 if none is labelled."""
        return self._counted(["patch_class"])["patch_class"]

    @property
    def groups(self) -> Tensor | None:
        """i64[N]: group (city) of each validation image; None for a dataset without groups, or with one."""
        groups = self._counted(["group"]).get("group")
        if groups is None or (groups == groups[0]).all():
            return None
        return groups

    @property
    def units(self) -> int:
        """Number of validation images, or of their groups."""
        if self.groups is None:
            return self.metrics["images"]
        return len(self.groups.unique())

    @cached_property
    def units_by_class(self) -> list[int]:
        """In how many validation images each class is labelled; of images in groups, in how many groups."""
        sums = self.sums_at(self.sites[:1])[0]
        labelled = sums.unflatten(-1, (3, -1))[:, 2] > 0  # [N, K]
        if self.groups is not None:
            of_groups = []
            for group in self.groups.unique():
                of_groups.append(labelled[self.groups == group].any(0))
            labelled = torch.stack(of_groups)
        return labelled.sum(0).tolist()

    @property
    def units_of_class(self) -> float:
        """Number of validation images, or of their groups, that have a class that is in any, on average."""
        if self.task_name != SEGMENTATION:
            return self.units
        labelled = [units for units in self.units_by_class if units]
        return sum(labelled) / max(1, len(labelled))

    def sums_at(self, sites: Sequence[str]) -> Tensor:
        """Return the sums per image at some sites, from which scores are computed, [S, N, M]; only these are read."""
        return self.task.sums(self._counted(self.task.summed, sites))

    @cached_property
    def weights(self) -> Tensor:
        """f[R, N]: bootstrap weights, the same for every run on these images."""
        groups = self.groups
        if groups is not None:
            groups = tuple(groups.tolist())  # a key of the cache
        return _weights(self.metrics["images"], groups)

    @cached_property
    def site_scores(self) -> dict[str, Estimate]:
        """The main score of each site, with its values under resampling of the images."""
        score = self.task.score
        weights = self.weights
        values: list[float] = []
        # at once: small tensors between large ones that are freed would keep the memory of these
        drawn = torch.empty(len(self.sites), len(weights), dtype=torch.float64)
        # sites in parts whose sums, also those of all resamplings, have at most so many numbers
        numbers = self.sums_at(self.sites[:1]).shape[-1] * max(RESAMPLINGS, self.metrics["images"])
        size = max(1, NUMBERS_AT_ONCE // numbers)
        for first in range(0, len(self.sites), size):
            sums = self.sums_at(self.sites[first : first + size])
            resampled = resampled_scores(self.task, sums, weights)[score]
            drawn[first : first + size] = resampled.T
            values += dataset_scores(self.task, sums)[score].tolist()
        estimates = map(Estimate, values, drawn)
        return dict(zip(self.sites, estimates, strict=True))

    # ---------------------------------------------------------------------------------------- data, model, probes
    def dataset(self, split: str = "validation"):
        """Return a split of the dataset.

        Raises:
            UserError: If its images or masks are not those of the run any more.
        """
        data = self.manifest["data"]
        dataset = open_split(
            self.task, data["dataset"], root=data["root"], split=split, options=data["options"]
        )
        self._check_unchanged("data", identity_of_splits({split: dataset}))
        return dataset

    def _check_unchanged(self, section: str, now: dict[str, str]) -> None:
        """Raise unless these parts of the identity are still those of the run."""
        identity = self.manifest["identity"][section]
        saved = {key: value for key, value in identity.items() if key in now}
        check_same_identity(
            {section: saved},
            current={section: now},
            source=str(self.path),
            advice="restore what was probed, or make the run again",
        )

    def mllm(self) -> "FrozenMLLM":
        """Load the probed model with the settings of the run.

        Raises:
            UserError: If it cannot be loaded, its weights or config are not those that were probed, or it is in a
                Python file that is not trusted.
        """
        # transformers takes seconds to import, and a report needs no model
        from probes.models.load import load
        from probes.models.module_sources import check_trusted, source_identity
        from probes.site_probes import LOADED

        config = self.manifest["config"]
        if not self.trust:
            check_trusted(config["mllm"], self.path)
        self._check_unchanged("model", named_identity({"mllm": source_identity(config["mllm"])}))
        return load(
            config["mllm"],
            config["image_attention"],
            untrained=config["untrained"] or (),
            update_scales=config["update_scales"],
            trust=self.trust,
            **{name: config.get(name) for name in LOADED},
        )

    @cached_property
    def geometry(self) -> Geometry:
        """How the model sees images; of a checkpoint without reading its weights.

        Raises:
            UserError: The model's grid is not that of the run any more.
        """
        from probes.models.load import read_geometry
        from probes.models.module_sources import is_source

        config = self.manifest["config"]
        if is_source(config["mllm"]):
            return self.mllm().geometry
        options = {name: config.get(name) for name in ("image_px", "image_resize", "stride_px")}
        geometry = read_geometry(config["mllm"], trust=self.trust, **options)
        if list(geometry.grid) != self.metrics["grid"]:
            raise UserError(
                f"{config['mllm']} has {geometry.grid} patches now, and {self.path} was made with "
                f"{self.metrics['grid']}; restore what was probed, or make the run again"
            )
        return geometry

    def _tensors_of_sites(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights and statistics of each site's probe by name.

        Raises:
            UserError: They are damaged, not those that the run wrote, or not finite.
        """
        path = self._written(PROBES_FILE)
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in read_tensors(path).items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"{path}: {name} is not finite; make the run again, in another dtype or with a lower learning "
                    f"rate: {DTYPE_ADVICE}"
                )
            site, _, part = name.partition(".")
            tensors.setdefault(site, {})[part] = tensor
        return tensors

    @cached_property
    def content(self) -> dict[str, str]:
        """Digest of the probe at each site."""
        digests = {}
        for site, tensors in self._tensors_of_sites().items():
            numbers = [tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors)]
            digests[site] = hashlib.sha256(b"".join(numbers)).hexdigest()
        return digests

    def probes(self) -> dict[str, Probe]:
        """Return the probe of each site, in eval mode.

        Raises:
            UserError: They are damaged, not those that the run wrote, or not finite.
        """
        tensors = self._tensors_of_sites()
        settings = self.metrics["probe"]
        self._check_unchanged("settings", code_of_user(factory_of(settings["head"])))
        channels = self.task.channels or len(self.metrics["classes"])
        probes = {}
        for entry in self.metrics["sites"]:
            site = entry["site"]
            probe = Probe(
                width=entry["dim"],
                classes=channels,
                grid=tuple(self.metrics["grid"]),
                feature_norm=settings["feature_norm"],
                head=settings["head"],
            )
            probe.load_state_dict(tensors[site])
            probes[site] = probe.eval().requires_grad_(False)
        return probes

    @cached_property
    def loaded(self) -> tuple["FrozenMLLM", dict[str, Probe]]:
        """The model, and the probe of each site on its device."""
        mllm = self.mllm()
        return mllm, {site: probe.to(mllm.device) for site, probe in self.probes().items()}

    def predict(self, image: PhotoLike, site: str | None = None) -> np.ndarray:
        """Return the prediction for each pixel of an image: its class, uint8[H, W], or that of another task.

        Predictions of other tasks are f32[H, W] or f32[H, W, 3], in the format of the targets. The model is loaded on
        the first call.

        Args:
            image: Path of a photo, or a PIL image of any size and 8-bit mode. It is turned as its EXIF tag says, so
                that H and W are those that viewers show; images of data sets have no tag.
            site: Site of the probe; None for the best decoder layer.

        Raises:
            UserError: If the run has no such site, or the image cannot be read or has more than 8 bits per channel.
        """
        return self.predict_sites(image, [self.check_site(site)])[0]

    @torch.no_grad()
    def predict_sites(
        self, image: PhotoLike, sites: list[str], knockout: "Knockout | None" = None
    ) -> np.ndarray:
        """Return :meth:`predict` at several sites from one forward, with the sites as first axis."""
        mllm, probes = self.loaded
        photo = read_photo(image)
        pixels = mllm.preprocess(photo)

        def read(pixels: Tensor) -> Tensor:
            states = mllm.states(pixels, sites, knockout)
            outputs = torch.stack([probes[site](states[site].float()) for site in sites])
            return outputs.transpose(-1, -2).unflatten(-1, mllm.grid)

        grids = read(pixels)
        if self.manifest["config"].get("flip"):
            grids = (grids + read(pixels.flip(-1)).flip(-1)) / 2
        size = (photo.height, photo.width)
        logits = mllm.geometry.join(grids, size)
        return self.task.predict_pixels(logits, size, mllm.geometry.view(size))


@lru_cache(maxsize=2)
def _weights(images: int, groups: tuple[int, ...] | None) -> Tensor:
    """Return the bootstrap weights f[R, N] of images, once for all runs on them."""
    if groups is None:
        return bootstrap_weights(images)
    return bootstrap_weights(images, groups=torch.tensor(groups))


def finished_runs(folder: str | Path) -> list[Path]:
    """Return the folders of all finished runs, trained models first, draws in order."""
    folder = Path(folder)
    runs: set[Path] = set()
    for pattern in ("*", "*/*", "*/*/*"):
        runs |= {file.parent for file in folder.glob(f"{pattern}/metrics.json")}

    def order(run: Path) -> tuple:
        name = run.relative_to(folder).parts
        padded = [re.sub(r"\d+", lambda digits: digits[0].zfill(9), part) for part in name]
        return not run.name.startswith(("trained", "probes")), padded

    return sorted(runs, key=order)
