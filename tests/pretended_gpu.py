"""Commands on a pretended GPU: every tensor is where its operation needs it, and results are those of the CPU."""

import json

import numpy as np
import pytest
import task_runs
import tiny_families
import tiny_models
import torch
from equal import flatten
from PIL import Image
from pretend_gpu import pretend_gpu, pretend_mps
from probe_runs import fit, write_questions
from safetensors.torch import load_file

import llava_bidir.cli
import probes
from probes.cli import main
from probes.models.families import dynamic_resolution, gemma
from probes.runs.read import ProbeRun

GPU = ["--trainer.accelerator", "gpu"]
# With a few strengths and sites: a pretended GPU is many times slower than the CPU.
SOLVE = "--model.sites=[adapter,layer_02] --folds 2 --strengths 1e-2".split()
ANALYSES = {
    "knockout": ["--classes", "sky", "wall"],
    "routes": ["--limit", "2", "--draws", "1"],
    "patching": ["--site", "layer_02", "--limit", "4", "--draws", "1"],
    "position": [],
    "norms": ["--limit", "2"],
    "sinks": ["--limit", "2"],
    "umap": ["--image", "1"],
    "maps": ["--image", "1", "3"],
}


@pytest.fixture
def photo(segmentation) -> str:
    return str(segmentation / "images/validation/000.png")


@pytest.mark.parametrize(
    "more",
    [
        "--model.gradient_checkpointing true",
        "--model.lora.r 2 --model.frozen_dtype bfloat16 --trainer.precision bf16-mixed",
    ],
)
def test_training_and_its_answers(more, parts, conversations, photo, tmp_path):
    with pretend_gpu():
        tiny_models.fit(parts, conversations, tmp_path / "run", *more.split(), *GPU)
        llava_bidir.cli.main(f"generate {tmp_path}/run/hf {photo} sky --max-new-tokens 2".split())


@pytest.mark.parametrize("control", ["none", "update"])
def test_trained_probes(control, checkpoints, segmentation, photo, tmp_path):
    more = [] if control == "none" else ["--model.untrained", "[llm]", "--model.match", control]
    with pretend_gpu():
        fit(checkpoints["causal"], segmentation, tmp_path / "run", *more, *GPU)
        main(f"segment --probes {tmp_path}/run {photo} --out {tmp_path}/maps".split())


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_a_mac_solves_on_its_cpu_what_its_gpu_reads(task, checkpoints, segmentation, tmp_path):
    """Also where random layers are matched to the trained ones."""
    root = task_runs.write_targets(segmentation, tmp_path / "data")
    more = ["--model.untrained", "[llm]", "--model.match", "update"] if task == "depth" else []
    for out in ("cpu", "auto"):
        words = task_runs.arguments(
            "solve", task, checkpoints["causal"], root, tmp_path / out, *SOLVE, *more
        )
        with pretend_mps():
            main([*words, "--trainer.accelerator", out])
    on_cpu, on_mac = (load_file(tmp_path / out / "probes.safetensors") for out in ("cpu", "auto"))
    assert on_cpu.keys() == on_mac.keys()
    assert all(torch.equal(x, on_mac[name]) for name, x in on_cpu.items())


def test_probes_are_trained_on_a_mac(checkpoints, segmentation, tmp_path):
    with pretend_mps():
        fit(checkpoints["causal"], segmentation, tmp_path / "run", "--trainer.accelerator", "auto")
    assert (tmp_path / "run" / "metrics.json").is_file()


@pytest.fixture(scope="module")
def run(checkpoints, tmp_path_factory) -> ProbeRun:
    root = tiny_models.write_segmentation(tmp_path_factory.mktemp("data"), 4, 9, seed=5)
    out = tmp_path_factory.mktemp("runs") / "run"
    return fit(checkpoints["causal"], root, out, "--data.batch_size", "2")


@pytest.mark.nightly
@pytest.mark.parametrize("analysis", ANALYSES)
def test_analyses_are_those_of_the_cpu(analysis, run, tmp_path):
    """Up to rounding: a copy on the device may be summed in another order than a view."""
    argv = [analysis, "--probes", str(run.path), *ANALYSES[analysis]]
    if analysis == "routes":
        argv += ["--questions", str(write_questions(run, tmp_path))]
    main([*argv, "--out", str(tmp_path / "cpu")])
    with pretend_gpu():
        main([*argv, "--out", str(tmp_path / "gpu")])
    files = sorted((tmp_path / "cpu").glob("*.json"))
    assert files
    for file in files:
        expected = dict(flatten(json.loads(file.read_text()), file.name))
        found = dict(flatten(json.loads((tmp_path / "gpu" / file.name).read_text()), file.name))
        near = {
            name: pytest.approx(x, rel=1e-6) if isinstance(x, float) else x
            for name, x in expected.items()
        }
        assert found == near


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(tiny_families.STOCK))
def test_states_of_every_family_are_those_of_the_cpu(name, tmp_path, monkeypatch):
    if name.endswith(("_moe", "kimi_k25")):
        pytest.skip("transformers calls a CUDA kernel for experts on a GPU")
    for module, side in (
        (dynamic_resolution, "TOKENS_PER_SIDE"),
        (gemma, "GEMMA4_TOKENS_PER_SIDE"),
    ):
        monkeypatch.setattr(module, side, tiny_families.SIDE)
    path = str(tiny_families.write(name, tmp_path))
    masks = ("bidirectional",) * tiny_families.STOCK[name].masks
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels), Image.fromarray(255 - pixels)]
    for mask in (None, *masks):
        on_cpu = probes.load(path, image_attention=mask, device="cpu")
        expected = on_cpu(on_cpu.preprocess(images))
        blocked = torch.arange(on_cpu.image_tokens).expand(2, -1) < 3
        with pretend_gpu():
            mllm = probes.load(path, image_attention=mask)
            states = mllm(mllm.preprocess(images))
            if masks:
                mllm(mllm.preprocess(images), knockout=probes.Knockout(blocked, layers=[1, 2]))
        assert states.keys() == expected.keys()
        assert all(torch.equal(x, expected[site]) for site, x in states.items())
