"""Several probe variants in one pass: each trains as if alone, and none affects the main one."""

import shutil

import numpy as np
import probe_runs
import pytest
import tiny_models
import torch
import yaml
from PIL import Image
from tolerances import rounding

from probes.cli import main
from probes.results.probe_run import ProbeRun
from probes.results.run_files import read_tensors
from probes.training.probe_variants import ProbeVariant, build_variants, shuffle_masks

pytestmark = pytest.mark.numerics

VARIANTS = {
    "plain": {"feature_norm": "none"},
    "layernorm_1e-1": {"feature_norm": "layernorm", "learning_rate": 0.1},
    "mlp": {"head": "mlp"},
    "conv": {"head": "conv"},
    "shuffled": {"labels": "shuffled"},
    "seed_1": {"seed": 1},
}


def arguments(checkpoint, root, out, *more: str) -> list[str]:
    three = ["--trainer.max_epochs", "3", "--data.batch_size", "4"]
    return probe_runs.arguments(checkpoint, root, out, *three, *more)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "variants.yaml"
    path.write_text(yaml.safe_dump({"model": {"variants": VARIANTS}}, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def run(checkpoints, segmentation, config, tmp_path_factory) -> ProbeRun:
    out = tmp_path_factory.mktemp("run")
    main(arguments(checkpoints["causal"], segmentation, out, "-c", config))
    return ProbeRun(out)


@pytest.fixture(scope="module")
def alone(checkpoints, segmentation, tmp_path_factory) -> ProbeRun:
    out = tmp_path_factory.mktemp("alone")
    main(arguments(checkpoints["causal"], segmentation, out))
    return ProbeRun(out)


def test_main_variant_does_not_depend_on_others_to_the_bit(run, alone):
    for name in ("counts", "probes"):
        ours, others = (read_tensors(r.path / f"{name}.safetensors") for r in (alone, run))
        assert all(torch.equal(tensor, others[key]) for key, tensor in ours.items())
        assert all(key.startswith("recipes/") for key in set(others) - set(ours))
    assert run.metrics | {"recipes": {}} == alone.metrics | {"mllm": run.metrics["mllm"]}
    assert not (alone.path / "recipes.safetensors").exists()


def assert_same_probes(run: ProbeRun, name: str, alone: ProbeRun, steps: int = 9) -> None:
    ours, theirs = (read_tensors(r.path / "probes.safetensors") for r in (run, alone))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[f"recipes/{name}/{key}"], tensor, msg=key, **rounding(tensor, steps))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "seed_1"])
def test_variant_trains_the_probes_of_a_run_of_its_own(name, run, checkpoints, segmentation, tmp_path):
    flags = [x for key, value in VARIANTS[name].items() for x in (f"--model.{key}", str(value))]
    main(arguments(checkpoints["causal"], segmentation, tmp_path, *flags))
    alone = ProbeRun(tmp_path)
    assert_same_probes(run, name, alone)
    entry = run.metrics["recipes"][name]
    assert entry["summary"] == pytest.approx(alone.metrics["summary"]) and entry["probe"] == alone.metrics["probe"]
    for site, expected in zip(entry["sites"], alone.metrics["sites"], strict=True):
        assert site == {key: pytest.approx(value) for key, value in expected.items() if key != "states"}


def test_seed_of_a_variant_equals_the_seed_of_a_run(checkpoints, segmentation, tmp_path):
    """With all images in one batch: a run's seed also orders the images."""
    variants = ["--model.variants", "{seed_1: {seed: 1}}", "--data.batch_size", "6"]
    main(arguments(checkpoints["causal"], segmentation, tmp_path / "a", *variants))
    main(arguments(checkpoints["causal"], segmentation, tmp_path / "b", *variants[2:], "--seed_everything", "1"))
    together, alone = ProbeRun(tmp_path / "a"), ProbeRun(tmp_path / "b")
    assert_same_probes(together, "seed_1", alone, steps=3)
    mains = (r.probes()["adapter"].head.weight for r in (together, alone))
    assert not torch.allclose(*mains, rtol=1e-2, atol=1e-2)


