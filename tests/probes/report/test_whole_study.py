"""Reports over models and datasets, mask comparison and confusions, on runs without a model."""

import csv
import itertools
import json
import re
from html import unescape

import numpy as np
import pytest
import tiny_models
import torch
from probe_runs import write_run
from probes.report.confusion import first_halved_layer, most_confused_pairs
from report_parts import figures_of

from llava_bidir.common.bootstrap import interval
from probes.analyses.style import COLOURS, MASK_COLOURS
from probes.cli import main
from probes.report.figures.layer_curves import models_by_dataset
from probes.report.mask_comparison import compare_masks
from probes.report.tables import table2_difference
from probes.results.paper import PAPER, paper_encoder, probe_deviations
from probes.results.probe_run import ProbeRun
from probes.results.study import read_studies

CURVE = [0.6, 0.5, 0.55, 0.62, 0.7, 0.7]  # encoder, adapter, layers 1 to 3, final norm


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_models.write_segmentation(tmp_path_factory.mktemp("data"), 1, 1)


@pytest.fixture(scope="module")
def pair(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    better = [q + 0.04 * (i > 2) for i, q in enumerate(CURVE)]
    return [
        str(write_run(folder / "causal", CURVE, root=root)),
        str(write_run(folder / "bidirectional", better, root=root, mask="bidirectional")),
    ]


@pytest.fixture(scope="module")
def several(root, tmp_path_factory):
    """Two models on two datasets under both masks."""
    folder, paths = tmp_path_factory.mktemp("several"), []
    for dataset in ("ade20k", "voc2012"):
        for encoder in ("clip", "siglip"):
            for mask in ("causal", "bidirectional"):
                out = folder / f"{dataset}-{encoder}-{mask}"
                paths.append(write_run(out, CURVE, root=root, mask=mask, dataset=dataset, encoder=encoder))
    return list(map(str, paths))


def miou(run: ProbeRun, weights=None) -> np.ndarray:
    """mIoU by site in numpy; `weights` are the multiplicities of the images."""
    right, predicted, labelled = (np.asarray(x) for x in run.counts[:3])
    weights = np.ones(len(labelled)) if weights is None else np.asarray(weights)
    total = lambda x: np.tensordot(weights, x, 1)
    return np.array(
        [np.mean(total(i) / (total(p) + total(labelled) - total(i))) for i, p in zip(right, predicted, strict=True)]
    )


def test_paired_differences_and_intervals_equal_numpy(pair):
    (study,) = read_studies(pair)
    comparison, (causal, bidirectional) = compare_masks(study, 50), study.pair()
    difference = miou(bidirectional) - miou(causal)
    resampled = np.array([miou(bidirectional, w) - miou(causal, w) for w in causal.weights[:400]])
    for i, entry in enumerate(comparison["sites"]):
        assert entry["site"] == causal.sites[i] and entry["difference"] == pytest.approx(difference[i])
        expected = interval(difference[i], torch.from_numpy(resampled[:, i]))
        assert entry["ci95"] == pytest.approx(expected, abs=0.25 * (expected[1] - expected[0]))
    effects = {entry["effect"]: entry["difference"] for entry in comparison["effects"]}
    assert effects["adapter_drop"] == pytest.approx(difference[0] - difference[1])
    peaks = [miou(run)[2:5].max() for run in (causal, bidirectional)]
    assert effects["recovery"] == pytest.approx(peaks[1] - peaks[0] - difference[1])


def test_paired_tests_find_the_layers_that_differ(pair):
    comparison = compare_masks(read_studies(pair)[0])
    p = {entry["site"]: entry["p_corrected"] for entry in comparison["sites"]}
    assert "final_norm" not in p and p["layer_02"] < 0.01 and p["layer_03"] < 0.01
    assert p["encoder"] > 0.05 and p["adapter"] > 0.05
    p = {entry["effect"]: entry["p"] for entry in comparison["effects"]}
    assert p["adapter_drop"] > 0.01 and p["recovery"] < 0.01
    assert comparison["smallest_p"] == 1 / 2001 and comparison["groups"] is None


def test_paired_tests_use_groups(root, tmp_path, pair):
    groups = torch.arange(40) % 3
    paths = [
        str(write_run(tmp_path / mask, [q + shift for q in CURVE], root=root, mask=mask, groups=groups))
        for mask, shift in (("causal", 0.0), ("bidirectional", 0.05))
    ]
    comparison = compare_masks(read_studies(paths)[0])
    assert comparison["groups"] == 3 and comparison["smallest_p"] == 0.25
    assert all(entry["p"] > 0.2 for entry in comparison["sites"])  # a clear gain, but three groups are too few
    main(["report", *paths, "--out", str(tmp_path / "report")])
    assert "no p-value can be smaller than 0.250" in (tmp_path / "report/index.html").read_text()


def test_runs_are_sorted_by_model_and_dataset(several):
    studies = read_studies(several)
    assert [(study.model, study.dataset) for study in studies] == [
        (f"{encoder} + vicuna-7b-v1.5", dataset) for dataset in ("ade20k", "voc2012") for encoder in ("clip", "siglip")
    ]
    assert all(list(study.trained) == ["causal", "bidirectional"] for study in studies)


def test_a_run_can_be_told_its_model(pair):
    first, second = read_studies([f"one={pair[0]}", f"two={pair[1]}"])
    assert (first.model, list(first.trained), second.model) == ("one", ["causal"], "two")


def test_runs_that_differ_are_not_compared(root, tmp_path, pair):
    probe = json.loads((ProbeRun(pair[1]).path / "metrics.json").read_text())["probe"] | {"feature_norm": "batchnorm"}
    other = write_run(tmp_path / "run", CURVE, root=root, mask="bidirectional", metrics={"probe": probe})
    with pytest.raises(ValueError, match="their probes differ in feature_norm, 'none' and 'batchnorm'"):
        read_studies([pair[0], str(other)])
    with pytest.raises(ValueError, match="were scored on different images"):
        read_studies([*pair, f"another={write_run(tmp_path / 'images', CURVE, root=root, images=30)}"])


def test_labels_of_models_with_the_same_best_layer_do_not_overlap(root, tmp_path):
    runs = [f"{i}={write_run(tmp_path / str(i), [x + i / 500 for x in CURVE], root=root)}" for i in range(3)]
    figure, _ = models_by_dataset(read_studies(runs), "causal")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 3 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_only_masks_have_the_colours_of_masks():
    assert not set(COLOURS) & set(MASK_COLOURS.values())


@pytest.mark.slow
def test_report_over_several_models_and_datasets(several, tmp_path):
    main(["report", *several, "--out", str(tmp_path)])
    html, results = (tmp_path / "index.html").read_text(), json.loads((tmp_path / "results.json").read_text())
    studies = read_studies(several)
    assert html.count('<details class="study"') == 4
    outside = re.findall(r"(?:src|href)=\"(?!data:|#)(.*?)\"", html)
    assert outside and all((tmp_path / link).is_file() for link in outside)  # only downloads beside the page
    assert [(s["model"], s["dataset"]) for s in results["studies"]] == [(s.model, s.dataset) for s in studies]
    for name in ("models_causal", "models_bidirectional", "over_adapter_causal", "masks"):
        assert all((tmp_path / f"{name}.{kind}").is_file() for kind in ("png", "pdf", "csv"))
    for study in studies:
        assert (tmp_path / study.slug / "paired.csv").is_file() and f'id="{study.slug}"' in html
    rows = list(csv.DictReader((tmp_path / "over_adapter_causal.csv").open()))
    (row,) = [r for r in rows if r["site"] == "layer_03" and r["dataset"] == "ade20k" and r["model"].startswith("clip")]
    scores = miou(studies[0].trained["causal"])
    assert float(row["over_adapter"]) == pytest.approx(scores[4] - scores[1])
    assert len(list(csv.DictReader((tmp_path / "table2.csv").open()))) == 8 + 6
    assert set(PAPER["read_from"]) - {"plots"} == set(PAPER) - {"source", "read_from"}
    html = unescape(html)
    assert PAPER["read_from"]["plots"] in html and PAPER["read_from"]["table2_ade20k_miou"] in html
    assert "must not be subtracted" in html


def paper_like(root, path, **metrics):
    """Return a run with the metadata of the paper's CLIP configuration."""
    run = write_run(path, [0.5] * 35, root=root, dataset="ade20k", encoder="clip", metrics=metrics)
    values = json.loads((run / "metrics.json").read_text())
    for entry in values["sites"]:
        entry["dim"] = 1024 if entry["site"] == "encoder" else 4096
        entry["iou_per_class"] = [None] * 150
    values |= {"images": 2000, "grid": [24, 24], "classes": [str(k) for k in range(150)]} | metrics
    (run / "metrics.json").write_text(json.dumps(values))
    return ProbeRun(run)


def test_only_the_papers_configurations_are_compared_with_it(root, tmp_path, several):
    assert paper_encoder(paper_like(root, tmp_path / "same")) == "clip"
    other_runs = [{"images": 100}, {"dataset": "voc2012"}, {"grid": [8, 8]}, {"untrained": ["llm"]}]
    other_runs += [{"image_attention": "prefix"}, {"image_attention": "bidirectional", "own_image_attention": "causal"}]
    for i, metrics in enumerate(other_runs):
        assert paper_encoder(paper_like(root, tmp_path / str(i), **metrics)) is None, metrics
    assert all(paper_encoder(ProbeRun(path)) is None for path in several)
    assert probe_deviations(ProbeRun(several[0])) == {"epochs": 2}


def test_difference_to_the_paper_is_run_minus_paper(root, tmp_path):
    run = paper_like(root, tmp_path / "causal")
    (row,) = table2_difference(read_studies([str(run.path)]))
    paper = PAPER["table2_ade20k_miou"]["clip"]
    assert row["adapter"] == pytest.approx(run.metrics["summary"]["adapter"] - paper["causal"][0] / 100)
    assert row["encoder"] == pytest.approx(run.metrics["summary"]["encoder"] - paper["encoder"] / 100)
    assert row["probe_recipe"] == "epochs 2"


@pytest.fixture(scope="module")
def confused(root, tmp_path_factory):
    """A causal run with confusions and statistics of the states."""
    folder = tmp_path_factory.mktemp("confused")
    return ProbeRun(write_run(folder / "run", CURVE, root=root, states=True, confusion=True))


def test_confused_pairs_equal_a_loop(confused):
    confusion, classes = confused.confusion.numpy(), confused.metrics["classes"]
    pairs = most_confused_pairs(confused)
    assert len(pairs) == 6 and [p["share"][1] for p in pairs] == sorted([p["share"][1] for p in pairs], reverse=True)
    for entry in pairs:
        a, b = classes.index(entry["label"]), classes.index(entry["predicted"])
        assert a != b
        for s in range(6):
            assert entry["share"][s] == pytest.approx(confusion[s, a, b] / sum(confusion[s, a, k] for k in range(3)))


def test_rare_labels_are_skipped(confused):
    run = ProbeRun(confused.path)
    rare = run._tensors["confusion"].clone()
    rare[:, 0] = torch.tensor([0, 1, 0])  # one pixel of class 0, always wrong
    run._tensors["confusion"] = rare
    assert {entry["label"] for entry in most_confused_pairs(run)} == set(run.metrics["classes"][1:])


def test_first_halved_layer_is_the_one_after_the_last_exception():
    layers = ["adapter", "layer_01", "layer_02", "layer_03", "layer_04"]
    assert first_halved_layer([0.4, 0.1, 0.3, 0.2, 0.2], layers) == "layer_03"
    assert first_halved_layer([0.4, 0.2, 0.1, 0.0, 0.0], layers) == "layer_01"
    assert first_halved_layer([0.4, 0.1, 0.1, 0.1, 0.3], layers) is None


@pytest.mark.slow
def test_sections_appear_if_their_data_exist(confused, pair, tmp_path):
    main(["report", str(confused.path), "--out", str(tmp_path / "all")])
    main(["report", *pair, "--out", str(tmp_path / "few")])
    html = {name: (tmp_path / name / "index.html").read_text() for name in ("all", "few")}
    sections = {name: set(re.findall(r"<h2\b[^>]*>(.*?)</h2>", text)) for name, text in html.items()}
    optional = {"Hidden-state statistics", "Confused classes by layer"}
    assert optional <= sections["all"] and not optional & sections["few"]
    assert "Bidirectional vs. causal attention" in sections["few"] - sections["all"]
    for name in ("states", "confusion_causal"):
        assert all((tmp_path / f"all/{name}.{kind}").stat().st_size > 100 for kind in ("png", "pdf", "csv"))
    results = json.loads((tmp_path / "all/results.json").read_text())
    assert results["paired"] is None


def test_captions_mention_only_what_is_drawn(root, tmp_path, pair):
    captions = lambda study: {name: figure.caption for name, figure in figures_of(study).items()}
    (study,) = read_studies(pair)
    assert "Dashed: the best layer" in captions(study)["layers"]
    assert "Dotted" not in captions(study)["layers"]
    untrained = write_run(tmp_path / "run", CURVE, root=root, untrained=True)
    (study,) = read_studies([*pair, str(untrained)])
    assert "Dotted: the untrained" in captions(study)["layers"]


def test_page_notes_a_mask_that_the_model_was_not_trained_with(root, tmp_path):
    own = write_run(tmp_path / "a", CURVE, root=root, metrics={"own_image_attention": "causal"})
    other = write_run(tmp_path / "b", CURVE, root=root, mask="bidirectional", metrics={"own_image_attention": "causal"})
    main(["report", str(own), str(other), "--out", str(tmp_path / "report")])
    html = (tmp_path / "report/index.html").read_text()
    assert html.count('class="note"') == 1 and "The bidirectional run evaluates a model that was trained under" in html
