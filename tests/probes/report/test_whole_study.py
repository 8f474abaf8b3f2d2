"""Reports over models and datasets, and what they say of pairs, recipes, seeds, confusions; runs without a model."""

import csv
import json
import re
from html import unescape

import numpy as np
import pytest
import tiny_models
import torch
from probe_runs import write_run

from llava_bidir.common.bootstrap import interval
from probes.cli import main
from probes.evaluation.bootstrap import dataset_scores
from probes.evaluation.metrics import Counts
from probes.report.confusion import confusion_pairs, half_gone
from probes.report.figures.training_budget import probe_budget
from probes.report.mask_comparison import paired
from probes.report.page import results
from probes.report.paper import PAPER, departures, paper_encoder
from probes.report.probe_sensitivity import over_seeds, scale_confound, verdict
from probes.report.study import studies_of
from probes.report.summary_text import remarks_of
from probes.results.probe_run import ProbeRun

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
    """mIoU by site, written out in numpy; `weights` say how often each image counts."""
    right, predicted, labelled = (np.asarray(x) for x in run.counts[:3])
    weights = np.ones(len(labelled)) if weights is None else np.asarray(weights)
    total = lambda x: np.tensordot(weights, x, 1)
    found = []
    for i, p in zip(right, predicted, strict=True):
        found.append(np.mean(total(i) / (total(p) + total(labelled) - total(i))))
    return np.array(found)


def test_paired_differences_and_intervals_equal_numpy(pair):
    (study,) = studies_of(pair)
    facts, (causal, bidirectional) = paired(study, 50), study.pair()
    difference = miou(bidirectional) - miou(causal)
    drawn = np.array([miou(bidirectional, w) - miou(causal, w) for w in causal.weights[:400]])
    for i, entry in enumerate(facts["sites"]):
        assert entry["site"] == causal.sites[i] and entry["difference"] == pytest.approx(difference[i])
        again = interval(difference[i], torch.from_numpy(drawn[:, i]))
        assert entry["ci95"] == pytest.approx(again, abs=0.25 * (again[1] - again[0]))
    peaks = [miou(run)[2:5].max() - miou(run)[1] for run in (causal, bidirectional)]
    drops = [miou(run)[0] - miou(run)[1] for run in (causal, bidirectional)]
    found = {entry["effect"]: entry["difference"] for entry in facts["effects"]}
    assert found == {"adapter_drop": pytest.approx(drops[1] - drops[0]), "recovery": pytest.approx(peaks[1] - peaks[0])}


def test_paired_tests_find_the_layers_that_differ(pair):
    facts = paired(studies_of(pair)[0])
    p = {entry["site"]: entry["p_corrected"] for entry in facts["sites"]}
    assert "final_norm" not in p and p["layer_02"] < 0.01 and p["layer_03"] < 0.01
    assert p["encoder"] > 0.05 and p["adapter"] > 0.05
    assert {entry["effect"]: entry["p"] < 0.01 for entry in facts["effects"]} == {
        "adapter_drop": False,
        "recovery": True,
    }
    assert facts["smallest_p"] == 1 / 2001 and facts["groups"] is None


def test_paired_tests_go_by_group(root, tmp_path, pair):
    groups = torch.arange(40) % 3
    paths = [
        str(write_run(tmp_path / mask, [q + shift for q in CURVE], root=root, mask=mask, groups=groups))
        for mask, shift in (("causal", 0.0), ("bidirectional", 0.05))
    ]
    facts = paired(studies_of(paths)[0])
    assert facts["groups"] == 3 and facts["smallest_p"] == 0.25
    assert all(entry["p"] > 0.2 for entry in facts["sites"])  # a clear gain, but three cities cannot say so
    main(["report", *paths, "--out", str(tmp_path / "report")])
    assert "no p-value can be smaller than 0.250" in (tmp_path / "report/index.html").read_text()


def test_runs_of_one_mask_are_not_paired(pair):
    assert paired(studies_of(pair[:1])[0]) is None


def test_runs_are_sorted_by_model_and_dataset(several):
    studies = studies_of(several)
    assert [(study.model, study.dataset) for study in studies] == [
        (f"{encoder} + vicuna-7b-v1.5", dataset) for dataset in ("ade20k", "voc2012") for encoder in ("clip", "siglip")
    ]
    assert all(list(study.trained) == ["causal", "bidirectional"] for study in studies)


def test_a_run_can_be_told_its_model(pair):
    first, second = studies_of([f"one={pair[0]}", f"two={pair[1]}"])
    assert (first.model, list(first.trained), second.model) == ("one", ["causal"], "two")


