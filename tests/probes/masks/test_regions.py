"""Objects of COCO, YOLO and LabelMe become the pixels that pycocotools gives them, stacked by the rule."""

import json
import sys

import mask_formats
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mask_formats import CLASSES, IDS, SIZE, boxes, convert, run_lengths

from probes.cli import main
from probes.config import MasksOptions
from probes.masks.formats import open_sources
from probes.masks.rules import MaskRules
from probes.masks.source import IGNORED

try:
    from pycocotools import mask as coco
    from pycocotools.coco import COCO
except ImportError:
    coco = None
needs_coco = pytest.mark.skipif(coco is None, reason="pycocotools (extra coco) is not installed")
WORDS = ["--unlabelled", "ignore", "--validation", "0.5"]
ROWS, COLUMNS = SIZE


def pixels(annotation: dict) -> np.ndarray:
    """What pycocotools' own annToMask says."""
    index = COCO()
    index.imgs = {0: {"height": ROWS, "width": COLUMNS}}
    return index.annToMask(annotation | {"image_id": 0}) > 0


def reference(annotations: list[dict], overlap: str, crowd: str) -> tuple[np.ndarray, int]:
    """Each pixel asks the objects that have it, all at once; and the number that two classes claim."""
    if not annotations:
        return np.full(SIZE, IGNORED), 0
    masks = np.stack([pixels(annotation) for annotation in annotations])
    order = range(len(masks))
    if overlap == "smaller":
        order = sorted(order, key=lambda i: (-masks[i].sum(), i))
    rank = np.argsort(list(order))  # the highest is on top
    on_top = np.where(masks, rank[:, None, None], -1).argmax(0)
    labels = np.array(
        [
            IGNORED if x["iscrowd"] and crowd == "ignore" else IDS.index(x["category_id"])
            for x in annotations
        ]
    )
    target = np.where(masks.any(0), labels[on_top], IGNORED)
    claims = np.stack([masks[labels == k].any(0) for k in range(len(IDS))]).sum(0)
    is_shared = claims > 1
    return np.where((overlap == "ignore") & is_shared, IGNORED, target), is_shared.sum()


