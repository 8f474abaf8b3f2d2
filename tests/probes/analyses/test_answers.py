"""Answers beside probes and under knockouts: questions, the analysis against loops, statistics on simulated data."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_bidir.common.errors import UserError
from probes import Knockout
from probes.analyses.answers.inference import CONDITIONS, answer_statistics
from probes.analyses.answers.questions import read_question_image, read_questions, tokens_in_box
from probes.analyses.answers.run import check_effects
from probes.cli import main
from probes.ops.geometry import Geometry, ResizeRule
from probes.results.probe_run import ProbeRun

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
    return ["answers", "--probes", str(run.path), "--out", str(out), *options]


@pytest.fixture(scope="module", params=["causal", "bidirectional"])
def asked(
    request,
    runs,
    questions,
    tmp_path_factory,
):
    """A run, its answers.json and its answers.safetensors."""
    out = tmp_path_factory.mktemp("answers")
    main(arguments(runs[request.param], questions, out))
    return (
        runs[request.param],
        json.loads((out / "answers.json").read_text()),
        load_file(out / "answers.safetensors"),
    )


def test_answers_and_probes_equal_a_loop(asked, questions):
    """Question by question, condition by condition, with the sets read off the adapter's probe."""
    run, _, tensors = asked
    file = read_questions(questions[0], CLASSES)
    mllm = run.mllm()
    probes = run.probes()
    for i, question in enumerate(file.questions):
        pixels = mllm.preprocess([Image.open(questions[1] + "/" + file.images[question.image])])
        place = [
            int(row * 2 + column)
            for row in range(2)
            for column in range(2)
            if inside(question.box, row, column)
        ]
        logits = {
            site: probe(mllm.states(pixels, [site])[site])[0] for site, probe in probes.items()
        }
        for site, values in logits.items():
            expected = values[place].mean(0).log_softmax(-1)
            torch.testing.assert_close(tensors[f"probe:{site}"][i], expected, rtol=1e-3, atol=1e-3)
        predicted = logits["adapter"].argmax(-1)
        at_place = logits["adapter"][place].mean(0).tolist()
        wrong = max((k for k in range(3) if k != question.right), key=lambda k: at_place[k])
        assert tensors["wrong"][i] == wrong
        assert tensors["right"][i] == question.right
        for name, k in (("none", -1), ("incorrect", wrong), ("correct", question.right)):
            scores = mllm.answer_log_probs(
                pixels, [question.text], CLASSES, Knockout((predicted == k)[None])
            )[0, 0]
            expected = scores.log_softmax(-1)[question.right]
            torch.testing.assert_close(tensors[f"right:{name}"][i], expected, rtol=1e-4, atol=1e-4)
            if k >= 0:
                assert tensors[f"tokens:{name}"][i] == (predicted == k).sum()


def inside(box, row: int, column: int) -> bool:
    x = (column + 0.5) / 2
    y = (row + 0.5) / 2
    return box[0] <= x < box[2] and box[1] <= y < box[3]