def test_probes_trained_otherwise_are_not_compared(root, tmp_path, pair):
    probe = json.loads((ProbeRun(pair[1]).path / "metrics.json").read_text())["probe"] | {"feature_norm": "batchnorm"}
    other = write_run(tmp_path / "run", CURVE, root=root, mask="bidirectional", metrics={"probe": probe})
    with pytest.raises(ValueError, match="their probes differ in feature_norm, 'none' and 'batchnorm'"):
        studies_of([pair[0], str(other)])
    with pytest.raises(ValueError, match="of which no main run is given"):
        studies_of(pair[:1], [f"another={pair[1]}"])
    with pytest.raises(ValueError, match="were scored on different images"):
        studies_of(pair, [str(write_run(tmp_path / "images", CURVE, root=root, images=30))])


@pytest.mark.slow
def test_report_over_several_models_and_datasets(several, tmp_path):
    main(["report", *several, "--out", str(tmp_path)])
    html, found = (tmp_path / "index.html").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert not re.search(r"(src|href)=\"(?!data:|#)", html) and html.count('<h1 class="study"') == 4
    assert [(s["model"], s["dataset"]) for s in found["studies"]] == [(s.model, s.dataset) for s in studies_of(several)]
    for name in ("models_causal", "models_bidirectional", "over_adapter_causal", "masks"):
        assert all((tmp_path / f"{name}.{kind}").is_file() for kind in ("png", "pdf", "csv"))
    for study in studies_of(several):
        assert (tmp_path / study.slug / "paired.csv").is_file() and f'id="{study.slug}"' in html
    rows = list(csv.DictReader((tmp_path / "over_adapter_causal.csv").open()))
    run = studies_of(several)[0].trained["causal"]
    (row,) = [r for r in rows if r["site"] == "layer_03" and r["dataset"] == "ade20k" and r["model"].startswith("clip")]
    assert float(row["over_adapter"]) == pytest.approx(miou(run)[4] - miou(run)[1])
    assert len(list(csv.DictReader((tmp_path / "table2.csv").open()))) == 8 + 6


def paper_like(root, path, **metrics):
    """A run that says of itself that it has the shape of the paper's CLIP configuration."""
    run = write_run(path, [0.5] * 35, root=root, dataset="ade20k", encoder="clip", metrics=metrics)
    facts = json.loads((run / "metrics.json").read_text())
    for entry in facts["sites"]:
        entry["dim"] = 1024 if entry["site"] == "encoder" else 4096
        entry["iou_per_class"] = [None] * 150
    facts |= {"images": 2000, "grid": [24, 24], "classes": [str(k) for k in range(150)]} | metrics
    (run / "metrics.json").write_text(json.dumps(facts))
    return ProbeRun(run)


def test_only_the_papers_configurations_are_compared_with_it(root, tmp_path, several):
    assert paper_encoder(paper_like(root, tmp_path / "same")) == "clip"
    for i, other in enumerate(
        [
            {"images": 100},
            {"dataset": "voc2012"},
            {"grid": [8, 8]},
            {"untrained": ["llm"]},
            {"image_attention": "prefix"},
        ]
        + [{"image_attention": "bidirectional", "own_image_attention": "causal"}]
    ):
        assert paper_encoder(paper_like(root, tmp_path / str(i), **other)) is None, other
    assert all(paper_encoder(ProbeRun(path)) is None for path in several)
    assert departures(ProbeRun(several[0])) == {"epochs": 2}


def test_difference_to_the_paper_is_ours_minus_theirs(root, tmp_path):
    from probes.report.tables import table2_difference

    run = paper_like(root, tmp_path / "causal")
    (row,) = table2_difference(studies_of([str(run.path)]))
    theirs = PAPER["table2_ade20k_miou"]["clip"]
    assert row["adapter"] == pytest.approx(run.metrics["summary"]["adapter"] - theirs["causal"][0] / 100)
    assert row["encoder"] == pytest.approx(run.metrics["summary"]["encoder"] - theirs["encoder"] / 100)
    assert row["probe_recipe"] == "epochs 2"


def test_where_a_number_of_the_paper_was_read_is_said(several, tmp_path):
    assert set(PAPER["read_from"]) - {"plots"} == set(PAPER) - {"source", "read_from"}
    main(["report", several[0], "--out", str(tmp_path)])
    html = unescape((tmp_path / "index.html").read_text())
    assert PAPER["read_from"]["plots"] in html and PAPER["read_from"]["table2_ade20k_miou"] in html
    assert "must not be subtracted" in html


FLAT = [0.6, 0.6, 0.6, 0.6, 0.6, 0.6]


