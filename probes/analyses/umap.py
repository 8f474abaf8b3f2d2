"""`probes umap`: the patches of one image in two dimensions, site by site. (Sec. 3.3, Fig. 5)

UMAP pulls weak clusters apart until they look clear, so two numbers from the original space stand beside each picture:
the share of a patch's nearest neighbours that have its class, and the silhouette of the classes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from ..metrics import patch_labels
from ..mllm import ADAPTER
from ..results import ProbeRun, peak_layer, write_json

NEIGHBOURS = 10


def umap_of_image(run: ProbeRun, image: int, sites: list[str] | None = None, seed: int = 0) -> dict:
    """What umap.json holds for one image.

    Args:
        run: A finished probe run.
        image: Its index in the validation split.
        sites: None takes the paper's three: adapter, a layer half-way to the best one, the best layer.
        seed: Of UMAP.

    Returns:
        {"image", "name", "grid", "labels": [T], "sites": [{"site", "xy": [[x, y]], "knn_purity", "silhouette"}]};
        label -1 marks unlabelled patches, which are left out of the numbers.
    """
    from sklearn.metrics import silhouette_score  # these three take seconds to import
    from sklearn.neighbors import NearestNeighbors
    from umap import UMAP

    dataset, mllm = run.dataset(), run.mllm()
    if not 0 <= image < len(dataset):
        raise ValueError(f"image {image} is out of range; the split has images 0..{len(dataset) - 1}")
    sample = dataset[image]
    target = torch.from_numpy(sample["target"])[None]
    view = mllm.geometry.view(target.shape[1:])
    labels = patch_labels(target, len(run.metrics["classes"]), mllm.grid, view=view)[0].numpy()
    states = mllm.states(mllm.preprocess([sample["image"]]), sites or _default_sites(run))
    known = labels >= 0
    entries = []
    for site, state in states.items():
        x = state[0].float().cpu().numpy()
        xy = UMAP(n_neighbors=min(15, len(x) - 1), metric="cosine", random_state=seed, n_jobs=1).fit_transform(x)
        count = min(NEIGHBOURS + 1, int(known.sum()))
        nearest = NearestNeighbors(n_neighbors=count, metric="cosine").fit(x[known])
        neighbours = nearest.kneighbors(x[known], return_distance=False)[:, 1:]
        several = len(np.unique(labels[known])) > 1
        entries.append(
            {
                "site": site,
                "xy": xy.round(4).tolist(),
                "knn_purity": float((labels[known][neighbours] == labels[known][:, None]).mean()),
                "silhouette": float(silhouette_score(x[known], labels[known], metric="cosine")) if several else None,
            }
        )
    return {
        "image": image,
        "name": sample["name"],
        "image_attention": run.metrics["image_attention"],
        "grid": list(mllm.grid),
        "labels": labels.tolist(),
        "sites": entries,
    }


def _default_sites(run: ProbeRun) -> list[str]:
    peak = peak_layer({entry["site"]: entry["miou"] for entry in run.metrics["sites"]})
    layers = run.layers[1:]
    return list(dict.fromkeys([ADAPTER, layers[layers.index(peak) // 2], peak]))


def run(args: argparse.Namespace) -> None:
    """`probes umap`."""
    facts = umap_of_image(ProbeRun(args.probes), args.image, args.sites, args.seed)
    write_json(Path(args.out or args.probes) / "umap.json", facts)
    for entry in facts["sites"]:
        print(f"{entry['site']}: {entry['knn_purity']:.0%} of the nearest {NEIGHBOURS} neighbours share the class")
