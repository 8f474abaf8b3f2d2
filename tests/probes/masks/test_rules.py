"""Rules that move scores: what is on top, what a crowd is, which classes are kept."""

from pathlib import Path

import numpy as np
import pytest

from llava_bidir.common.errors import UsageError, UserError
from probes.cli import main
from probes.config import MasksOptions
from probes.masks.rules import MaskRules
from probes.masks.source import IGNORED, UNLABELLED, LabelMap, Region

NAMES = {7: "cat", 20: "dog", 33: "tree, palm"}
ALL = [*NAMES.values()]
SIZE = (8, 1)  # width, height


def compose(spans: list[tuple], **options) -> list[int]:
    """The classes of one row of pixels, of regions (id, first, last) or (id, first, last, is_crowd)."""
    regions = []
    for category, first, last, *crowd in spans:
        mask = np.zeros((1, 8), bool)
        mask[0, first : last + 1] = True
        regions.append(Region(NAMES[category], mask, *crowd))
    composed = rules_of(**options).compose(regions, SIZE)
    return composed.classes[0].tolist(), composed.unlabelled, composed.overlapping


def rules_of(names=ALL, **options) -> MaskRules:
    return MaskRules.of(MasksOptions(sources=(), out=Path(), **options), names)


X = IGNORED
LARGE, SMALL, EQUAL = (7, 0, 4), (20, 3, 5), (33, 4, 6)


@pytest.mark.parametrize(
    ("spans", "options", "row", "shared"),
    [
        ([SMALL, LARGE], {}, [0, 0, 0, 1, 1, 1, X, X], 2),
        ([SMALL, LARGE], {"overlap": "later"}, [0, 0, 0, 0, 0, 1, X, X], 2),
        ([SMALL, LARGE], {"overlap": "ignore"}, [0, 0, 0, X, X, 1, X, X], 2),
        # of equal ones the later
        ([SMALL, EQUAL], {}, [X, X, X, 1, 2, 2, 2, X], 2),
        ([EQUAL, SMALL], {}, [X, X, X, 1, 1, 1, 2, X], 2),
        # two objects of a class do not compete
        ([LARGE, (7, 3, 5)], {"overlap": "ignore"}, [0, 0, 0, 0, 0, 0, X, X], 0),
        # a crowd below an object, and above another
        ([LARGE, (20, 3, 5, True)], {"unlabelled": "cat"}, [0, 0, 0, X, X, X, 0, 0], 0),
        # two classes claim pixels that a crowd lies between
        ([LARGE, (33, 3, 7, True), SMALL], {"overlap": "ignore"}, [0, 0, 0, X, X, 1, X, X], 2),
        ([LARGE, (20, 3, 5, True)], {"crowd": "class"}, [0, 0, 0, 1, 1, 1, X, X], 2),
        ([LARGE], {"unlabelled": "ground"}, [1, 1, 1, 1, 1, 0, 0, 0], 0),
        # dropped: what is below it is seen
        ([LARGE, SMALL], {"classes": ("cat", "tree, palm")}, [0, 0, 0, 0, 0, X, X, X], 0),
        # merged: no longer two classes
        (
            [LARGE, SMALL],
            {"classes": ("pet=cat,pet=dog", "tree, palm")},
            [0, 0, 0, 0, 0, 0, X, X],
            0,
        ),
    ],
)
def test_each_pixel_is_of_the_class_that_the_rule_says(spans, options, row, shared):
    classes, unlabelled, overlapping = compose(spans, **options)
    assert classes == row
    assert overlapping == shared
    covered = {i for category, first, last, *_ in spans for i in range(first, last + 1)}
    if "classes" not in options:
        assert unlabelled == 8 - len(covered)


def test_labels_are_classes_by_name_and_what_has_none_is_not_made_up():
    rules = rules_of(unlabelled="sky")
    labels = LabelMap(np.int32([[0, 1, 2, 3]]), ["tree, palm", UNLABELLED, IGNORED, "cat"])
    composed = rules.compose(labels, (4, 1))
    assert rules.names == ["sky", "cat", "dog", "tree, palm"]
    assert composed.classes.tolist() == [[3, 0, IGNORED, 1]]
    assert composed.unlabelled == 1


def test_a_class_that_is_none_is_named():
    with pytest.raises(UsageError, match="no class 'dogs'; did you mean 'dog'"):
        rules_of(classes=("dogs",))


def test_one_class_alone_is_refused_with_what_makes_another():
    with pytest.raises(UserError, match=r"only \['cat'\]; --unlabelled background"):
        rules_of(["cat"])
    assert rules_of(["cat"], unlabelled="rest").names == ["rest", "cat"]


def test_unlabelled_has_no_default(tmp_path, capsys):
    import mask_formats

    words = mask_formats.write_ade20k(tmp_path / "from", mask_formats.scenes(1))
    with pytest.raises(SystemExit) as stop:
        main(["masks", words[0], "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "--unlabelled needs to say what pixels are" in capsys.readouterr().err
