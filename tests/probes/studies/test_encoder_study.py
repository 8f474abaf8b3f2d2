"""A study of a bare vision encoder: controls, claims, what is left out, the sentence, and the page."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO

import labs
import pytest
import tiny_encoders
import tiny_models
from reference import miou_of_counts
from studies import study_of

from llava_bidir.common.errors import UserError
from probes.lab.requests import Attention, Block, Replace, View
from probes.runs.read import ProbeRun
from probes.studies.plan import plan
from probes.studies.run import run_study

OPTIONS = (
    "--data.batch_size 8 --trainer.accelerator cpu --model.image_px 32 --folds 2 --strengths 1e-1"
).split()
ARMS = ("trained", "random0", "random1", "permuted0", "permuted1")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An encoder and a folder of images."""
    root = tmp_path_factory.mktemp("parts")
    data = tiny_models.write_segmentation(root / "data", 8, 12, size=(32, 32))
    return {"": tiny_encoders.STOCK["dinov2"].write(root / "dinov2")}, data


@pytest.fixture(scope="module")
def study(parts, tmp_path_factory):
    """Return the folder of a finished study, and what it printed."""
    out = tmp_path_factory.mktemp("studies") / "study"
    settings = {"arms": ARMS, "only": ("solve", "report")}
    with redirect_stdout(StringIO()) as printed:
        run_study(study_of(*parts, out, OPTIONS, **settings))
    return out, printed.getvalue()


def miou_of(run: ProbeRun, site: int) -> float:
    """Return the mIoU of a site from counts per image and class."""
    right, predicted, labelled = run.counts[:3]
    return miou_of_counts(right[site], predicted[site], labelled)


def test_the_answer_has_the_numbers_of_the_counts(study):
    out, printed = study
    run = ProbeRun(out / "trained")
    assert run.sites == ["layer_00", "layer_01", "layer_02", "layer_03", "final_norm"]
    best = max(miou_of(run, site) for site in range(5))
    assert re.search(rf"{100 * best:.1f}%\s+mIoU\.", printed)


def test_claims_compare_layers_and_random_encoders(study):
    out, _ = study
    results = json.loads((out / "report/results.json").read_text())
    claims = {claim["claim"]: claim["verdicts"] for claim in results["claims"]}
    assert claims.keys() == {"layer_gain", "over_last"}
    runs = [ProbeRun(out / name) for name in ARMS]
    assert [run.arm for run in runs] == ["trained", *["random"] * 2, *["permuted"] * 2]
    assert not any(run.has_llm for run in runs)
    assert len({miou_of(run, 0) for run in runs}) == 1, "patch embeddings stay trained"
    for columns in claims.values():
        controls = columns["beyond_random"]["controls"]
        assert {name: column["draws"] for name, column in controls.items()} == {
            "random": 2,
            "permuted": 2,
        }


def test_the_first_screen_says_how_large_an_effect_would_have_shown(study):
    out, _ = study
    claims = json.loads((out / "report/results.json").read_text())["claims"]
    undecided = sum(claim["finding"] == "undecided" for claim in claims)
    first_screen = (out / "report/index.html").read_text().partition('<section id="verdicts">')[0]
    assert first_screen.count(": would show from ") == undecided > 0


@pytest.mark.slow
def test_a_long_list_of_models_is_not_hidden_by_the_choice_of_the_photo(study, chromium):
    out, _ = study
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    tab.goto((out / "report/index.html").as_uri())
    entries = "document.querySelector('.hero aside').lastElementChild"
    more = f"{entries}.append({entries}.lastElementChild.cloneNode(true))"
    tab.evaluate(f"for (let i = 0; i < 12; i++) {more}")
    last = tab.locator(".hero aside li").last.bounding_box()
    assert last["y"] + last["height"] <= tab.locator(".picker").bounding_box()["y"]
    tab.close()


@pytest.mark.parametrize(
    ("arms", "side", "message"),
    [
        ("adapter0", "32", "no arm 'adapter0' of a vision encoder"),
        ("trained", "30", r"--model\.image_px 30: expected a multiple of the patch, 4 px"),
    ],
)
def test_arms_of_an_llm_and_unusable_sides_are_refused_before_any_work(
    arms, side, message, parts, tmp_path
):
    with pytest.raises(UserError, match=message):
        plan(study_of(*parts, tmp_path, ("--model.image_px", side), arms=(arms,)))


def test_the_lab_opens_a_run_of_an_encoder(study):
    """Without words and answers; blocking, replacing and attention as of an MLLM."""
    out, _ = study
    session = labs.open_session([str(out / "trained")])
    (model,) = session.describe()["models"]
    assert (model["word_sites"], model["has_llm"], model["layers"]) == ([], False, 3)
    assert model["change_sites"] == ["layer_00", "layer_01", "layer_02", "layer_03"]
    view = {"photo": "split:0", "model": 0}
    replaced = {"kind": "replace", "patches": (0, 1)}
    block = Block(kind="block", patches=(0, 1, 2), layers=(1,))
    changes = (None, block, Replace(**replaced, site="layer_00", by="mean"))
    found = [session.read(View(**view, intervention=x), labs.JOB) for x in changes]
    assert len({x["probabilities"] for x in found}) == 3
    assert session.attention(Attention(**view, layer=2, patch=5), labs.JOB)["to"]
    assert model["other_mask"] is None, "which the page does not offer then"