def test_results_of_variants_have_the_documented_keys(run):
    assert list(run.metrics["recipes"]) == list(VARIANTS)
    for name, difference in VARIANTS.items():
        entry = run.metrics["recipes"][name]
        assert set(entry) == {"probe", "sites", "summary"}
        expected = {key: run.metrics["probe"][key] for key in run.metrics["probe"]} | difference
        assert entry["probe"] == expected
        assert [site["site"] for site in entry["sites"]] == run.sites
        scores = {site["site"]: site["miou"] for site in entry["sites"]}
        assert entry["summary"]["recovery"] == entry["summary"]["peak_llm"] - scores["adapter"]
    assert all({"rms", "anisotropy", "knn_purity"} <= set(site["states"]) for site in run.metrics["sites"])


def test_counts_of_a_variant_give_its_scores(run):
    from probes.evaluation.bootstrap import dataset_scores

    for name in (None, *VARIANTS):
        sites = (run.metrics if name is None else run.metrics["recipes"][name])["sites"]
        scores = dataset_scores(run.counts_of(name))
        assert scores.miou.tolist() == [site["miou"] for site in sites]
        assert scores.pacc.tolist() == [site["pacc"] for site in sites]
    assert (run.counts_of("mlp").intersection != run.counts.intersection).any()
    with pytest.raises(ValueError, match="no variant 'mpl'; it has plain, layernorm_1e-1, mlp, "):
        run.counts_of("mpl")


def test_resumed_run_equals_an_uninterrupted_one(checkpoints, segmentation, config, tmp_path):
    save = tmp_path / "save.yaml"
    save.write_text(
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {save_top_k: -1}}]}"
    )
    main(arguments(checkpoints["causal"], segmentation, tmp_path / "a", "-c", config, "-c", str(save)))
    (first,) = (tmp_path / "a/checkpoints").glob("epoch=0-*.ckpt")
    resume = ["-c", config, "--ckpt_path", str(first)]
    main(arguments(checkpoints["causal"], segmentation, tmp_path / "b", *resume))
    whole, resumed = (ProbeRun(tmp_path / name) for name in "ab")
    assert whole.metrics == resumed.metrics and len(whole.metrics["recipes"]["mlp"]["sites"][0]["history"]) == 3
    tensors = [read_tensors(r.path / "probes.safetensors") for r in (whole, resumed)]
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())


def test_checkpoint_of_other_variants_is_rejected(checkpoints, segmentation, run, tmp_path):
    shutil.copytree(run.path / "checkpoints", tmp_path / "checkpoints")
    command = arguments(checkpoints["causal"], segmentation, tmp_path, "--ckpt_path", "last")
    with pytest.raises(SystemExit, match="run with model.variants.* resume with the original setting"):
        main(command)
    command[:1], command[-1:] = ["test"], [str(tmp_path / "checkpoints/last.ckpt")]
    with pytest.raises(SystemExit, match="differ in .* e.g. heads.recipes/conv/adapter.head.conv.bias; use the"):
        main(command)


@pytest.mark.parametrize("limit", ["2", "0.7"])
def test_limited_batches_are_the_steps_of_the_schedule(limit, checkpoints, segmentation, tmp_path):
    """Six images in batches of two are three steps; two of them are trained."""
    more = ["--data.batch_size", "2", "--trainer.limit_train_batches", limit, "--trainer.max_epochs", "2"]
    main(arguments(checkpoints["causal"], segmentation, tmp_path, *more))
    probe = ProbeRun(tmp_path).metrics["probe"]
    assert probe["steps"] == 4 and probe["validated_at"] == [2, 4] and probe["epochs"] == 2


