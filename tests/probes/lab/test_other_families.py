"""`probes routes` and the lab ask models of other families: positions in three dimensions, merged patches, windows."""

import json

import labs
import probe_runs
import pytest
import tiny_families
import tiny_models
import torch
from PIL import Image
from safetensors.torch import load_file

from probes import Knockout
from probes.analyses.routes.questions import read_questions
from probes.cli import main
from probes.lab.requests import AnswerAttention, Block, PhotoQuestion
from probes.lab.session import MAX_ANSWER_TOKENS

pytestmark = pytest.mark.usefixtures("small_squares")

CLASSES = tiny_models.CLASSES
QUESTION = "name the wall"


@pytest.fixture(scope="module", params=["gemma3", "internvl", "qwen2_vl", "smolvlm"])
def run(request, tmp_path_factory):
    """A run of probes on a tiny model of a family."""
    root = tmp_path_factory.mktemp(request.param)
    data = tiny_models.write_segmentation(root / "data", 4, 3, seed=5)
    model = tiny_families.write(request.param, root / "model")
    if (
        request.param == "gemma3"
    ):  # as in published models, its windows reach from the image to the prefix
        config = json.loads((model / "config.json").read_text())
        config["text_config"]["sliding_window"] = 16
        (model / "config.json").write_text(json.dumps(config))
    more = ("--data.batch_size", "2", "--model.sites", "[adapter, layer_03]")
    return probe_runs.fit(model, data, root / "run", *more)


def test_the_command_of_routes_asks_other_families(run, tmp_path):
    path = probe_runs.write_questions(run, tmp_path)
    command = ["routes", "--probes", str(run.path), "--questions", str(path)]
    main([*command, "--out", str(tmp_path), "--draws", "1", "--window", "3"])
    results = json.loads((tmp_path / "routes.json").read_text())
    tensors = load_file(tmp_path / "routes.safetensors")
    mllm = run.mllm()
    assert results["classes"] == CLASSES
    file = read_questions(path, CLASSES)
    of_text = ("question", "last", "answer")
    for number, question in enumerate(file.questions):
        pixels = mllm.preprocess([Image.open(tmp_path / file.images[question.image])])
        cut = Knockout(rows=of_text, columns="image")
        for key, knockout in (("none", None), ("right:image to text", cut)):
            scores = mllm.answer_log_probs(pixels, question.text, CLASSES, knockout)
            expected = scores[0].log_softmax(-1)
            found = tensors[key][number]
            if knockout:
                found, expected = found[0], expected[question.right]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not torch.equal(
        tensors["right:image to text"][:, 0], tensors["none"][:, file.questions[0].right]
    )


def test_the_lab_asks_other_families(run):
    session = labs.open_session([str(run.path)])
    model = session.models[0]
    assert model.cannot_answer is None
    mllm = model.mllm
    shown = {"photo": "split:0", "model": 0, "question": QUESTION}
    block = Block(kind="block", patches=(0, 2))
    asked = session.ask(PhotoQuestion(**shown, intervention=block), labs.JOB)
    photo = session.photos.get("split:0").squares[0]
    tokens = torch.arange(mllm.image_tokens)[None]
    knockout = Knockout((tokens == 0) | (tokens == 2))
    for found, change in ((asked, None), (asked["blocked"], knockout)):
        assert found["answer"] == mllm.answer(photo, QUESTION, change, MAX_ANSWER_TOKENS)
    read = AnswerAttention(**shown, answer="sky", token=0, layer=2)
    assert session.answer_attention(read, labs.JOB)["to"]
