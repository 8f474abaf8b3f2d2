"""The official layouts of the datasets, with tiny random images."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def picture(
    folder: Path,
    name: str,
    array: np.ndarray,
    **kwargs,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(folder / name, **kwargs)
    return folder / name


def photo(seed: int, size=(6, 9)) -> np.ndarray:
    return np.random.default_rng(seed).integers(
        0,
        256,
        (*size, 3),
        np.uint8,
    )


def labels(seed: int, values, size=(6, 9)) -> np.ndarray:
    """Random labels from `values`; all occur if there are enough pixels."""
    mask = np.random.default_rng(seed).choice(np.array(values, np.uint8), size)
    mask.flat[: len(values)] = values
    return mask


def write_ade20k(root: Path) -> Path:
    """Three training and two validation images, labels 0, 1, 2, 150."""
    for split, short, count in (("training", "train", 3), ("validation", "val", 2)):
        for i in range(1, count + 1):
            name = f"ADE_{short}_{i:08d}"
            picture(root / "images" / split, f"{name}.jpg", photo(i))
            picture(root / "annotations" / split, f"{name}.png", labels(i, [0, 1, 2, 150]))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\n")
    return root


def write_voc2012(root: Path, augmented: bool = True) -> Path:
    """Two official training images, one of the augmentation, two of validation; labels 0, 1, 20, 255."""
    for i, name in enumerate(("2007_000032", "2007_000039", "2007_000033", "2007_000042")):
        picture(root / "JPEGImages", f"{name}.jpg", photo(i))
        mask = Image.fromarray(labels(i, [0, 1, 20, 255])).convert("P")
        mask.putpalette([c for k in range(256) for c in (k, 255 - k, 3)])
        (root / "SegmentationClass").mkdir(exist_ok=True)
        mask.save(root / "SegmentationClass" / f"{name}.png")
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000039\n2007_000032\n")
    (lists / "val.txt").write_text("2007_000033\n2007_000042\n")
    picture(root / "JPEGImages", "2008_000002.jpg", photo(9))  # in no list but the augmented one
    if augmented:
        picture(root / "SegmentationClassAug", "2008_000002.png", labels(9, [0, 5, 20]))
        picture(root / "SegmentationClassAug", "2007_000032.png", labels(9, [0, 7]))
        (lists / "trainaug.txt").write_text("2008_000002\n2007_000032\n2007_000039\n")
    return root


def write_cityscapes(root: Path) -> Path:
    """Two cities of training, one of validation with two images; every label id, 0 to 33."""
    for split, city, count in (("train", "aachen", 2), ("train", "ulm", 1), ("val", "munster", 2)):
        for i in range(count):
            name = f"{city}_{i:06d}_000019"
            picture(root / "leftImg8bit" / split / city, f"{name}_leftImg8bit.png", photo(i))
            folder = root / "gtFine" / split / city
            picture(folder, f"{name}_gtFine_labelIds.png", labels(i, range(34)))
            picture(folder, f"{name}_gtFine_color.png", photo(i))
    return root


def depth_map(seed: int, size=(6, 9), high: int = 12_000) -> np.ndarray:
    """Random 16-bit values; the first is 0, no value."""
    values = np.random.default_rng(seed).integers(500, high, size).astype(np.uint16)
    values[0, 0] = 0
    return values


def write_cityscapes_depth(root: Path) -> Path:
    """The images of `write_cityscapes` with disparity and cameras, each with a focal length of its own."""
    for image in sorted(root.glob("leftImg8bit/*/*/*.png")):
        split, city, name = *image.parts[-3:-1], image.stem.removesuffix("_leftImg8bit")
        disparity = depth_map(len(name), high=33_000)
        disparity[0, 1] = 1
        picture(root / "disparity" / split / city, f"{name}_disparity.png", disparity)
        camera = {
            "extrinsic": {"baseline": 0.209313},
            "intrinsic": {"fx": 2262.52 + int(name[-13:-7])},
        }
        (root / "camera" / split / city).mkdir(parents=True, exist_ok=True)
        (root / "camera" / split / city / f"{name}_camera.json").write_text(json.dumps(camera))
    return root


def write_nyuv2(root: Path, size=(6, 9)) -> Path:
    """Two scenes of training, one of test, as written by BTS's script; depth up to 12 m."""
    for split, scene, numbers in (
        ("train", "bedroom", (5, 6)),
        ("train", "cafe", (2,)),
        ("test", "kitchen", (0, 1)),
    ):
        for number in numbers:
            picture(root / split / scene, f"rgb_{number:05d}.jpg", photo(number, size))
            picture(root / split / scene, f"sync_depth_{number:05d}.png", depth_map(number, size))
    return root


def unit_normals(seed: int, size=(6, 9)) -> np.ndarray:
    """Random unit vectors towards the viewer as 8-bit RGB; the first is black, no value."""
    vectors = np.random.default_rng(seed).standard_normal((*size, 3))
    vectors[..., 2] = abs(vectors[..., 2])
    encoded = (
        ((vectors / np.linalg.norm(vectors, axis=-1, keepdims=True) + 1) * 127.5)
        .round()
        .astype(np.uint8)
    )
    encoded[0, 0] = 0
    return encoded


def write_folder_targets(root: Path, size=(6, 9)) -> Path:
    """Two training images and one validation image with depth, normals and instances; masks of two classes."""
    for split, count in (("training", 2), ("validation", 1)):
        for i in range(count):
            picture(root / "images" / split, f"{i}.png", photo(i, size))
            picture(root / "depth" / split, f"{i}.png", depth_map(i, size))
            picture(root / "normals" / split, f"{i}.png", unit_normals(i, size))
            picture(
                root / "instances" / split,
                f"{i}.png",
                labels(i, [0, 3, 7], size).astype(np.uint16) * 100,
            )
            picture(root / "annotations" / split, f"{i}.png", labels(i, [0, 1, 255], size))
    (root / "targets.json").write_text('{"depth_scale": 0.001}')
    (root / "classes.json").write_text('{"classes": ["wall", "floor"]}')
    return root