def test_accuracies_are_shares_of_questions(asked):
    run, results, tensors = asked
    right = [
        int(row.argmax() == k) for row, k in zip(tensors["answer"], tensors["right"], strict=True)
    ]
    assert results["questions"] == 9
    assert results["images"] == 8
    assert results["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert [entry["site"] for entry in results["sites"]] == run.sites
    for entry in results["sites"]:
        read = tensors[f"probe:{entry['site']}"].argmax(-1)
        assert entry["accuracy"]["value"] == pytest.approx(
            (read == tensors["right"]).double().mean().item()
        )
        assert entry["agreement"]["value"] == pytest.approx(
            (read == tensors["answer"].argmax(-1)).double().mean().item()
        )
    assert results["runs"] == [run.fingerprint]


def test_a_knockout_without_effect_is_an_error(asked):
    _, _, tensors = asked
    check_effects(tensors)
    with pytest.raises(RuntimeError, match="hiding correct tokens changed none of"):
        check_effects(tensors | {"right:correct": tensors["right:none"].clone()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "has no question with an entry in 'regions'"),
        ("{}", "0.conversations Field required"),  # one record, as in JSON Lines
        ('"sky"', "Input should be a valid"),
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
        ([record("a.png", ([0, 0, 2, 1], "sky"))], "less than or equal to 1"),
        ([record("a.png", ([0, 0, 1], "sky"))], "at least 4 items"),
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
        main(["answers", "--probes", str(run.path), *out])
    records = [record(name, (BOXES[0], "sky")) for name in ("../secret.png", "../other.png")]
    (tmp_path / "q.json").write_text(json.dumps(records))
    with pytest.raises(SystemExit, match="leads out of"):
        main(["answers", "--probes", str(run.path), *out, "--questions", str(tmp_path / "q.json")])
    with pytest.raises(SystemExit, match=r"the first 1 questions \(--limit\) are about one image"):
        main(arguments(run, questions, tmp_path / "out") + ["--limit", "1"])


def test_a_linked_folder_is_read_as_the_real_run_lays_its_photos_out(tmp_path):
    (tmp_path / "photos" / "camvid").mkdir(parents=True)
    Image.new("RGB", (4, 3)).save(tmp_path / "photos" / "camvid" / "a.png")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "camvid").symlink_to(tmp_path / "photos" / "camvid")
    assert read_question_image(tmp_path / "run", "camvid/a.png").size == (4, 3)
    with pytest.raises(UserError, match="leads out of"):
        read_question_image(tmp_path / "run", "camvid/../../photos/camvid/a.png")


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


def simulate(
    images: int,
    effect: float,
    seed: int,
    skill: float = 0.5,
) -> dict[str, torch.Tensor]:
    """Return answers.safetensors of two questions per image; hiding the right class changes its answer by `effect`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    right = torch.randint(3, (2 * images,), generator=generator)
    of_image = draw(images).repeat_interleave(2)  # questions about an image resemble each other
    tensors = {
        "image": torch.arange(images).repeat_interleave(2),
        "right": right,
        "wrong": (right + 1) % 3,
    }
    for reader in ("answer", "probe:adapter", "probe:layer_01"):
        logits = draw(2 * images, 3)
        logits[torch.arange(2 * images), right] += skill
        tensors[reader] = logits.log_softmax(-1)
    for condition in CONDITIONS:
        shift = effect if condition == "correct" else 0.0
        tensors[f"right:{condition}"] = -1.0 + of_image + 0.3 * draw(2 * images) + shift
    return tensors | {"tokens:incorrect": right + 1, "tokens:correct": right + 1}


def test_a_simulated_effect_is_found_where_it_is():
    results = answer_statistics(simulate(120, -0.4, 0), ["adapter", "layer_01"], CLASSES, 0)
    effects = {(effect["condition"], effect["control"]): effect for effect in results["effects"]}
    for control in ("none", "matched_correct"):
        effect = effects["correct", control]
        assert all(row["p_holm"] < 0.05 and row["value"] < -0.2 for row in effect["classes"])
        assert effect["mean"]["ci95"][0] < -0.4 < effect["mean"]["ci95"][1] < 0
    assert all(row["p_holm"] > 0.05 for row in effects["incorrect", "none"]["classes"])
    assert (
        effects["incorrect", "none"]["mean"]["ci95"][0]
        < 0
        < effects["incorrect", "none"]["mean"]["ci95"][1]
    )


def test_intervals_resample_images_with_all_their_questions():
    """Ten copies of each question about an image are no new evidence."""
    tensors = simulate(30, -0.2, 3)
    copies = {key: value.repeat_interleave(10, 0) for key, value in tensors.items()}
    once, often = (answer_statistics(found, ["adapter"], CLASSES, 0) for found in (tensors, copies))
    assert often["questions"] == 10 * once["questions"]
    assert often["images"] == once["images"]
    assert often["accuracy"]["ci95"] == pytest.approx(once["accuracy"]["ci95"])
    difference = [found["sites"][0]["difference"]["ci95"] for found in (once, often)]
    assert difference[0] == pytest.approx(difference[1])


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_lines_have_the_questions_of_a_list(mark, tmp_path):
    records = [record("a.png", (BOXES[0], "sky")), record("b.png", (BOXES[1], "wall"))]
    (tmp_path / "list.json").write_text(json.dumps(records))
    lines = "\n\n".join(json.dumps(line) for line in records)
    (tmp_path / "lines.json").write_bytes(mark + lines.encode())
    found = [read_questions(tmp_path / name, CLASSES) for name in ("lines.json", "list.json")]
    assert found[0][:2] == found[1][:2] and len(found[0].questions) == 2
