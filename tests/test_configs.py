"""Every shipped YAML runs against the real classes: parsed, type-checked, instantiated."""

from importlib.util import find_spec
from pathlib import Path

import dataset_layouts
import pytest
import tiny_encoders
import tiny_models
import yaml
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from transformers import (
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_bidir.model.lora import Lora
from llava_bidir.training.cli import build_cli
from probes.fit.cli import build_cli as build_probes

CONFIGS = Path(__file__).parents[1] / "configs"
OTHER_ENCODERS = {  # config: kind in the table
    "aimv2": "aimv2_vision_model",
    "c_radio": "radio",
    "dinov2_registers": "dinov2_with_registers",
    "dinov3": "dinov3_vit",
    "metaclip_2": "metaclip_2",
    "mlcd": "mlcd_vision_model",
    "siglip2": "siglip_vision_model",  # which publishes it
    "tipsv2": "tipsv2",
}
TRAINING = {  # configs that go together: the kind of their encoder
    ("stage1.yaml", "encoder/clip.yaml"): "clip",
    ("stage2.yaml", "encoder/clip.yaml"): "clip",
    ("stage2.yaml", "encoder/dinov2.yaml"): "dinov2",
    ("stage2.yaml", "encoder/siglip.yaml"): "siglip",
    **{("stage2.yaml", f"encoder/{name}.yaml"): kind for name, kind in OTHER_ENCODERS.items()},
    ("demo/stage1.yaml",): "clip",
    ("demo/stage2.yaml",): "clip",
    ("real/stage1.yaml", "real/photos.yaml"): "dinov2",
    ("real/stage2.yaml", "real/photos.yaml"): "dinov2",
}
STAGE2 = ("stage2.yaml", "encoder/clip.yaml")
BUDGET = ["budget/lora_24gb.yaml", "budget/full_80gb.yaml"]  # behind stage 2 and an encoder
CLUSTER = [f"cluster/{name}.yaml" for name in ("ddp", "fsdp2", "zero2", "zero3", "zero3_offload")]
PROBING = {  # config: a dataset in its layout, and how many classes that has
    "probes/folder.yaml": (tiny_models.write_segmentation, 3),
    "probes/ade20k.yaml": (dataset_layouts.write_ade20k, 150),
    "probes/voc2012.yaml": (dataset_layouts.write_voc2012, 20),
    "probes/cityscapes.yaml": (dataset_layouts.write_cityscapes, 19),
    "probes/dinov2-linear.yaml": (dataset_layouts.write_ade20k, 150),
    "probes/dinov3-linear.yaml": (dataset_layouts.write_ade20k, 150),
    "demo/probes.yaml": (tiny_models.write_segmentation, 3),
}
UPON_PROBING = "probes/matched.yaml"


def test_every_yaml_is_covered_here():
    covered = {*BUDGET, *CLUSTER, *PROBING, UPON_PROBING}.union(*TRAINING)
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")} == covered


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
    for kind in OTHER_ENCODERS.values():
        tiny_encoders.STOCK[kind].write(root / kind)
    return root


@pytest.fixture
def instantiate(parts, conversations, encoders):
    """Return a function that builds model, data and trainer of configs, on tiny parts."""

    def build(files, kind: str = "clip"):
        if "zero" in str([(CONFIGS / x).read_text() for x in files]) and not find_spec("deepspeed"):
            pytest.skip("DeepSpeed (extra: cluster) is not installed")
        argv = [x for file in files for x in ("-c", str(CONFIGS / file))]
        records = str(conversations / "data.json")
        argv += f"--model.encoder.path {encoders / kind} --model.llm {parts[1]}".split()
        argv += f"--data.images {conversations} --data.annotations {records}".split()
        argv += "--trainer.accelerator cpu --trainer.precision 32-true".split()
        if "val_annotations" in (CONFIGS / files[0]).read_text():
            argv += ["--data.val_annotations", records]
        if "real/stage2.yaml" in files:  # tiny LLMs have no chat template
            argv += ["--data.template", "vicuna_v1"]
        return build_cli(argv, run=False)

    return build


@pytest.mark.parametrize("files", TRAINING)
def test_training_config_is_instantiated(files, instantiate):
    cli = instantiate(files, TRAINING[files])
    assert cli.datamodule.collate.processor is cli.model.processor
    assert cli.trainer.max_epochs == 1
    assert cli.model.hparams.compile == ("real/photos.yaml" in files)


@pytest.mark.parametrize("cluster", CLUSTER)
def test_cluster_config_is_instantiated_upon_a_recipe(cluster, instantiate):
    strategy = instantiate([*STAGE2, cluster]).trainer.strategy
    kinds = {"ddp": DDPStrategy, "fsdp2": ModelParallelStrategy}
    assert isinstance(strategy, kinds.get(Path(cluster).stem, DeepSpeedStrategy))
    if "zero" in cluster:
        zero = strategy.config["zero_optimization"]
        width = 4096  # what Hugging Face's Trainer makes of "auto"
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
def test_recipe_is_llava_1_5(stage, numbers, instantiate):
    """Source: LLaVA scripts/v1_5/pretrain.sh and finetune.sh; paper, App. A.1."""
    cli = instantiate([stage, "encoder/clip.yaml"])
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
def test_budget_accumulates_to_the_recipes_batch(budget, instantiate):
    cli = instantiate([*STAGE2, budget])
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


@pytest.mark.parametrize(
    ("file", "more"), [*((file, []) for file in PROBING), ("demo/probes.yaml", [UPON_PROBING])]
)
def test_probing_config_is_instantiated(file, more, checkpoints, encoders, tmp_path):
    write, classes = PROBING[file]
    model = checkpoints["causal"]
    if "image_px:" in (CONFIGS / file).read_text():  # a bare encoder's protocol
        model = encoders / "dinov2"
    argv = [x for name in [file, *more] for x in ("-c", str(CONFIGS / name))]
    argv += f"--model.mllm {model} --data.root {write(tmp_path)}".split()
    cli = build_probes([*argv, "--trainer.accelerator", "cpu"], run=False)
    assert cli.model.hparams.num_classes == classes
    assert bool(cli.model.hparams.untrained) == bool(more)
