"""The official layouts of the datasets, with tiny random images."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def save(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)


def photo(seed: int, size=(6, 9)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def labels(seed: int, values, size=(6, 9)) -> np.ndarray:
    """Random labels from `values`; all occur if there are enough pixels."""
    mask = np.random.default_rng(seed).choice(np.array(values, np.uint8), size)
    mask.flat[: len(values)] = values
    return mask


def write_ade20k(root: Path) -> Path:
    """Three training and two validation images, labels 0, 1, 2, 150."""
    for split, short, count in (("training", "train", 3), ("validation", "val", 2)):
        for i in range(1, count + 1):
            name = f"{split}/ADE_{short}_{i:08d}"
            save(root / f"images/{name}.jpg", photo(i))
            save(root / f"annotations/{name}.png", labels(i, [0, 1, 2, 150]))
    return root


def write_voc2012(root: Path) -> Path:
    """Two official training images, one of the augmentation, two of validation; labels 0, 1, 20, 255."""
    for i, name in enumerate(("2007_000032", "2007_000039", "2007_000033", "2007_000042")):
        save(root / f"JPEGImages/{name}.jpg", photo(i))
        mask = Image.fromarray(labels(i, [0, 1, 20, 255])).convert("P")
        mask.putpalette([c for k in range(256) for c in (k, 255 - k, 3)])
        (root / "SegmentationClass").mkdir(exist_ok=True)
        mask.save(root / f"SegmentationClass/{name}.png")
    save(root / "JPEGImages/2008_000002.jpg", photo(9))  # in no list but the augmented one
    save(root / "SegmentationClassAug/2008_000002.png", labels(9, [0, 5, 20]))
    save(root / "SegmentationClassAug/2007_000032.png", labels(9, [0, 7]))
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for name, text in (
        ("train", "2007_000039\n2007_000032\n"),
        ("val", "2007_000033\n2007_000042\n"),
        ("trainaug", "2008_000002\n2007_000032\n2007_000039\n"),
    ):
        (root / f"ImageSets/Segmentation/{name}.txt").write_text(text)
    return root


def write_cityscapes(root: Path) -> Path:
    """Two cities of training, one of validation with two images; every label id, 0 to 33."""
    for split, city, count in (("train", "aachen", 2), ("train", "ulm", 1), ("val", "munster", 2)):
        for i in range(count):
            name = f"{split}/{city}/{city}_{i:06d}_000019"
            save(root / f"leftImg8bit/{name}_leftImg8bit.png", photo(i))
            save(root / f"gtFine/{name}_gtFine_labelIds.png", labels(i, range(34)))
            save(root / f"gtFine/{name}_gtFine_color.png", photo(i))
    return root


def depth_map(seed: int, size=(6, 9), high: int = 12_000) -> np.ndarray:
    """Random 16-bit values; the first is 0, no value."""
    values = np.random.default_rng(seed).integers(500, high, size).astype(np.uint16)
    values[0, 0] = 0
    return values


def write_cityscapes_depth(root: Path) -> Path:
    """The images of `write_cityscapes` with disparity and cameras, each with a focal length of its own."""
    for image in sorted((root / "leftImg8bit").glob("*/*/*.png")):
        name = str(image.relative_to(root / "leftImg8bit")).removesuffix("_leftImg8bit.png")
        disparity = depth_map(len(name), high=33_000)
        disparity[0, 1] = 1
        save(root / f"disparity/{name}_disparity.png", disparity)
        focal = 2262.52 + int(name[-13:-7])
        camera = root / f"camera/{name}_camera.json"
        camera.parent.mkdir(parents=True, exist_ok=True)
        parts = {"extrinsic": {"baseline": 0.209313}, "intrinsic": {"fx": focal}}
        camera.write_text(json.dumps(parts))
    return root


def write_nyuv2(root: Path, size=(6, 9)) -> Path:
    """Two scenes of training, one of test, as written by BTS's script; depth up to 12 m."""
    scenes = {"train/bedroom": (5, 6), "train/cafe": (2,), "test/kitchen": (0, 1)}
    for scene, numbers in scenes.items():
        for number in numbers:
            save(root / f"{scene}/rgb_{number:05d}.jpg", photo(number, size))
            save(root / f"{scene}/sync_depth_{number:05d}.png", depth_map(number, size))
    return root


def unit_normals(seed: int) -> np.ndarray:
    """Random unit vectors towards the viewer as 8-bit RGB; the first is black, no value."""
    vectors = np.random.default_rng(seed).standard_normal((6, 9, 3))
    vectors[..., 2] = abs(vectors[..., 2])
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    encoded = ((vectors + 1) * 127.5).round().astype(np.uint8)
    encoded[0, 0] = 0
    return encoded


def write_folder_targets(root: Path) -> Path:
    """Two training images and one validation image with depth, normals and instances; masks of two classes."""
    for seed, split in ((0, "validation"), (0, "training"), (1, "training")):
        name = f"{split}/{seed}.png"
        save(root / "images" / name, photo(seed))
        save(root / "depth" / name, depth_map(seed))
        save(root / "normals" / name, unit_normals(seed))
        save(root / "instances" / name, labels(seed, [0, 3, 7]).astype(np.uint16) * 100)
        save(root / "annotations" / name, labels(seed, [0, 1, 255]))
    (root / "targets.json").write_text('{"depth_scale": 0.001}')
    (root / "classes.json").write_text('{"classes": ["wall", "floor"]}')
    return root
