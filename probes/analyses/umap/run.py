"""`probes umap`: the patches of images in two dimensions, site by site (Sec. 3.3, Fig. 5).

UMAP exaggerates the separation of weak clusters. Two numbers from the original space accompany each map: nearest
neighbour purity and the silhouette of the classes.

Shapes: T patches, d width of a site.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import exclusive_run_lock, write_files
from probes.analyses.base import check_image
from probes.analyses.replacement import check_replaceable
from probes.models.sites import ADAPTER
from probes.runs.probe_run import ProbeRun
from probes.score.true_classes import true_classes

from . import UmapOptions, lacks_package


def umap_of_images(
    run: ProbeRun,
    images: Sequence[int],
    sites: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the content of umap.json.

    Args:
        run, images: A finished probe run, and indices in its validation split.
        sites: None for the paper's three: adapter, the layer half-way to the best one, the best layer.
        seed: Seed of UMAP.

    Returns:
        {"image_attention", "runs", "seed", "grid", "images": [{"image", "name", "labels": [T], "sites": [{"site",
        "xy": [[x, y]], "knn_purity", "silhouette"}]}]}. Label -1 marks unlabelled patches, which both numbers leave
        out. A number is None if there are too few labelled patches or classes.

    Raises:
        UserError: umap-learn is not installed, an image or site does not exist, or the run has no layer to choose sites
            by.
    """
    if missing := lacks_package():
        raise UserError(missing)
    dataset = run.dataset()
    mllm = run.mllm()
    classes = run.metrics["classes"]
    entries = []
    for image in images:
        check_image(image, len(dataset))
        sample = dataset[image]
        target = torch.from_numpy(sample["target"])[None]
        labels = true_classes(target, len(classes), mllm)[0]
        pixels = mllm.preprocess([sample["image"]])
        states = mllm.states(pixels, sites or _default_sites(run))
        embedded = []
        for site, x in states.items():
            points = embed(x[0].float().cpu(), labels, seed)
            embedded.append({"site": site} | points)
        entries.append(
            {
                "image": image,
                "name": sample["name"],
                "labels": labels.tolist(),
                "sites": embedded,
            }
        )
    header = {
        "image_attention": run.mask,
        "runs": [run.fingerprint],
        "seed": seed,
    }
    return header | {"grid": list(mllm.grid), "images": entries}


def embed(states: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    """Return the UMAP of states f[T, d], and purity and silhouette of labels long[T] (-1 unknown) by cosine."""
    from sklearn.metrics import silhouette_score  # these take seconds to import
    from umap import UMAP

    from probes.score.knn_purity import knn_purity

    x = states.numpy()
    threads = torch.get_num_threads()
    xy = UMAP(
        n_neighbors=min(15, len(x) - 1),
        metric="cosine",
        random_state=seed,
        n_jobs=1,
    ).fit_transform(x)
    # numba sets all cores, and sums of other threads have other last bits
    torch.set_num_threads(threads)
    purity = knn_purity(F.normalize(states, dim=-1)[None], labels[None]).item()
    known = labels >= 0
    silhouette = None
    if 1 < len(labels[known].unique()) < known.sum():
        silhouette = float(silhouette_score(x[known], labels[known], metric="cosine"))
    return {
        "xy": xy.round(4).tolist(),
        "knn_purity": None if np.isnan(purity) else purity,
        "silhouette": silhouette,
    }


def _default_sites(run: ProbeRun) -> list[str]:
    peak = run.peak_layer
    layers = [site for site in run.layers if site != ADAPTER]
    if peak is None:
        raise UserError(
            f"{run.path} has no decoder layer, and so no best one; choose --sites among those of the model"
        )
    start = ADAPTER if run.has_llm else layers[0]
    half_way = layers[layers.index(peak) // 2]
    return list(dict.fromkeys([start, half_way, peak]))


def _made_from(results: dict[str, Any]) -> dict[str, Any]:
    images = results["images"]
    sites = [site["site"] for site in images[0]["sites"]]
    return results | {"image": [image["image"] for image in images], "sites": sites}


def run(options: UmapOptions) -> None:
    """Run `probes umap`."""
    run = ProbeRun(options.probes, trust=options.trust)
    out = options.folder
    sites = options.sites or _default_sites(run)
    made_from = {
        "runs": [run.fingerprint],
        "seed": options.seed,
        "image": options.image,
        "sites": sites,
    }
    with exclusive_run_lock(out, "umap.json"):
        check_replaceable(out / "umap.json", made_from, options.overwrite, _made_from)
        results = umap_of_images(run, options.image, sites, options.seed)
        write_files({out / "umap.json": results})
    for image in results["images"]:
        for site in image["sites"]:
            purity = "–" if site["knn_purity"] is None else f"{site['knn_purity']:.2f}"
            silhouette = "–" if site["silhouette"] is None else f"{site['silhouette']:.2f}"
            print(f"{image['name']}, {site['site']}: knn_purity {purity}, silhouette {silhouette}")
