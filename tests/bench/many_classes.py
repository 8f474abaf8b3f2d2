"""Write photos with masks of any number of classes, to time `probes solve` by classes.

    python tests/bench/many_classes.py PHOTOS K OUT

PHOTOS has images/{training,validation}; 40 and 10 of them are taken, evenly. The class of a block of 8 x 8 px is its
cluster among K of mean and deviation of the colours.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.cluster import MiniBatchKMeans

BLOCK = 8  # px
PHOTOS = {"training": 40, "validation": 10}


def blocks_of(file: Path) -> np.ndarray:
    """Mean and deviation of the colours of each block, f[rows, columns, 6]."""
    pixels = np.asarray(Image.open(file).convert("RGB"), float)
    rows, columns = pixels.shape[0] // BLOCK, pixels.shape[1] // BLOCK
    pixels = pixels[: rows * BLOCK, : columns * BLOCK]
    blocks = pixels.reshape(rows, BLOCK, columns, BLOCK, 3)
    return np.concatenate([blocks.mean((1, 3)), blocks.std((1, 3))], -1)


def main(photos: Path, classes: int, out: Path) -> None:
    blocks: dict[tuple[str, Path], np.ndarray] = {}
    for split, count in PHOTOS.items():
        files = sorted((photos / "images" / split).iterdir())
        for file in files[:: len(files) // count][:count]:
            blocks[split, file] = blocks_of(file)
    points = [x.reshape(-1, 6) for (split, _), x in blocks.items() if split == "training"]
    clusters = MiniBatchKMeans(classes, random_state=0, n_init=1, batch_size=8192)
    clusters.fit(np.concatenate(points))
    for (split, file), features in blocks.items():
        for kind in ("images", "annotations"):
            (out / kind / split).mkdir(parents=True, exist_ok=True)
        labels = clusters.predict(features.reshape(-1, 6)).reshape(features.shape[:2])
        labels = labels.repeat(BLOCK, 0).repeat(BLOCK, 1)
        width, height = Image.open(file).size
        missing = [(0, height - labels.shape[0]), (0, width - labels.shape[1])]
        mask = Image.fromarray(np.pad(labels, missing, mode="edge").astype(np.uint16))
        mask.save(out / "annotations" / split / f"{file.stem}.png")
        (out / "images" / split / file.name).symlink_to(file.resolve())
    names = {"classes": [f"cluster {k}" for k in range(classes)], "ignore_index": 65_535}
    (out / "classes.json").write_text(json.dumps(names))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
