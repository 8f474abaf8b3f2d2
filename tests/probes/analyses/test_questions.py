"""Questions about places: their file, their images, and the tokens of a place."""

import json

import numpy as np
import probe_runs
import pytest
import tiny_models

from llava_bidir.common.errors import UserError
from probes.analyses.routes.questions import read_questions, tokens_in_box
from probes.cli import main
from probes.ops.geometry import Geometry, ResizeRule

CLASSES = ["sky", "wall", "road"]
BOXES = [[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5], [0.0, 0.5, 0.5, 1.0], [0.0, 0.0, 1.0, 0.5]]


def record(*boxes: list[float] | None, name: str = "sky", image: str = "a.png") -> dict:
    """Return a record with a question for each box."""
    texts = ["<image>\nWhat?", name] * len(boxes)
    regions = [None if box is None else {"box": box, "class": name} for box in boxes]
    return {"image": image, "conversations": tiny_models.turns(*texts), "regions": regions}


def test_questions_are_those_with_a_region(tmp_path):
    path = tmp_path / "questions.json"
    text = {"conversations": tiny_models.turns("hello")}
    path.write_text(json.dumps([text, record(None, BOXES[1]), record(BOXES[0], image="b.png")]))
    questions = read_questions(path, CLASSES)
    assert questions.images == ["a.png", "b.png"]
    asked = [(x.image, [*x.box], x.text, x.right) for x in questions.questions]
    assert asked == [(0, BOXES[1], "What?", 0), (1, BOXES[0], "What?", 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "Input should be a valid"),
        ([record(BOXES[0], name="sea")], "record 0: class 'sea' is none of the probes': sky, wall"),
        ([record(None)], "has no question with an entry"),
        ([record(None, None) | {"regions": [None]}], "record 0: 1 regions for 2 questions"),
        ([record() | {"regions": [{"kinds": "what"}]}], "regions.0.kinds Extra inputs are not"),
        ([record([0.5, 0.5, 0.25, 0.25])], "record 0: the box .* ends before it starts"),
    ],
)
def test_invalid_questions_are_errors_that_name_file_and_record(tmp_path, content, message):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        read_questions(path, CLASSES)
    assert str(path) in str(error.value)


def test_missing_files_and_images_elsewhere_are_errors(runs, tmp_path):
    run = runs["causal"]
    command = ["routes", "--probes", str(run.path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="is not a file; expected questions with regions"):
        main(command)
    records = [record(BOXES[0], image=name) for name in ("../secret.png", "../other.png")]
    (tmp_path / "q.json").write_text(json.dumps(records))
    with pytest.raises(SystemExit, match="leads out of"):
        main([*command, "--questions", str(tmp_path / "q.json")])
    questions = probe_runs.write_questions(run, tmp_path)
    with pytest.raises(SystemExit, match=r"the first 1 questions \(--limit\) are about one image"):
        main([*command, "--questions", str(questions), "--limit", "1"])


@pytest.mark.parametrize("resize", ["squash", "pad", "center_crop"])
@pytest.mark.parametrize(
    "box", [*BOXES, [0.4, 0.4, 0.41, 0.41], [0.0, 0.0, 1.0, 1.0], [0.99, 0.0, 1.0, 0.01]]
)
def test_tokens_in_a_box_equal_a_loop_over_tokens(resize, box):
    height, width = size = (60, 90)
    geometry = Geometry(grid=(4, 4), image_px=32, covered_px=32, rule=ResizeRule(resize))
    view = geometry.view(size)
    y, x = np.mgrid[:4, :4] + 0.5  # in tokens
    y = (view.rows.start_px + y * view.rows.length_px / 4) / height
    x = (view.cols.start_px + x * view.cols.length_px / 4) / width
    left, top, right, bottom = box
    expected = (top <= y) & (y < bottom) & (left <= x) & (x < right)
    tokens = tokens_in_box(geometry, size, box)
    if expected.any():
        assert tokens.tolist() == expected.ravel().tolist()
    else:  # the nearest one on each axis
        distance = abs(y - (top + bottom) / 2) * height + abs(x - (left + right) / 2) * width
        assert tokens[distance.argmin()]
