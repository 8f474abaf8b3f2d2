"""Every shipped YAML runs against the real classes: parsed, type-checked, instantiated."""

from importlib.util import find_spec
from pathlib import Path

import dataset_layouts
import pytest
import tiny_models
import yaml
from transformers import (
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_bidir.model.lora import Lora

CONFIGS = Path(__file__).parents[1] / "configs"
OWN_ENCODER = {  # the kind of encoder that a config names itself
    "demo/stage1.yaml": "clip",
    "demo/stage2.yaml": "clip",
    "real/stage1.yaml": "dinov2",
    "real/stage2.yaml": "dinov2",
}
UPON_REAL = ["real/photos.yaml"]
TRAINING = ["stage1.yaml", "stage2.yaml", *OWN_ENCODER]
ENCODERS = ["encoder/clip.yaml", "encoder/dinov2.yaml", "encoder/siglip.yaml"]
BUDGET = ["budget/lora_24gb.yaml", "budget/full_80gb.yaml"]  # behind stage 2 and an encoder
CLUSTER = [
    "cluster/ddp.yaml",
    "cluster/fsdp2.yaml",
    "cluster/zero2.yaml",
    "cluster/zero3.yaml",
    "cluster/zero3_offload.yaml",
]
PROBING = {  # config: a dataset in its layout, and how many classes that has
    "probes/folder.yaml": (tiny_models.write_segmentation, 3),
    "probes/ade20k.yaml": (dataset_layouts.write_ade20k, 150),
    "probes/voc2012.yaml": (dataset_layouts.write_voc2012, 20),
    "probes/cityscapes.yaml": (dataset_layouts.write_cityscapes, 19),
    "demo/probes.yaml": (tiny_models.write_segmentation, 3),
}
UPON_PROBING = ["probes/matched.yaml"]


def test_every_yaml_is_covered_here():
    known = {*TRAINING, *ENCODERS, *BUDGET, *CLUSTER, *PROBING, *UPON_PROBING, *UPON_REAL}
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")} == known


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Tiny towers of each kind, to stand for those that the configs name."""
    root = tmp_path_factory.mktemp("encoders")
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    CLIPVisionModel(tiny_models.vision_config()).save_pretrained(root / "clip")
    Dinov2Model(Dinov2Config(**small)).save_pretrained(root / "dinov2")
    SiglipVisionModel(SiglipVisionConfig(**small)).save_pretrained(root / "siglip")
    return root


def instantiate(
    files,
    parts,
    conversations,
    encoder_path,
):
    from llava_bidir.training.cli import build_cli

    argv = [x for file in files for x in ("-c", str(CONFIGS / file))]
    records = str(conversations / "data.json")
    argv += f"--model.encoder.path {encoder_path} --model.llm {parts[1]}".split()
    argv += f"--data.images {conversations} --data.annotations {records}".split()
    argv += "--trainer.accelerator cpu --trainer.precision 32-true".split()
    configs = [yaml.safe_load((CONFIGS / file).read_text()) for file in files]
    if any("val_annotations" in config.get("data", {}) for config in configs):
        argv += ["--data.val_annotations", records]
    if "real/stage2.yaml" in files:  # tiny LLMs have no chat template
        argv += ["--data.template", "vicuna_v1"]
    return build_cli(argv, run=False)


PAIRS = [
    (stage, encoder)
    for stage in TRAINING
    for encoder in ENCODERS
    if OWN_ENCODER.get(stage, Path(encoder).stem) == Path(encoder).stem
]


@pytest.mark.parametrize(("stage", "encoder"), PAIRS)
def test_training_config_is_instantiated(
    stage,
    encoder,
    parts,
    conversations,
    encoders,
):
    files = [stage] if stage in OWN_ENCODER else [stage, encoder]
    cli = instantiate(files, parts, conversations, encoders / Path(encoder).stem)
    assert cli.datamodule.collate.processor is cli.model.processor
    assert cli.trainer.max_epochs == 1


def test_options_for_photos_are_instantiated_upon_both_stages(parts, conversations, encoders):
    for stage in ("real/stage1.yaml", "real/stage2.yaml"):
        cli = instantiate([stage, *UPON_REAL], parts, conversations, encoders / "dinov2")
        assert cli.model.hparams.compile


@pytest.mark.parametrize("cluster", CLUSTER)
def test_cluster_config_is_instantiated_upon_a_recipe(
    cluster,
    parts,
    conversations,
    encoders,
):
    from lightning.pytorch.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        ModelParallelStrategy,
    )

    kinds = {"ddp": DDPStrategy, "fsdp2": ModelParallelStrategy}
    if "zero" in cluster and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed (extra: cluster) is not installed")
    cli = instantiate(
        ["stage2.yaml", "encoder/clip.yaml", cluster], parts, conversations, encoders / "clip"
    )
    strategy = cli.trainer.strategy
    assert isinstance(strategy, kinds.get(Path(cluster).stem, DeepSpeedStrategy))
    if "zero" in cluster:
        zero, width = (
            strategy.config["zero_optimization"],
            4096,
        )  # what Hugging Face's Trainer makes of "auto"
        assert "auto" not in str(strategy.config)
        assert zero["reduce_bucket_size"] == width * width
        assert zero["stage"] == (2 if "zero2" in cluster else 3)
        assert zero.get("stage3_prefetch_bucket_size", 0) in (0, int(0.9 * width * width))
        assert zero.get("stage3_param_persistence_threshold", 0) in (0, 10 * width)
        assert strategy.exclude_frozen_parameters


@pytest.mark.parametrize(
    ("stage", "numbers"),
    [
        ("stage1.yaml", (1e-3, 256, ["adapter"], "plain", "center_crop", False)),
        ("stage2.yaml", (2e-5, 128, ["adapter", "llm"], "vicuna_v1", "pad", True)),
    ],
)
def test_recipe_is_llava_1_5(
    stage,
    numbers,
    parts,
    conversations,
    encoders,
):
    """Source: LLaVA scripts/v1_5/pretrain.sh and finetune.sh; paper, App. A.1."""
    cli = instantiate([stage, "encoder/clip.yaml"], parts, conversations, encoders / "clip")
    model = cli.model.hparams
    data = cli.datamodule
    assert (
        model.learning_rate,
        data.batch_size,
        model.trainable,
        data.collate.template,
        model.image_resize,
        data.group_by_length,
    ) == numbers
    assert (model.weight_decay, model.warmup_ratio, tuple(model.betas)) == (0.0, 0.03, (0.9, 0.999))
    assert model.loss_average == "llava"
    assert model.lora is None
    assert data.hparams.max_length == 2048  # the tiny LLM has fewer positions
    assert cli.trainer.gradient_clip_val is None
    assert yaml.safe_load((CONFIGS / stage).read_text())["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize("budget", BUDGET)
def test_budget_accumulates_to_the_recipes_batch(
    budget,
    parts,
    conversations,
    encoders,
):
    if "zero.ZeRO" in (CONFIGS / budget).read_text() and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed (extra: cluster) is not installed")
    files = ["stage2.yaml", "encoder/clip.yaml", budget]
    cli = instantiate(files, parts, conversations, encoders / "clip")
    stage2 = yaml.safe_load((CONFIGS / "stage2.yaml").read_text())
    assert cli.datamodule.batch_size == stage2["data"]["batch_size"]
    assert cli.datamodule.group_by_length
    assert cli.trainer.num_devices == 1
    assert cli.datamodule.micro_batch_size < cli.datamodule.batch_size
    assert cli.model.hparams.loss_average == "tokens"
    if "lora" in budget:  # Source: LLaVA scripts/v1_5/finetune_lora.sh
        rates = cli.model.hparams.learning_rate, cli.model.hparams.adapter_learning_rate
        assert cli.model.lora == Lora(128, 256, 0.05)
        assert rates == (2e-4, 2e-5)


@pytest.mark.parametrize("more", [[], *([name] for name in UPON_PROBING)])
@pytest.mark.parametrize("file", PROBING)
def test_probing_config_is_instantiated(
    file,
    more,
    checkpoints,
    tmp_path,
):
    from probes.fit.cli import build_cli

    write, classes = PROBING[file]
    argv = [x for name in [file, *more] for x in ("-c", str(CONFIGS / name))]
    argv += f"--model.mllm {checkpoints['causal']} --data.root {write(tmp_path)}".split()
    cli = build_cli([*argv, "--trainer.accelerator", "cpu"], run=False)
    assert cli.model.hparams.num_classes == classes
    assert bool(cli.model.hparams.untrained) == bool(more)


@pytest.mark.parametrize("file", [file for file in PROBING if file.startswith("probes/")])
def test_probing_protocol_is_the_papers(file):
    """App. A.2: AdamW (0.9, 0.999), 1e-3, polynomial 0.9, no weight decay, batch 64, plain linear; 20 epochs, or for
    small data the steps that 20 epochs of ADE20K are."""
    config = yaml.safe_load((CONFIGS / file).read_text())
    model = {
        "feature_norm": "none",
        "learning_rate": 1e-3,
        "betas": [0.9, 0.999],
        "weight_decay": 0.0,
    }
    assert config["model"] == model
    assert config["data"]["batch_size"] == 64
    trainer = config["trainer"]
    length = ("max_epochs", "max_steps", "val_check_interval", "check_val_every_n_epoch")
    if file == "probes/folder.yaml":
        steps = 20 * -(-20210 // 64)
        assert [trainer[key] for key in length] == [-1, steps, steps // 20, None]
    else:
        assert trainer["max_epochs"] == 20
        assert not {*length[1:]} & {*trainer}
