"""Norms of patches by site: against numpy, and of models in which some patches are made outliers."""

import json

import numpy as np
import pytest
import tiny_encoders
import tiny_models

import probes
from probes.analyses.norms import measure_norms
from probes.cli import main


def test_norms_are_those_of_the_states_in_medians(runs):
    run = runs["causal"]
    mllm = run.mllm()
    images = [sample["image"] for sample in run.dataset()][:3]
    result = measure_norms(mllm, run.sites, images)
    for number, site in enumerate(run.sites):
        states = mllm.states(mllm.preprocess(images), [site])[site].float().numpy()
        norms = np.linalg.norm(states, axis=-1)
        median = np.sort(norms, axis=1)[:, (norms.shape[1] - 1) // 2]  # the lower of two, as torch
        relative = norms / median[:, None]
        of_site = result.rows["sites"][site]
        assert of_site["median"] == pytest.approx(median.mean(), rel=1e-5)
        assert of_site["largest"] == pytest.approx(relative.max(1).mean(), rel=1e-5)
        assert of_site["outliers"] == pytest.approx((relative >= 3).mean())
        expected = relative.mean(0).reshape(mllm.grid)
        np.testing.assert_allclose(result.tensors["mean"][number], expected, rtol=1e-4)


def test_planted_outliers_of_an_encoder_are_found_where_they_are(tmp_path):
    root = tiny_models.write_segmentation(tmp_path / "data", 1, 2, size=(32, 32))
    encoder = probes.load(str(tiny_encoders.STOCK["dinov2"].write(tmp_path / "m")), image_px=32)
    columns = encoder.grid[1]
    patches = [1 * columns + 2, 3 * columns]

    def add(module, args, output):
        output = output.clone()
        output[:, encoder.image_positions[patches], 0] += 1e4
        return output

    encoder.layers[1].register_forward_hook(add)
    images = sorted((root / "images/validation").iterdir())
    result = measure_norms(encoder, encoder.sites, images)
    before, after = result.rows["sites"]["layer_01"], result.rows["sites"]["layer_02"]
    assert before["largest"] < 3 and before["outliers"] == 0
    assert after["outliers"] == pytest.approx(2 / encoder.image_tokens) and after["largest"] > 100
    where = result.tensors["photo"][encoder.sites.index("layer_02")] > 3
    assert where.nonzero().tolist() == [[1, 2], [3, 0]]


def test_results_and_page_have_them_by_site(runs, tmp_path):
    path = str(runs["causal"].path)
    main(["norms", path, "--limit", "2", "--overwrite", "true"])
    main(["report", path, "--out", str(tmp_path / "report")])
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert list(results["norms"]) == runs["causal"].sites
    assert results["masks"]["causal"]["norms"]["images"] == 2
    assert (tmp_path / "report/norms_causal.csv").is_file()
    page = (tmp_path / "report/index.html").read_text()
    assert 'id="norms"' in page and "<td>layer 1</td>" in page
