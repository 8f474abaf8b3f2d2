"""LightningModule for both training stages of LLaVA-1.5; the config selects the stage."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric
from transformers import LlavaConfig

from llava_bidir.common.cli import Count, NonNegative, Share, ShareBelow1
from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.hf import (
    FIXED_DATE,
    PROMPT_DATE,
    FiniteLogits,
    max_positions,
    read_model_config,
    read_training,
)
from llava_bidir.common.identity import Identity, check_same_identity, named_identity, run_identity
from llava_bidir.common.processes import decide_on_first, rank_zero_info
from llava_bidir.common.runs import RESUME_ADVICE, optimizer_steps
from llava_bidir.data.collate import Batch
from llava_bidir.data.conversation import PLAIN
from llava_bidir.model.attention import block_ids_of
from llava_bidir.model.build import (
    MODEL_PARTS,
    build_model,
    build_processor,
    check_same_parents,
    read_llm_config,
)
from llava_bidir.model.encoders import Encoder
from llava_bidir.model.lora import Lora, add_lora
from llava_bidir.model.trainable import count_read, set_train_mode, set_trainable

from .flops import ModelFlops, count_flops
from .loss import supervised_loss
from .optim import build_optimizer, build_schedule
from .seen_to_train import SeenToTrain
from .throughput import TIMING_METRICS

RATE = "lr-AdamW/"  # learning rates in the logger, by parameter group
SHOWN = 3  # validation samples of the first process in the event file
# Settings, with those of the encoder, that say which model a checkpoint is of
OF_MODEL = ("image_attention", "image_resize", "template")

Settings = TypeVar("Settings")


class TrainedMicroBatch(NamedTuple):
    """What a step keeps of a micro-batch: its loss, the number of supervised tokens, and the ids of its records."""

    loss: Tensor
    supervised: int
    records: list[str]


class LlavaTraining(LightningModule):
    """Training of an adapter (stage 1), or of adapter, LLM and encoder (stage 2), on conversations about images.

    Args:
        encoder: The vision tower.
        llm: Directory or hub id of the language model.
        trainable: Parts to train: [adapter] in stage 1, [adapter, llm] or [encoder, adapter, llm] in stage 2.
        encoder_blocks: Number of the encoder's blocks that train, the last that are read; by default all of these.
        image_attention: Mask among image tokens: causal, bidirectional (Eq. 2), prefix, or a registered one.
        image_resize: How images become squares: center_crop (LLaVA's stage 1) or pad (stage 2).
        adapter: Checkpoint directory whose adapter stage 2 starts from.
        adapter_init_scale: Factor on the last weight of a new adapter; 1 is LLaVA's initialisation.
        learning_rate: Peak learning rate.
        adapter_learning_rate: Peak learning rate of the adapter, if it differs.
        encoder_learning_rate: Peak learning rate of the encoder, by default a fifth of `learning_rate`.
        betas, weight_decay: Of AdamW. Biases and norms do not decay, nor the encoder's CLS, registers and positions.
        warmup_ratio: Share of the steps in which the learning rate rises; a cosine to zero follows.
        loss_average: "llava": over the tokens of each micro-batch, then over micro-batches and devices, as in LLaVA.
            "tokens": over all supervised tokens of the global batch, however it is accumulated and divided.
        lora: Low-rank updates of the LLM, which train instead of its weights.
        frozen_dtype: Dtype of frozen weights. bfloat16 halves their memory and needs precision bf16-mixed, which
            computes in bfloat16 either way.
        gradient_checkpointing: Recompute the layers of LLM and encoder in the backward pass to save memory.
        compile: Compile the LLM's layers with torch.compile. The first steps take minutes; validation is not compiled.
        attn_implementation: sdpa, eager or flex_attention; flash attention ignores masks and is rejected.
        max_new_tokens: Maximum length in tokens of an answer in validation.
        template: Template of the conversations and of the exported model's prompts; linked from the data.
    """

    def __init__(
        self,
        encoder: Encoder,
        llm: str,
        trainable: list[Literal["encoder", "adapter", "llm"]],
        image_attention: str = "causal",
        image_resize: Literal["pad", "center_crop"] = "pad",
        adapter: str | None = None,
        adapter_init_scale: NonNegative = 1.0,
        learning_rate: NonNegative = 2e-5,
        adapter_learning_rate: NonNegative | None = None,
        encoder_blocks: Count | None = None,
        encoder_learning_rate: NonNegative | None = None,
        betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.999),
        weight_decay: NonNegative = 0.0,
        warmup_ratio: Share = 0.03,
        loss_average: Literal["llava", "tokens"] = "llava",
        lora: Lora | None = None,
        frozen_dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        attn_implementation: str = "sdpa",
        max_new_tokens: Count = 32,
        template: str = "vicuna_v1",
    ):
        super().__init__()
        self.save_hyperparameters()
        # checkpoints hold trainable weights only, see on_save_checkpoint
        self.strict_loading = False
        self.encoder = _from_plain(Encoder, encoder)
        self.lora = _from_plain(Lora, lora)
        self._record_settings()
        self._check_settings()
        self.processor = build_processor(
            self.encoder, llm=llm, image_resize=image_resize, template=template
        )
        self.image_tokens = self.encoder.image_tokens(self.encoder.load_config())
        self.max_positions = max_positions(read_llm_config(llm))
        self.model = None
        self.metrics_before: dict[str, float] = {}  # of the checkpoint that is resumed
        self.step: list[TrainedMicroBatch] = []
        self.val_loss = MeanMetric()
        self.val_accuracy = MeanMetric()

    def _record_settings(self) -> None:
        """Record settings as plain data, so that checkpoints load with weights_only."""
        encoder = asdict(self.encoder)
        if not self.encoder.norm:  # as runs have it that began before there was one
            del encoder["norm"]
        self.hparams["encoder"] = encoder
        if self.lora:
            self.hparams["lora"] = asdict(self.lora)
        if self.hparams.adapter is not None:  # for the control that re-initialises the adapter
            stage1 = read_training(Path(self.hparams.adapter))
            self.hparams["adapter_init_scale"] = stage1.get("adapter_init_scale", 1.0)

    def _check_settings(self) -> None:
        """Raise a UserError if nothing is trained, or LoRA has nothing to train, or the mask is unknown."""
        trainable = self.hparams.trainable
        if not trainable:
            raise UserError("model.trainable is empty; expected adapter, llm or both")
        if self.lora and "llm" not in trainable:
            raise UserError(f"model.lora needs llm in model.trainable, got {trainable}")
        self._check_trained_encoder()
        with error_context("model.image_attention"):
            self.registered = [block_ids_of(self.hparams.image_attention)]

    def _check_trained_encoder(self) -> None:
        """Raise a UserError if the encoder trains in stage 1, or what is said of its training does not apply."""
        args = self.hparams
        if "encoder" not in args.trainable:
            for name in ("encoder_blocks", "encoder_learning_rate"):
                if args[name] is not None:
                    raise UserError(f"model.{name} needs encoder in model.trainable")
            return
        if "llm" not in args.trainable or args.template == PLAIN:
            raise UserError(
                "model.trainable: the encoder trains in stage 2, with the LLM on dialogues. In stage 1 the adapter is "
                "random at first, and its gradients would undo what the encoder knows; take encoder out of the list"
            )
        read = count_read(self.encoder.layer, self.encoder.load_config().num_hidden_layers)
        if args.encoder_blocks is not None and args.encoder_blocks > read:
            raise UserError(
                f"model.encoder_blocks {args.encoder_blocks}: expected at most {read}, the blocks before "
                f"model.encoder.layer {self.encoder.layer}"
            )

    def configure_callbacks(self) -> list[SeenToTrain]:
        """Return what sees that each part trains."""
        return [SeenToTrain()]

    def models(self) -> dict[str, str]:
        """Return the paths of the models that the run is made from, by setting."""
        models = {"encoder": self.encoder.path, "llm": self.hparams.llm}
        if self.hparams.adapter:
            models["adapter"] = self.hparams.adapter
        return models

    def setup(self, stage: str) -> None:
        """Tell the data the settings that batches depend on, and compute the identity of a training."""
        data = self.trainer.datamodule
        data.follow_model(
            image_attention=self.hparams.image_attention, loss_average=self.hparams.loss_average
        )
        if stage != "fit":
            return
        self.identity = decide_on_first(run_identity, self.trainer, self, data)
        llm = self.hparams.llm
        if isinstance(read_model_config("model.llm", llm), LlavaConfig):
            rank_zero_info(
                f"model.llm: {llm} is a llava, whose LLM is taken; its encoder and adapter are not, see "
                "--model.encoder.path and --model.adapter"
            )
        if self.hparams.adapter is not None:
            check_same_parents(
                adapter=Path(self.hparams.adapter),
                encoder=Path(self.encoder.path),
                llm=Path(llm),
                identity=self.identity,
            )

    def configure_model(self) -> None:
        """Build the model once, inside the strategy's context."""
        if self.model is None:
            self.build()

    def build(self, with_weights: bool = True) -> None:
        """Build the model; without weights, of configs alone, as an estimate of its costs needs it."""
        args = self.hparams
        self.model = build_model(
            self.encoder,
            args.llm,
            self.processor,
            image_attention=args.image_attention,
            image_resize=args.image_resize,
            adapter=args.adapter if with_weights else None,
            attn_implementation=args.attn_implementation,
            dtypes=self._dtypes(),
            with_weights=with_weights,
        )
        if args.adapter is None:
            adapter = self.model.model.multi_modal_projector
            adapter.linear_2.weight.data *= args.adapter_init_scale
        if self.lora:
            add_lora(self.model, self.lora)
        set_trainable(self.model, args.trainable, args.encoder_blocks)
        if args.gradient_checkpointing:
            recomputed = [self.model.model.language_model]
            if "encoder" in args.trainable:
                recomputed.append(self.model.model.vision_tower)
            for part in recomputed:
                part.activation_checkpointing_enable({"use_reentrant": False})
        if args.compile:
            for layer in self.model.model.language_model.layers:
                layer.compile(dynamic=True)  # for batches of all lengths at once

    def _dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype of each part: torch's default, which the strategy sets, or that of frozen weights."""
        default = torch.get_default_dtype()  # under ZeRO, it is bfloat16
        dtypes = dict.fromkeys(MODEL_PARTS, default)
        if self.hparams.frozen_dtype == "bfloat16":
            frozen = {*MODEL_PARTS} - {*self.hparams.trainable}
            if self.lora:
                frozen.add("llm")
            dtypes |= dict.fromkeys(frozen, torch.bfloat16)
        return dtypes

    def on_fit_start(self) -> None:
        """Set train mode, except where the encoder is frozen."""
        set_train_mode(self.model)

    def on_validation_start(self) -> None:
        """Run compiled layers as they are: each prompt and each new token would be compiled anew."""
        if self.hparams.compile:  # else torch's compiler need not be imported, which takes a second
            torch.compiler.set_stance("force_eager")

    def on_validation_end(self) -> None:
        """Undo :meth:`on_validation_start`."""
        if self.hparams.compile:
            torch.compiler.set_stance("default")

    def on_train_batch_start(self, *args: Any) -> None:
        """Seed dropout from the position in the run, so that a resumed run repeats it."""
        micro_batch = self.trainer.fit_loop.epoch_loop.total_batch_idx
        position = micro_batch * self.trainer.world_size + self.global_rank
        torch.manual_seed(self.trainer.datamodule.seed * 1_000_003 + position)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch, weighted for `loss_average`."""
        loss = self.loss(batch)
        if self.hparams.loss_average == "tokens":
            loss = loss * batch["weight"]
        micro_batch = TrainedMicroBatch(
            loss=loss.detach(), supervised=batch["supervised"], records=batch["ids"]
        )
        self.step.append(micro_batch)
        return loss

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over the supervised tokens of a micro-batch, 0 if there are none."""
        return supervised_loss(self.model, batch)

    def count_flops(self, image: Tensor) -> ModelFlops:
        """Return the operations of a training step, which need a forward pass of encoder and adapter."""
        return count_flops(self.model, image)

    def validation_step(self, batch: Batch, batch_idx: int) -> list[str]:
        """Log the loss of the answers, and the share of first questions answered exactly by greedy decoding.

        Captions (stage 1) have no right wording: only those that are shown are written.
        """
        self.val_loss.update(self.loss(batch), weight=batch["supervised"])
        self.log("val/loss", self.val_loss, prog_bar=True)
        are_captions = self.hparams.template == PLAIN
        shown = batch_idx * self.trainer.datamodule.micro_batch_size < SHOWN
        if are_captions and not shown:  # on each rank: they run each forward together
            return []
        # the last sample may be padding for this rank
        answers = self.answer(batch["prompts"])[: len(batch["answers"])]
        if are_captions:
            return answers
        correct = []
        for answer, expected in zip(answers, batch["answers"], strict=True):
            correct.append(float(answer.strip() == expected.strip()))
        self.val_accuracy.update(torch.tensor(correct, device=self.device))
        self.log("val/answer_accuracy", self.val_accuracy, prog_bar=True)
        return answers

    test_step = validation_step

    @torch.no_grad()
    def answer(self, prompts: dict[str, Tensor]) -> list[str]:
        """Return greedy answers to left-padded prompts."""
        if not (prompts["input_ids"] == self.processor.image_token_id).any():
            # a black image: generate() of the other ranks encodes images before it does anything else
            prompts = dict(prompts)
            self.model.get_image_features(prompts.pop("pixel_values"))
        ids = self.model.generate(
            **prompts,
            do_sample=False,
            max_new_tokens=self.hparams.max_new_tokens,
            logits_processor=[FiniteLogits()],
        )
        prompt_length = prompts["input_ids"].shape[1]
        return self.processor.tokenizer.batch_decode(
            ids[:, prompt_length:], skip_special_tokens=True
        )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Log the gradient norm under ZeRO, where DeepSpeed sums the gradients of all ranks in its own step."""
        super().optimizer_step(*args, **kwargs)
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            norm = self.trainer.model.get_global_grad_norm()
            if norm is not None:
                self.log("train/grad_norm", float(norm))

    def on_before_optimizer_step(self, optimizer) -> None:
        """Log what the step minimises, the mean over its micro-batches and devices, its tokens, and the gradient norm.

        The host waits for the device here only, once per step. Under ZeRO, which accumulates gradients itself,
        Lightning calls this after each micro-batch, and :meth:`optimizer_step` logs the norm.

        Raises:
            UserError: A loss is not finite, on any rank; it has not reached the weights.
        """
        if self.trainer.fit_loop._should_accumulate():
            return
        losses = torch.stack([micro_batch.loss for micro_batch in self.step])
        self._check_finite(losses)
        supervised = float(sum(micro_batch.supervised for micro_batch in self.step))
        self.step.clear()
        tokens = torch.tensor(supervised, device=self.device)
        self.log("train/loss", losses.mean(), prog_bar=True, sync_dist=True)
        self.log("train/supervised_tokens", tokens, sync_dist=True, reduce_fx="sum")
        for group in optimizer.param_groups:
            self.log(f"{RATE}{group['name']}", group["lr"])
        if not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self.log("train/grad_norm", self._gradient_norm())

    def _check_finite(self, losses: Tensor) -> None:
        """Raise a UserError if a loss of the step's micro-batches, f[micro-batches], is not finite on any rank."""
        finite = losses.isfinite().tolist()
        if self.trainer.strategy.reduce_boolean_decision(all(finite), all=True):
            return
        samples = "of another rank"
        if not all(finite):
            samples = ", ".join(self.step[finite.index(False)].records)
        raise UserError(f"loss is not finite at step {self.trainer.global_step}: samples {samples}")

    def _gradient_norm(self) -> Tensor:
        """Return the norm of all gradients together, also where they are sharded."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return norm

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW and its schedule per step."""
        args = self.hparams
        # Lightning does not clip gradients for a fused optimizer in mixed precision
        fused = not (self.trainer.gradient_clip_val and "mixed" in self.trainer.precision)
        optimizer = build_optimizer(
            self.model,
            learning_rates=self.learning_rates(),
            betas=tuple(args.betas),
            weight_decay=args.weight_decay,
            fused=fused,
        )
        schedule = build_schedule(optimizer, optimizer_steps(self.trainer), args.warmup_ratio)
        per_step = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": per_step}

    def learning_rates(self) -> dict[str, float]:
        """Return the peak learning rate of each part that trains.

        Source of the encoder's fifth: LLaVA-NeXT scripts/train/finetune_ov.sh.
        """
        args = self.hparams
        rates = dict.fromkeys(args.trainable, args.learning_rate)
        if "encoder" in rates:
            rates["encoder"] /= 5
        for part, rate in (
            ("adapter", args.adapter_learning_rate),
            ("encoder", args.encoder_learning_rate),
        ):
            if rate is not None:
                rates[part] = rate
        return rates

    def settings(self) -> dict[str, Any]:
        """Return the stage and all settings that have a value, for training.json and the model card."""
        settings = {k: v for k, v in self.hparams.items() if v is not None and k[0] != "_"}
        if FIXED_DATE in (self.processor.chat_template or ""):
            settings["prompt_date"] = str(PROMPT_DATE)
        return {"stage": "+".join(self.hparams.trainable), **settings}

    def trainable_names(self) -> set[str]:
        """Return the names of trainable parameters in a checkpoint."""
        return {name for name, weight in self.named_parameters() if weight.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save identity, position and latest metrics, and trainable weights only; frozen ones are in their source."""
        metrics = {}
        for name, value in self.trainer.callback_metrics.items():
            is_timing = name.removeprefix("train/") in TIMING_METRICS
            if not name.startswith(RATE) and not is_timing:
                metrics[name] = float(value)
        checkpoint["identity"] = self.identity
        checkpoint["folder"] = str(Path.cwd())  # where relative paths of the settings begin
        checkpoint["progress"] = {
            "global_batch": self.trainer.datamodule.batch_size,
            "steps": self.trainer.global_step,
            "epochs": self.trainer.fit_loop.epoch_progress.current.processed,
            "devices": self.trainer.world_size,
            **self.metrics_before,
            **metrics,
        }
        trained = self.trainable_names()
        weights = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {name: tensor for name, tensor in weights if name in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check settings and trainable weights, since `strict_loading` is off for the frozen weights.

        Raises:
            UserError: Models, data, settings or the number of devices differ; without training, models and settings.
        """
        if self._trainer is not None:
            self._check_same_run(checkpoint)
            self.metrics_before = {k: v for k, v in checkpoint["progress"].items() if "/" in k}
        if "state_dict" not in checkpoint:
            return  # ZeRO has loaded the weights itself
        trained = self.trainable_names()
        missing = trained - checkpoint["state_dict"].keys()
        if missing:
            raise UserError(
                f"the checkpoint lacks {len(missing)} of {len(trained)} trained tensors, e.g. {min(missing)}; it "
                "belongs to another stage or model"
            )

    def _check_same_run(self, checkpoint: dict[str, Any]) -> None:
        """Raise if a checkpoint that is resumed is of another run, or one that is scored of another model."""
        saved = checkpoint["identity"]
        if not self.trainer.training:
            self._check_same_model(saved["model"], checkpoint["hyper_parameters"])
            return
        check_same_identity(
            saved, current=self.identity, source="the checkpoint", advice=RESUME_ADVICE
        )
        devices = checkpoint["progress"]["devices"]
        if devices != self.trainer.world_size:
            raise UserError(
                f"the checkpoint is of a run on {devices} devices, and this one has {self.trainer.world_size}: resume "
                "it on as many"
            )

    def _check_same_model(self, files: dict[str, str], settings: dict[str, Any]) -> None:
        """Raise if a checkpoint that is scored is of other models, as far as both name them, or of other settings."""
        current = decide_on_first(named_identity, self.models())
        in_both = files.keys() & current.keys()
        check_same_identity(
            saved=_identity_of_model({key: files[key] for key in in_both}, settings),
            current=_identity_of_model({key: current[key] for key in in_both}, self.hparams),
            source="the checkpoint",
            advice="give the options of the training",
        )


def _from_plain(kind: type[Settings], value: Settings | dict[str, Any]) -> Settings:
    """Return a dataclass of settings, which a checkpoint has as a dict."""
    if isinstance(value, dict):
        return kind(**value)
    return value


def _identity_of_model(files: dict[str, str], settings: Mapping[str, Any]) -> Identity:
    """Return the files of a model, and the settings that say which it is; the encoder's path is none."""
    compared = {f"model.{key}": settings[key] for key in OF_MODEL}
    compared["model.encoder"] = settings["encoder"] | {"path": ""}
    return {"model": files, "settings": compared}
