"""Questions about places: their file, their images, and the tokens of a place."""

import json

import pytest

from llava_bidir.common.errors import UserError
from probes.analyses.routes.questions import read_questions, tokens_in_box
from probes.cli import main
from probes.ops.geometry import Geometry, ResizeRule
from probes.runs.read import ProbeRun

CLASSES = ["sky", "wall", "road"]
BOXES = [[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5], [0.0, 0.5, 0.5, 1.0], [0.0, 0.0, 1.0, 0.5]]


def record(image: str, *regions: tuple[list[float], str] | None) -> dict:
    turns = []
    for number, region in enumerate(regions):
        picture = "" if turns else "<image>\n"
        turns += [{"from": "human", "value": f"{picture}name the wall {'of this road' * number}"}]
        turns += [{"from": "gpt", "value": "a wall" if region is None else region[1]}]
    listed = [
        None if region is None else {"box": region[0], "class": region[1]} for region in regions
    ]
    return {
        "id": image,
        "image": image,
        "conversations": turns,
        "regions": listed,
    }


@pytest.fixture(scope="module")
def questions(runs, tmp_path_factory):
    """Nine questions about the validation images of the runs, two of them about one image."""
    root = ProbeRun(runs["causal"].path).manifest["data"]["root"]
    names = [f"images/validation/{i:03d}.png" for i in range(7)]
    records = [record(name, (BOXES[i % 4], CLASSES[i % 3])) for i, name in enumerate(names)]
    records += [record("images/validation/008.png", (BOXES[0], "sky"), None, (BOXES[3], "road"))]
    records += [{"id": "text", "conversations": [{"from": "human", "value": "hello"}]}]
    path = tmp_path_factory.mktemp("questions") / "questions.json"
    path.write_text(json.dumps(records))
    return path, root


def arguments(run: ProbeRun, questions, out) -> list[str]:
    path, root = questions
    options = ["--questions", str(path), "--images", str(root), "--draws", "2", "--batch-size", "4"]
    return ["routes", "--probes", str(run.path), "--out", str(out), *options]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "0.conversations Field required"),  # one record, as in JSON Lines
        (
            [record("a.png", (BOXES[0], "sea"))],
            "record 0: class 'sea' is none of the probes': sky, wall, road",
        ),
        ([record("a.png", (BOXES[0], "sky")) | {"regions": []}], "has no question with an entry"),
        (
            [record("a.png", None, None) | {"regions": [None]}],
            "record 0: 1 regions for 2 questions",
        ),
        (
            [
                record("a.png", (BOXES[0], "sky"))
                | {"conversations": [{"from": "human", "value": "<image>"}]}
            ],
            "record 0: a question with a region has no text",
        ),
        (
            [record("a.png", ([0.5, 0.5, 0.25, 0.25], "sky"))],
            "record 0: the box .* ends before it starts",
        ),
    ],
)
def test_invalid_questions_are_errors_that_name_file_and_record(tmp_path, content, message):
    path = tmp_path / "questions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        read_questions(path, CLASSES)
    assert str(path) in str(error.value)


def test_missing_files_and_images_elsewhere_are_errors(runs, questions, tmp_path):
    run = runs["causal"]
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="is not a file; expected questions with regions"):
        main(["routes", "--probes", str(run.path), *out])
    records = [record(name, (BOXES[0], "sky")) for name in ("../secret.png", "../other.png")]
    (tmp_path / "q.json").write_text(json.dumps(records))
    with pytest.raises(SystemExit, match="leads out of"):
        main(["routes", "--probes", str(run.path), *out, "--questions", str(tmp_path / "q.json")])
    with pytest.raises(SystemExit, match=r"the first 1 questions \(--limit\) are about one image"):
        main(arguments(run, questions, tmp_path / "out") + ["--limit", "1"])


@pytest.mark.parametrize("resize", ["squash", "pad", "center_crop"])
@pytest.mark.parametrize(
    "box", [*BOXES, [0.4, 0.4, 0.41, 0.41], [0.0, 0.0, 1.0, 1.0], [0.99, 0.0, 1.0, 0.01]]
)
def test_tokens_in_a_box_equal_a_loop_over_tokens(resize, box):
    height = 60
    width = 90
    geometry = Geometry((4, 4), 32, 32, ResizeRule(resize))
    view = geometry.view((height, width))
    points = [
        (
            view.rows.start_px + (r + 0.5) * view.rows.length_px / 4,
            view.cols.start_px + (c + 0.5) * view.cols.length_px / 4,
        )
        for r in range(4)
        for c in range(4)
    ]
    expected = [box[1] <= y / height < box[3] and box[0] <= x / width < box[2] for y, x in points]
    found = tokens_in_box(geometry, (height, width), box)
    if any(expected):
        assert found.tolist() == expected
    else:  # the nearest one on each axis
        middle = (box[1] + box[3]) / 2 * height, (box[0] + box[2]) / 2 * width
        nearest = min(
            range(16), key=lambda i: sum(abs(a - b) for a, b in zip(points[i], middle, strict=True))
        )
        assert found[nearest]
