"""Loggers other than TensorBoard have all that a run shows, and the run's files stay in its folder.

Weights & Biases and MLflow are not installed here; Lightning's classes for them record what they are told.
"""

from collections import defaultdict

import probe_runs
import pytest
import tiny_models
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

SAID = defaultdict(list)  # by kind: (name, content)


class Wandb(WandbLogger):
    name = "name"
    version = "version"
    save_dir = "elsewhere"
    experiment = None

    def __init__(self):
        self._logged_metrics = {}

    def log_hyperparams(self, params):
        SAID["settings"].append(("", params))

    def log_metrics(self, metrics, step=None):
        SAID["metrics"] += [(name, value) for name, value in metrics.items()]

    def log_image(
        self,
        key,
        images,
        step=None,
        **kwargs,
    ):
        SAID["images"].append((key, images))

    def log_text(
        self,
        key,
        columns=None,
        data=None,
        dataframe=None,
        step=None,
    ):
        SAID["text"].append((key, str([columns, *data])))

    def after_save_checkpoint(self, checkpoint_callback):
        pass

    def finalize(self, status):
        pass


class Client:
    """The part of `mlflow.MlflowClient` that is used; with its signatures."""

    def log_image(
        self,
        run_id,
        image,
        artifact_file=None,
        *,
        key=None,
        step=None,
        timestamp=None,
        synchronous=None,
    ):
        SAID["images"].append((key.rpartition("/")[0], [image]))

    def log_text(self, run_id, text, artifact_file):
        SAID["text"].append((artifact_file.rpartition("/")[0], text))


class MLFlow(MLFlowLogger):
    name = "name"
    version = "version"
    save_dir = "elsewhere"
    run_id = "1"
    experiment = Client()

    def __init__(self):
        pass

    log_hyperparams = Wandb.log_hyperparams
    log_metrics = Wandb.log_metrics
    after_save_checkpoint = Wandb.after_save_checkpoint
    finalize = Wandb.finalize


@pytest.fixture(params=["Wandb", "MLFlow"])
def logger(request):
    SAID.clear()
    return ["--trainer.logger", f"{__name__}.{request.param}", "--trainer.log_every_n_steps", "1"]


def names(kind: str) -> set[str]:
    return {name for name, _ in SAID[kind]}


def test_training(
    logger,
    parts,
    conversations,
    tmp_path,
    monkeypatch,
):
    tiny_models.fit(parts, conversations, tmp_path / "run", *logger)
    assert {"train/loss", "val/loss", "val/answer_accuracy"} <= names("metrics")
    assert SAID["settings"]
    shown = {f"validation/images/{i}" for i in range(3)}
    assert names("images") == {*shown, "validation/attention_mask"}
    assert all(
        image.ndim == 3 and image.dtype == "uint8"
        for _, images in SAID["images"]
        for image in images
    )
    assert names("text") == {"validation/answers"}
    assert "expected" in SAID["text"][0][1]
    (masks,) = {images[0].shape for name, images in SAID["images"] if "mask" in name}
    assert masks[0] == masks[1] > tiny_models.TOKENS
    assert (tmp_path / "run/config.yaml").is_file()
    assert list((tmp_path / "run/checkpoints").glob("*.ckpt"))


def test_probes(
    logger,
    checkpoints,
    segmentation,
    tmp_path,
):
    more = ["--data.batch_size", "2", *logger]
    run = probe_runs.fit(checkpoints["causal"], segmentation, tmp_path / "run", *more)
    sites = set(run.sites)
    assert {f"miou/{site}" for site in sites} <= names("metrics")
    assert SAID["settings"]
    assert (tmp_path / "run/config.yaml").is_file()
    assert list((tmp_path / "run/checkpoints").glob("*.ckpt"))