@pytest.fixture(scope="module")
def swept(root, tmp_path_factory):
    """A causal run with every kind of recipe; under layernorm there is neither drop-off nor recovery."""
    recipes = {
        "fast": ({"learning_rate": 0.01}, [q - 0.05 for q in CURVE[:2]] + [q + 0.05 for q in CURVE[2:]]),
        "batchnorm": ({"feature_norm": "batchnorm"}, CURVE),
        "layernorm": ({"feature_norm": "layernorm"}, FLAT),
        "mlp": ({"head": "mlp"}, [0.7] * 6),
        "again": ({"seed": 1}, [q + 0.01 for q in CURVE]),
        "shuffled": ({"labels": "shuffled"}, [0.3] * 6),
    }
    folder = tmp_path_factory.mktemp("swept")
    return ProbeRun(write_run(folder / "run", CURVE, root=root, recipes=recipes, states=True, confusion=True))


def test_effects_of_every_recipe_equal_numpy(swept):
    facts = scale_confound(swept)
    assert [entry["recipe"] for entry in facts["recipes"]] == ["main", "fast", "batchnorm", "layernorm"]
    for entry in facts["recipes"]:
        counts = swept.counts_of(None if entry["recipe"] == "main" else entry["recipe"])
        scores = dataset_scores(counts).miou.tolist()
        assert entry["adapter_drop"]["value"] == pytest.approx(scores[0] - scores[1])
        assert entry["recovery"]["value"] == pytest.approx(max(scores[2:5]) - scores[1])


def test_each_norm_is_read_at_the_best_learning_rate_of_each_site(swept):
    ways = {way["way"]: way for way in scale_confound(swept)["ways"]}
    assert list(ways) == ["none", "batchnorm", "layernorm"]
    main_, fast = (dataset_scores(swept.counts_of(name)).miou for name in (None, "fast"))
    best = torch.maximum(main_, fast)
    assert (fast > main_).any() and (fast < main_).any()
    assert ways["none"]["recovery"]["value"] == pytest.approx((best[2:5].max() - best[1]).item())


def test_verdict_follows_from_the_intervals(swept):
    facts = scale_confound(swept)
    for effect, words in facts["verdict"].items():
        holding = [way["way"] for way in facts["ways"] if way[effect]["ci95"][0] > 0]
        assert holding == ["none", "batchnorm"] and "holds under 2 of 3 norms" in words
        assert "each site at its best learning rate, not under layernorm (" in words
        failing = [entry["recipe"] for entry in facts["recipes"] if not entry[effect]["holds"]]
        assert (
            failing == ["layernorm"] and "one by one, it holds under 3 of 4 recipes, not under norm layernorm" in words
        )
    good = {"value": 0.05, "ci95": [0.03, 0.07], "holds": True}
    bad = {"value": -0.05, "ci95": [-0.07, -0.03], "holds": False}
    assert "holds under 2 of 2 norms (a +5.0, b +5.0 pp): it survives" in verdict("x", "norms", {"a": good, "b": good})
    nothing = verdict("x", "norms", {"a": bad, "b": bad})
    assert "holds under 0 of 2 norms: a (reversed, −5.0 [−7.0, −3.0])" in nothing and "no ground" in nothing


def test_recipes_of_a_run_of_their_own_stand_for_the_main_runs(pair, swept):
    (study,) = studies_of(pair, recipes=[str(swept.path)])
    facts = results(study)
    assert list(facts["scale"]) == ["causal"] and facts["scale"]["causal"] == scale_confound(swept)
    assert facts["masks"]["causal"]["probing"] == ProbeRun(pair[0]).metrics
    assert remarks_of(facts)["The scale of the features"][0].startswith(
        "Causal: The drop-off holds under 2 of 3 norms, each site"
    )
    with pytest.raises(ValueError, match="under 'causal', of which no main run is given"):
        studies_of(pair[1:], recipes=[str(swept.path)])


def test_budget_takes_epochs_from_where_it_was_validated(root, tmp_path):
    probe = {"head": "linear", "feature_norm": "none", "learning_rate": 1e-3, "batch_size": 4, "epochs": 10}
    probe |= {"steps": 100, "validated_at": [25, 100]}
    run = ProbeRun(write_run(tmp_path / "run", CURVE, root=root, metrics={"probe": probe}))
    rows = probe_budget(studies_of([str(run.path)])[0]).rows
    assert {(row["epoch"], row["step"]) for row in rows} == {(2.5, 25), (10.0, 100)}


def test_without_recipes_there_is_no_verdict(pair):
    assert scale_confound(ProbeRun(pair[0])) is None and over_seeds(ProbeRun(pair[0])) == []


