"""`probes umap`: the patches of images in two dimensions, site by site. (Sec. 3.3, Fig. 5)

UMAP pulls weak clusters apart until they look clear, so two numbers from the original space stand beside each picture:
the share of a patch's nearest neighbours that have its class, and the silhouette of the classes.

Shapes: T patches, d width of a site.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.errors import UserError
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.evaluation.metrics import peak_layer, true_classes
from probes.models.frozen_mllm import ADAPTER
from probes.results.probe_run import ProbeRun

NEIGHBOURS = 10


def umap_of_images(
    run: ProbeRun,
    images: Sequence[int],
    sites: Sequence[str] | None = None,
    seed: int = 0,
    projector: Path | None = None,
) -> dict:
    """What umap.json holds.

    Args:
        run: A finished probe run.
        images: Indices in the validation split.
        sites: None takes the paper's three: adapter, a layer half-way to the best one, the best layer.
        seed: Of UMAP.
        projector: Folder for TensorBoard's embedding projector: every patch's state with its class.

    Returns:
        {"image_attention", "runs", "grid", "images": [{"image", "name", "labels": [T], "sites": [{"site",
        "xy": [[x, y]], "knn_purity", "silhouette"}]}]}; label -1 marks unlabelled patches, which are left out of the
        numbers; a number is None where there are too few patches or classes for it.

    Raises:
        UserError: An image or a site that there is not.
    """
    dataset, mllm, names = run.dataset(), run.mllm(), run.metrics["classes"]
    entries, board = [], _writer(projector)
    for image in images:
        if not 0 <= image < len(dataset):
            raise UserError(f"image {image} is out of range; the split has images 0..{len(dataset) - 1}")
        sample = dataset[image]
        labels = true_classes(torch.from_numpy(sample["target"])[None], len(names), mllm)[0].numpy()
        states = mllm.states(mllm.preprocess([sample["image"]]), sites or _default_sites(run))
        entry = {"image": image, "name": sample["name"], "labels": labels.tolist(), "sites": []}
        for site, state in states.items():
            x = state[0].float().cpu()
            entry["sites"].append({"site": site} | _two_dimensions(x.numpy(), labels, seed))
            if board:
                metadata = [names[k] if k >= 0 else "unlabelled" for k in labels]
                board.add_embedding(x, metadata, tag=f"{sample['name']}/{site}")
        entries.append(entry)
    if board:
        board.close()
    facts = {"image_attention": run.metrics["image_attention"], "runs": [run.fingerprint]}
    return facts | {"grid": list(mllm.grid), "images": entries}


def _two_dimensions(x: np.ndarray, labels: np.ndarray, seed: int) -> dict:
    """UMAP of states f[T, d] and how far their classes (long[T], -1 unknown) lie together in the original space."""
    from sklearn.metrics import silhouette_score  # these three take seconds to import
    from sklearn.neighbors import NearestNeighbors
    from umap import UMAP

    xy = UMAP(n_neighbors=min(15, len(x) - 1), metric="cosine", random_state=seed, n_jobs=1).fit_transform(x)
    known = labels >= 0
    x, labels = x[known], labels[known]
    purity = silhouette = None
    if len(x) > 1:
        neighbours = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(x) - 1), metric="cosine").fit(x)
        nearest = neighbours.kneighbors(return_distance=False)  # of each patch, itself left out
        purity = float((labels[nearest] == labels[:, None]).mean())
    if 1 < len(np.unique(labels)) < len(x):
        silhouette = float(silhouette_score(x, labels, metric="cosine"))
    return {"xy": xy.round(4).tolist(), "knn_purity": purity, "silhouette": silhouette}


def _default_sites(run: ProbeRun) -> list[str]:
    peak = peak_layer({entry["site"]: entry["miou"] for entry in run.metrics["sites"]})
    layers = run.layers[1:]
    return list(dict.fromkeys([ADAPTER, layers[layers.index(peak) // 2], peak]))


def _writer(folder: Path | None):
    """A TensorBoard writer into an empty folder: the projector's list of embeddings only ever grows."""
    if folder is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(folder)


def run(args: argparse.Namespace) -> None:
    """`probes umap`."""
    run, out = ProbeRun(args.probes), Path(args.out or args.probes)
    projector = out / "projector" if args.tensorboard else None
    with exclusive_run_lock(out, "umap.json"):
        facts = umap_of_images(run, args.image, args.sites, args.seed, projector)
        write_files({out / "umap.json": facts})
    for entry in facts["images"]:
        for site in entry["sites"]:
            numbers = [
                f"{key} {'–' if site[key] is None else format(site[key], '.2f')}"
                for key in ("knn_purity", "silhouette")
            ]
            print(f"{entry['name']}, {site['site']}: {', '.join(numbers)}")
    if projector:
        print(f"tensorboard --logdir {projector}")
