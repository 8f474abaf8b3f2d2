"""`probes umap`: the patches of images in two dimensions, site by site (Sec. 3.3, Fig. 5).

UMAP exaggerates the separation of weak clusters. Two numbers from the original space accompany each map: nearest
neighbour purity and the silhouette of the classes.

    umap.json   {"grid", "images": [{"image", "name", "labels": [T], "sites": [{"site", "xy": [[x, y]], "knn_purity",
                "silhouette"}]}]}; label -1 marks unlabelled patches, which both numbers leave out. A number is None if
                there are too few labelled patches or classes.

Shapes: T patches, d width of a site.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypedDict

from llava_bidir.common.cli import Indices, Seed
from llava_bidir.common.errors import UserError
from probes.analyses.analysis import Analysis, PlannedRun, Result, RunOptions, check_images
from probes.models.sites import ADAPTER, PATCHES, is_layer

if TYPE_CHECKING:  # this module answers `probes --help`
    from torch import Tensor

    from probes.runs.read import ProbeRun

NEIGHBOURS = 10


@dataclass(frozen=True, kw_only=True)
class UmapOptions(RunOptions):
    """What to embed.

    Args:
        image: Indices in the validation split.
        sites: Sites (default: adapter, half-way, best layer).
        seed: Random seed of UMAP.
    """

    image: Indices = (0,)
    sites: tuple[str, ...] | None = None
    seed: Seed = 0


def lacks_package() -> str:
    """Return how to install what projects the patches, "" if it is installed."""
    if find_spec("umap") is None:
        return "umap-learn is not installed; run: pip install 'llava-bidir[figures]'"
    return ""


def lacks(run: PlannedRun, options: Mapping[str, Any]) -> str:
    """Return that the package, or the probe of a planned run at a default site, is missing, "" if none is."""
    if missing := lacks_package():
        return missing
    start = ADAPTER if run.has_llm else PATCHES
    if "sites" in options or (start in run.sites and any(map(is_layer, run.sites))):
        return ""
    return f"no probes at {start} and a later layer; choose others by --add umap.sites=SITE,SITE"


def complete(run: "ProbeRun", options: UmapOptions) -> UmapOptions:
    """Return the options with the paper's three sites by default: adapter, half-way to the best layer, best layer.

    Raises:
        UserError: umap-learn is not installed, or the run has no layer to choose sites by.
    """
    if missing := lacks_package():
        raise UserError(missing)
    peak = run.peak_layer
    if options.sites:
        return options
    if peak is None:
        raise UserError(
            f"{run.path} has no decoder layer, and so no best one; choose --sites among those of the model"
        )
    layers = [site for site in run.layers if site != ADAPTER]
    start = ADAPTER if run.has_llm else layers[0]
    half_way = layers[layers.index(peak) // 2]
    return replace(options, sites=tuple(dict.fromkeys([start, half_way, peak])))


def measure(run: "ProbeRun", options: UmapOptions) -> Result:
    """Return the places of the patches of each image at each site."""
    dataset = run.dataset()
    check_images(options.image, len(dataset))
    mllm = run.mllm()
    images = []
    for image in options.image:
        sample = dataset[image]
        labels = mllm.geometry.patches(sample["target"]).flatten()
        states = mllm.states(mllm.preprocess([sample["image"]]), options.sites)
        entry = {
            "image": image,
            "name": sample["name"],
            "labels": labels.tolist(),
            "sites": [
                embed(site, states=x[0].float().cpu(), labels=labels, seed=options.seed)
                for site, x in states.items()
            ],
        }
        images.append(entry)
    return Result({"grid": list(mllm.grid), "images": images})


class SiteEmbedding(TypedDict):
    """The patches of an image at a site."""

    site: str
    xy: list[list[float]]
    knn_purity: float | None
    silhouette: float | None


class ImageEmbedding(TypedDict):
    """The patches of an image at all sites."""

    image: int
    name: str
    labels: list[int]
    sites: list[SiteEmbedding]


class UmapResults(TypedDict):
    """Content of umap.json."""

    grid: list[int]
    images: list[ImageEmbedding]


def embed(site: str, states: "Tensor", labels: "Tensor", seed: int) -> SiteEmbedding:
    """Return the UMAP of states f[T, d], and purity and silhouette of labels long[T] (-1 unknown) by cosine."""
    import torch
    from sklearn.metrics import silhouette_score
    from umap import UMAP

    x = states.numpy()
    threads = torch.get_num_threads()
    xy = UMAP(
        n_neighbors=min(15, len(x) - 1), metric="cosine", random_state=seed, n_jobs=1
    ).fit_transform(x)
    # numba sets all cores, and sums of other threads have other last bits
    torch.set_num_threads(threads)
    labelled = labels >= 0
    silhouette = None
    if 1 < len(labels[labelled].unique()) < labelled.sum():
        silhouette = float(silhouette_score(x[labelled], labels[labelled], metric="cosine"))
    return {
        "site": site,
        "xy": xy.round(4).tolist(),
        "knn_purity": knn_purity(states[labelled], labels[labelled]),
        "silhouette": silhouette,
    }


def knn_purity(states: "Tensor", labels: "Tensor") -> float | None:
    """Return the share of the 10 nearest patches, by cosine, that have a patch's label: a mean over patches.

    Args:
        states: f[T, d], of labelled patches; None is returned for fewer than 11.
        labels: long[T].
    """
    from torch.nn.functional import normalize

    if len(labels) <= NEIGHBOURS:
        return None
    unit = normalize(states, dim=-1)
    cosine = (unit @ unit.T).fill_diagonal_(float("-inf"))
    nearest = cosine.topk(NEIGHBOURS).indices
    return (labels[nearest] == labels[:, None]).double().mean().item()


def lines(results: UmapResults) -> Iterator[str]:
    """Yield both numbers of each image and site."""
    for image in results["images"]:
        for site in image["sites"]:
            numbers = []
            for name in ("knn_purity", "silhouette"):
                text = "–"
                if site[name] is not None:
                    text = format(site[name], ".2f")
                numbers.append(f"{name} {text}")
            yield f"{image['name']}, {site['site']}: {', '.join(numbers)}"


ANALYSIS = Analysis(
    name="umap",
    help="embed the patches of images in two dimensions, by site (Fig. 5), into RUN/umap.json",
    question="Do the patches of one class lie together, layer by layer? Illustrations, no evidence.",
    options=UmapOptions,
    measure=measure,
    complete=complete,
    lines=lines,
    lacks=lacks,
    title="UMAP",
    section="probes.analyses.umap.umap_section:section",
    paper="Sec. 3.3, Fig. 5",
    arms=("trained", "probes"),
    of_encoders=True,
)