def test_learning_rates_alone_are_judged_by_themselves(root, tmp_path):
    run = write_run(tmp_path / "run", CURVE, root=root, recipes={"fast": ({"learning_rate": 0.01}, CURVE)})
    words = scale_confound(ProbeRun(run))["verdict"]["recovery"]
    assert "holds under 2 of 2 learning rates (norm none, lr 0.001 +" in words


def test_spread_over_seeds(swept):
    spread = {entry["of"]: entry for entry in over_seeds(swept)}
    first, second = (dataset_scores(swept.counts_of(name)).miou for name in (None, "again"))
    assert spread["layer_02"]["seeds"] == 2
    assert spread["layer_02"]["mean"] == pytest.approx((first[3] + second[3]).item() / 2)
    assert spread["layer_02"]["sd"] == pytest.approx((first[3] - second[3]).abs().item() / 2**0.5)
    gains = [(x[2:5].max() - x[1]).item() for x in (first, second)]
    assert (spread["recovery"]["lowest"], spread["recovery"]["highest"]) == (min(gains), max(gains))


def test_confused_pairs_equal_a_loop(swept):
    confusion, classes = swept.confusion.numpy(), swept.metrics["classes"]
    pairs = confusion_pairs(swept)
    assert len(pairs) == 6 and [p["share"][1] for p in pairs] == sorted([p["share"][1] for p in pairs], reverse=True)
    for entry in pairs:
        a, b = classes.index(entry["label"]), classes.index(entry["predicted"])
        assert a != b
        for s in range(6):
            assert entry["share"][s] == pytest.approx(confusion[s, a, b] / sum(confusion[s, a, k] for k in range(3)))


def test_rare_labels_are_no_confused_pair(swept):
    run = ProbeRun(swept.path)
    rare = run._tensors["confusion"].clone()
    rare[:, 0] = torch.tensor([0, 1, 0])  # one pixel of class 0, always wrong
    run._tensors["confusion"] = rare
    assert {entry["label"] for entry in confusion_pairs(run)} == set(run.metrics["classes"][1:])


def test_half_gone_waits_until_it_stays_gone():
    layers = ["adapter", "layer_01", "layer_02", "layer_03", "layer_04"]
    assert half_gone([0.4, 0.1, 0.3, 0.2, 0.2], layers) == "layer_03"
    assert half_gone([0.4, 0.2, 0.1, 0.0, 0.0], layers) == "layer_01"
    assert half_gone([0.4, 0.1, 0.1, 0.1, 0.3], layers) is None


@pytest.mark.slow
def test_every_section_appears_where_its_data_is(swept, pair, tmp_path):
    main(["report", str(swept.path), "--out", str(tmp_path / "all")])
    main(["report", *pair, "--out", str(tmp_path / "few")])
    sections = {
        name: set(re.findall(r"<h2>(.*?)</h2>", (tmp_path / name / "index.html").read_text()))
        for name in ("all", "few")
    }
    further = {"The scale of the features", "Richer heads", "Probe seeds", "Controls", "The states themselves"}
    assert further | {"Which classes are told apart where"} <= sections["all"] and not further & sections["few"]
    assert "Bidirectional against causal" in sections["few"] - sections["all"]
    html = (tmp_path / "all/index.html").read_text()
    for words in scale_confound(swept)["verdict"].values():
        assert words.split(":")[0].split("(")[0] in html
    for name in (
        "scale_effects",
        "scale_curves",
        "heads",
        "seeds",
        "controls",
        "states",
        "budget_steps",
        "confusion_causal",
    ):
        assert all((tmp_path / f"all/{name}.{kind}").stat().st_size > 100 for kind in ("png", "pdf", "csv"))
    results = json.loads((tmp_path / "all/results.json").read_text())
    assert results["scale"]["causal"] == scale_confound(swept) and results["paired"] is None
    steps = list(csv.DictReader((tmp_path / "all/budget_steps.csv").open()))
    assert {row["step"] for row in steps} == {"10", "20"}


def test_a_mask_that_was_not_trained_with_is_said_to_be(root, tmp_path):
    own = write_run(tmp_path / "a", CURVE, root=root, metrics={"own_image_attention": "causal"})
    other = write_run(tmp_path / "b", CURVE, root=root, mask="bidirectional", metrics={"own_image_attention": "causal"})
    main(["report", str(own), str(other), "--out", str(tmp_path / "report")])
    html = (tmp_path / "report/index.html").read_text()
    assert (
        html.count('class="note"') == 1 and "The bidirectional run puts a model that was trained under causal" in html
    )


def test_counts_and_recipes_are_read_as_they_were_written(swept):
    assert isinstance(swept.counts, Counts) and swept.groups is None
    main_, other = swept.counts, swept.counts_of("layernorm")
    assert torch.equal(main_.labelled, other.labelled) and not torch.equal(main_.intersection, other.intersection)