def test_validation_within_an_epoch_records_its_step(checkpoints, segmentation, tmp_path):
    """Six images in batches of two are three steps; a validation after each."""
    more = ["--data.batch_size", "2", "--trainer.val_check_interval", "1", "--trainer.max_epochs", "2"]
    more += ["--model.variants", "{high: {learning_rate: 0.5}}"]
    main(arguments(checkpoints["causal"], segmentation, tmp_path, *more))
    metrics = ProbeRun(tmp_path).metrics
    for entry in (metrics, metrics["recipes"]["high"]):
        steps = entry["probe"]["validated_at"]
        assert steps == [1, 2, 3, 4, 5, 6]
        for site in entry["sites"]:
            best = site["history"].index(max(site["history"]))
            assert site["best_epoch"] == pytest.approx(steps[best] / 3) and site["miou"] == max(site["history"])
    found = [site["best_epoch"] for site in metrics["sites"] + metrics["recipes"]["high"]["sites"]]
    assert any(isinstance(epoch, float) for epoch in found), "else no probe is best within an epoch"


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"a.b": {"seed": 1}}, "model.variants.a.b: the name of a variant may contain letters, digits, _ and -"),
        ({"a": {"rate": 1}}, "model.variants.a must set some of head, .*, seed, got {'rate': 1}"),
        ({"a": None}, "model.variants.a must set some of"),
        ({"a": {"head": "lstm"}}, "model.variants.a: unknown head 'lstm'; expected one of linear, mlp, conv"),
        ({"a": {"feature_norm": "l2"}}, "model.variants.a: unknown feature_norm 'l2'; expected one of none, batch"),
        ({"a": {"labels": "random"}}, "model.variants.a: unknown labels 'random'; expected one of true, shuffled"),
        ({"a": {"learning_rate": "x"}}, "model.variants.a: learning_rate must be a number above 0, got 'x'"),
        ({"a": {"learning_rate": 0}}, "model.variants.a: learning_rate must be a number above 0, got 0"),
        ({"a": {"seed": 0.5}}, "model.variants.a: seed must be an integer, got 0.5"),
    ],
)
def test_bad_variant_is_an_error_that_names_its_key(variants, message):
    with pytest.raises(ValueError, match=message):
        build_variants(ProbeVariant(), variants)


def test_variant_that_equals_another_one_is_skipped_with_a_message(caplog):
    variants = {"a": {"head": "linear"}, "b": {"seed": 1}, "c": {"seed": 1}, "d": {"seed": 2}}
    assert list(build_variants(ProbeVariant(), variants)) == [None, "b", "d"]
    said = [line for line in caplog.messages if "skipped" in line]
    assert ["model.variants.a", "model.variants.c"] == [line.split()[0] for line in said]


def test_shuffled_gives_every_image_the_mask_of_another():
    masks = torch.arange(5, dtype=torch.uint8).view(5, 1, 1).expand(5, 3, 4)
    assert shuffle_masks(masks)[:, 0, 0].tolist() == [4, 0, 1, 2, 3]
    assert [mask[0, 0].item() for mask in shuffle_masks(list(masks))] == [4, 0, 1, 2, 3]


def test_shuffled_masks_take_the_size_of_their_new_image():
    masks = [torch.randint(0, 3, size, dtype=torch.uint8) for size in ((6, 4), (9, 5), (7, 7))]
    for i, mask in enumerate(shuffle_masks(masks)):
        other = masks[i - 1]
        rows, columns = (
            ((torch.arange(n) + 0.5) * m / n).long() for n, m in zip(masks[i].shape, other.shape, strict=True)
        )
        assert mask.dtype == torch.uint8 and torch.equal(mask, other[rows][:, columns])


def test_single_image_has_no_shuffled_label():
    assert (shuffle_masks(torch.zeros(1, 2, 2, dtype=torch.uint8)) == 255).all()
    assert (shuffle_masks([torch.zeros(2, 2, dtype=torch.uint8)])[0] == 255).all()


def test_shuffled_labels_allow_position_only(checkpoints, tmp_path):
    """Images of one class each: there is nothing to learn but which image has which, and that is what is shuffled."""
    root = tiny_models.write_segmentation(tmp_path / "data", training=12, validation=6)
    for mask in root.glob("annotations/*/*.png"):
        number = int(mask.stem) % 3
        Image.fromarray(np.full((24, 20), number, np.uint8)).save(mask)
        image = np.full((24, 20, 3), 30, np.uint8)
        image[..., number] = 200
        Image.fromarray(image).save(root / "images" / mask.parent.name / mask.name)
    more = ["--model.variants", "{shuffled: {labels: shuffled}}", "--trainer.max_epochs", "20"]
    more += ["--model.sites", "[encoder]"]
    main(arguments(checkpoints["causal"], root, tmp_path / "run", *more))
    metrics = ProbeRun(tmp_path / "run").metrics
    true, control = (m["sites"][0]["pacc"] for m in (metrics, metrics["recipes"]["shuffled"]))
    assert true > 0.95 and control < 0.7