corner = st.floats(-2, 62, width=32)
polygon = st.lists(corner, min_size=6, max_size=12).map(lambda x: x[: len(x) // 2 * 2])


@st.composite
def segmentations(draw):
    kind = draw(st.sampled_from(["polygons", "lengths", "compressed"]))
    if kind == "polygons":
        return draw(st.lists(polygon, min_size=1, max_size=3))
    mask = np.random.default_rng(draw(st.integers(0, 99))).random(SIZE) < draw(
        st.sampled_from([0, 0.5, 1])
    )
    if kind == "lengths":
        return {"size": list(SIZE), "counts": run_lengths(mask)}
    lengths = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(SIZE), "counts": lengths["counts"].decode()}


annotation = st.fixed_dictionaries(
    {
        "segmentation": segmentations(),
        "category_id": st.sampled_from(IDS),
        "iscrowd": st.integers(0, 1),
    }
)
rules = st.tuples(
    st.sampled_from(["smaller", "later", "ignore"]), st.sampled_from(["ignore", "class"])
)


@needs_coco
@given(st.lists(annotation, max_size=5), rules)
def test_coco_is_what_pycocotools_draws(tmp_path_factory, annotations, chosen):
    root = tmp_path_factory.mktemp("coco")
    overlap, crowd = chosen
    [scene] = mask_formats.scenes(1)["training"]
    mask_formats.save(root / "t0.png", scene.photo)
    content = mask_formats.header([scene])
    content["annotations"] = [x | {"id": i, "image_id": 0} for i, x in enumerate(annotations)]
    file = mask_formats.write_json(root / "all.json", content)
    options = MasksOptions(
        sources=(str(file),),
        out=root,
        format="coco",
        unlabelled="ignore",
        overlap=overlap,
        crowd=crowd,
    )
    [source] = open_sources(options)
    rules = MaskRules.of(options, CLASSES)
    annotation = source.photos[0].read((COLUMNS, ROWS))
    composed = rules.compose(annotation, (COLUMNS, ROWS))
    target, shared = reference(annotations, overlap, crowd)
    assert (composed.classes == target).all()
    assert composed.overlapping == shared


def drawn(scene: mask_formats.Scene) -> np.ndarray:
    subjects = [
        {"segmentation": [corners], "category_id": IDS[k], "iscrowd": 0}
        for k, corners in boxes(scene)
    ]
    return reference(subjects, "smaller", "ignore")[0]


@needs_coco
@pytest.mark.parametrize("writer", [mask_formats.write_yolo, mask_formats.write_labelme])
def test_polygons_of_other_programs_are_those_of_pycocotools(writer, tmp_path):
    splits = mask_formats.scenes(2)
    made = convert(writer(tmp_path / "from", splits), tmp_path / "out")
    for split, part in splits.items():
        order = (
            [sorted(CLASSES).index(name) for name in CLASSES]
            if "labelme" in writer.__name__
            else range(4)
        )
        for scene, sample in zip(part, made[split], strict=True):
            assert (sample["target"] == np.array([*order, 255])[drawn(scene)]).all()


@needs_coco
def test_run_lengths_of_a_partition_come_back_with_holes(tmp_path):
    splits = mask_formats.scenes()
    words = mask_formats.write_coco(tmp_path / "from", splits)
    made = convert(words, tmp_path / "out")
    for split, part in splits.items():
        for scene, sample in zip(part, made[split], strict=True):
            assert (sample["target"] == scene.classes).all()


FAULTS = {  # what is wrong: of the content of a JSON file
    "all.json: JSONDecodeError": lambda content: None,
    "annotation 0 has category_id 5, which the file does not define": lambda content: content[
        "annotations"
    ][0].update(category_id=5),
    r"a polygon is \[1, 1, 5, 5\]; expected finite x and y of three corners": lambda content: (
        content["annotations"][0].update(segmentation=[[1, 1, 5, 5]])
    ),
    "has no polygon; a box alone": lambda content: content["annotations"][0].update(
        segmentation=[]
    ),
    "a polygon is .*nan.*; expected finite x and y": lambda content: content["annotations"][
        0
    ].update(segmentation=[[1, 1, 5, float("nan"), 9, 9]]),
    "names the image 'gone.png': 0 files of that name": lambda content: content["images"][0].update(
        file_name="gone.png"
    ),
    "2 images of one name, 't0'": lambda content: content["images"][1].update(file_name="t0.png"),
    "annotation of t0 is 61 x 40 px, its image .*t0.png 60 x 40 px": lambda content: content[
        "images"
    ][0].update(width=61),
    "run lengths count 7 of 2400 pixels": lambda content: content["annotations"][0].update(
        segmentation={"size": [40, 60], "counts": [3, 4]}
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_faulty_file_is_named_and_nothing_is_left(message, tmp_path):
    splits = mask_formats.scenes(1)
    part = splits["training"] + splits["validation"]
    for scene in part:
        mask_formats.save(tmp_path / f"{scene.name}.png", scene.photo)
    content = mask_formats.header(part)
    triangle = {"id": 0, "image_id": 0, "category_id": 2, "segmentation": [[1, 1, 20, 1, 20, 20]]}
    content["annotations"] = [triangle]
    FAULTS[message](content)
    text = json.dumps(content)
    file = tmp_path / "all.json"
    file.write_text(text[:-9] if "JSONDecode" in message else text)
    with pytest.raises(SystemExit, match=message):
        main(["masks", str(file), "--format", "coco", *WORDS, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", ["point", "line", "linestrip"])
def test_shapes_without_an_area_are_refused_by_name(kind, tmp_path):
    words = mask_formats.write_labelme(tmp_path / "from", mask_formats.scenes(1))
    file = tmp_path / "from/training/t0.json"
    content = json.loads(file.read_text())
    content["shapes"][0]["shape_type"] = kind
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=f"t0.json, shape 0 .*is a {kind}, which has no area"):
        main(["masks", *words, "--out", str(tmp_path / "out")])


def test_masks_and_circles_of_labelme(tmp_path):
    splits = mask_formats.scenes(1)
    words = mask_formats.write_labelme(tmp_path / "from", splits)
    for split, [scene] in splits.items():
        circle = {"label": "sun", "shape_type": "circle", "points": [[20, 20], [25, 20]]}
        shapes = [mask_formats.as_shape_mask(scene.classes == 1) | {"label": "tree"}, circle]
        file = tmp_path / f"from/{split}/{scene.name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"shapes": shapes}))
    made = convert([*words, "--overlap", "later"], tmp_path / "out")
    for split, [scene] in splits.items():
        sun, tree = (
            made[split][0]["target"] == made[split].classes.index(name) for name in ("sun", "tree")
        )
        assert sun.sum() == 80  # pixel centres within 5 of a corner of pixels
        assert ((tree | sun) == ((scene.classes == 1) | sun)).all()


def test_without_pycocotools_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    words = mask_formats.write_yolo(tmp_path / "from", mask_formats.scenes(1))
    with pytest.raises(SystemExit, match=r"pip install 'llava-bidir\[coco\]'"):
        main(["masks", *words, "--out", str(tmp_path / "out")])
