"""Whether a checkpoint can be resumed or read, and what to do where it cannot."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from lightning import LightningModule

from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import (
    check_same_identity,
    named_identity,
)
from llava_bidir.common.imports import imports_as_text
from llava_bidir.common.processes import decide_on_first
from llava_bidir.common.runs import RESUME_ADVICE

# Settings, with those of the encoder, that say which model a checkpoint is of
OF_MODEL = ("image_attention", "image_resize", "template")


def check_checkpoint(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Raise if a checkpoint is of another run than that of a module with a trainer.

    Args:
        module: :class:`.module.LlavaTraining`.
        checkpoint: Content of the checkpoint.

    Raises:
        UserError: Models, data, settings or the number of devices differ; without training, models and settings.
    """
    saved = checkpoint.get("identity")
    if not module.trainer.training:
        if saved is not None:
            check_same_model(module, saved["model"], checkpoint["hyper_parameters"])
        return
    if module.identity is not None:
        advice = how_to_train_on(Path(module.trainer.default_root_dir), module.hparams.trainable)
        check_same_identity(saved, module.identity, "the checkpoint", RESUME_ADVICE, advice)
    devices = checkpoint["progress"]["devices"]
    if devices != module.trainer.world_size:
        raise UserError(
            f"the checkpoint is of a run on {devices} devices, and this one has {module.trainer.world_size}: resume "
            "it on as many"
        )


def check_same_model(
    module: LightningModule,
    files: dict[str, str],
    settings: dict[str, Any],
) -> None:
    """Raise if a checkpoint that is scored is of other models, as far as both name them, or of other settings of these.

    Args:
        module: The model that is built.
        files: Checksums of the files of the checkpoint's models.
        settings: Those of its module.
    """
    now = decide_on_first(lambda: named_identity(module.models()))
    compared = [
        {
            "model": {key: models[key] for key in files.keys() & now.keys()},
            "settings": {f"model.{key}": options[key] for key in OF_MODEL}
            | {"model.encoder": options["encoder"] | {"path": ""}},
        }
        for models, options in ((files, settings), (now, module.hparams))
    ]
    check_same_identity(*compared, "the checkpoint", "give the options of the training")


def how_to_train_on(run: Path, trainable: Sequence[str]) -> dict[str, str]:
    """Return what to do where the length of a run differs, by setting.

    The learning rate follows a cosine that ends with the run: a longer one has other rates from its first step.

    Args:
        run: Folder of the run.
        trainable: Parts that it trains.
    """
    export = run / "hf"
    first = ""
    if not export.is_dir():
        export = run.with_name(f"{run.name}-export")  # RUN/hf is that of a finished run
        first = (
            f"`llava-bidir export {quote(str(run))} {quote(str(export))}{imports_as_text()}`, then "
        )
    parts = [part for part in ("adapter", "llm") if part in trainable]
    options = " ".join(f"--model.{part} {quote(str(export))}" for part in parts)
    advice = (
        "its learning rate ends with it, so it cannot be made longer or shorter. Resume it as it was, or train on from "
        f"its weights in a new run: {first}the same command with {options} --out NEW"
    )
    return dict.fromkeys(("trainer.max_steps", "trainer.max_epochs"), advice)
