"""Two dimensions for the eye, numbers from the original space."""

import json

import numpy as np
import pytest
import tiny_models

from probes.analyses.umap import umap_of_images
from probes.cli import main
from probes.results.probe_run import ProbeRun


@pytest.fixture(scope="module")
def run(checkpoints, tmp_path_factory) -> ProbeRun:
    root, out = tiny_models.write_segmentation(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("run")
    main(
        ["fit", "-c", "configs/demo/probes.yaml", "--out", str(out), "--trainer.max_epochs", "1"]
        + ["--model.mllm", str(checkpoints["causal"]), "--data.root", str(root)]
    )
    return ProbeRun(out)


def purity_by_loop(x: np.ndarray, labels: list[int], neighbours: int) -> float:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    shares = []
    for i in range(len(x)):
        order = sorted((j for j in range(len(x)) if j != i), key=lambda j: -float(unit[i] @ unit[j]))[:neighbours]
        shares.append(np.mean([labels[j] == labels[i] for j in order]))
    return float(np.mean(shares))


def test_several_images_and_sites(run, tmp_path, capsys):
    argv = ["umap", "--probes", str(run.path), "--image", "1", "3", "--sites", "encoder", "layer_02", "--tensorboard"]
    for folder in ("a", "b", "b"):  # the last time over what lies there
        main([*argv, "--out", str(tmp_path / folder)])
    assert (tmp_path / "a/umap.json").read_bytes() == (tmp_path / "b/umap.json").read_bytes(), "seeded"
    facts = json.loads((tmp_path / "a/umap.json").read_text())
    assert [entry["image"] for entry in facts["images"]] == [1, 3] and facts["grid"] == [2, 2]
    mllm = run.mllm()
    for entry in facts["images"]:
        pixels = mllm.preprocess([run.dataset()[entry["image"]]["image"]])
        assert [site["site"] for site in entry["sites"]] == ["encoder", "layer_02"]
        for site in entry["sites"]:
            states = mllm.states(pixels)[site["site"]][0].numpy()
            assert site["knn_purity"] == pytest.approx(purity_by_loop(states, entry["labels"], 3))
            assert np.isfinite(site["xy"]).all() and len(site["xy"]) == 4
    config = (tmp_path / "b/projector/projector_config.pbtxt").read_text()
    assert config.count("embeddings {") == 4, "two images at two sites, once each"
    tables = sorted((tmp_path / "b/projector").rglob("metadata.tsv"))
    assert set(tables[0].read_text().split()) <= {*tiny_models.CLASSES, "unlabelled"}
    assert "knn_purity" in capsys.readouterr().out


def test_an_image_of_one_class_has_no_silhouette(run, monkeypatch):
    dataset = run.dataset()
    sample = {**dataset[0], "target": np.zeros_like(dataset[0]["target"])}
    monkeypatch.setattr(ProbeRun, "dataset", lambda self: [sample])
    (site,) = umap_of_images(run, [0], ["adapter"])["images"][0]["sites"]
    assert site["silhouette"] is None and site["knn_purity"] == 1


def test_an_image_that_there_is_not_is_an_error(run):
    with pytest.raises(SystemExit, match=r"^probes: image 9 is out of range; the split has images 0..4"):
        main(["umap", "--probes", str(run.path), "--image", "9"])
