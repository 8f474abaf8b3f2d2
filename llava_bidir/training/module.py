"""The two stages of LLaVA-1.5 as one LightningModule; a stage is a config.

Shapes: B batch, N sequence, n positions whose next token some sample of the batch is trained on, V vocabulary.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torchmetrics import MeanMetric

from llava_bidir.common.checkpoint_io import check_resume_compatible
from llava_bidir.common.errors import UserError
from llava_bidir.data.conversation import IGNORE_INDEX
from llava_bidir.model.build import build_model, build_processor, set_trainable
from llava_bidir.model.encoders import Encoder
from llava_bidir.model.lora import Lora, add_lora

from .optim import build_optimizer, build_schedule
from .resume import rescale_progress
from .throughput import MEASURED

log = logging.getLogger(__name__)

# Settings of the model that a run may go on with others of: they change no result, beyond rounding.
RESUME_OVERRIDABLE = ("attn_implementation", "compile", "gradient_checkpointing", "max_new_tokens")


class LlavaTraining(LightningModule):
    """Trains an adapter (stage 1), or adapter and LLM (stage 2), on conversations about images.

    Args:
        encoder: The vision tower; always frozen.
        llm: Directory or hub id of the language model.
        trainable: What trains: [adapter] in stage 1, [adapter, llm] in stage 2.
        image_attention: Mask among image tokens: causal, bidirectional (Eq. 2), prefix, or a registered one.
        image_resize: How images become squares: center_crop (LLaVA's stage 1) or pad (stage 2).
        adapter: Checkpoint directory whose adapter stage 2 starts from.
        adapter_gain: Factor on a new adapter's last weight, see LlavaBidirConfig.
        learning_rate: Peak learning rate.
        adapter_learning_rate: Another one for the adapter.
        betas, weight_decay: AdamW's.
        warmup_ratio: Share of the steps that the learning rate rises; then it falls as a cosine to zero.
        loss_average: Over what a step's loss is averaged: "llava", each micro-batch's tokens, then micro-batches and
            devices, as LLaVA ran; "tokens", all supervised tokens of the global batch, so that neither accumulation nor
            the number of devices changes it.
        lora: Low-rank updates of the LLM, which then train in its place.
        frozen_dtype: Of the weights that do not train. bfloat16 halves their memory; needs precision bf16-mixed, which
            computes with them in bfloat16 either way.
        compile: Compiles each layer of the LLM (torch.compile). Worth it on GPUs; the first steps take minutes.
        gradient_checkpointing: Recomputes LLM layers in the backward pass to save memory.
        attn_implementation: sdpa, eager or flex_attention; flash attention drops masks and is refused.
        max_new_tokens: Longest answer generated at validation.
    """

    def __init__(
        self,
        encoder: Encoder,
        llm: str,
        trainable: list[str],
        image_attention: str = "causal",
        image_resize: str = "pad",
        adapter: str | None = None,
        adapter_gain: float = 1.0,
        learning_rate: float = 2e-5,
        adapter_learning_rate: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.03,
        loss_average: Literal["llava", "tokens"] = "llava",
        lora: Lora | None = None,
        frozen_dtype: Literal["float32", "bfloat16"] = "float32",
        compile: bool = False,
        gradient_checkpointing: bool = False,
        attn_implementation: str = "sdpa",
        max_new_tokens: int = 32,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.strict_loading = False  # checkpoints hold what trains, see on_save_checkpoint
        # plain data in checkpoints, so that they load with weights_only
        self.encoder = encoder = Encoder(**encoder) if isinstance(encoder, dict) else encoder
        self.hparams["encoder"] = asdict(encoder)
        self.lora = Lora(**lora) if isinstance(lora, dict) else lora
        self.hparams["lora"] = self.lora and asdict(self.lora)
        if self.lora and "llm" not in trainable:
            raise UserError(f"model.lora stands for the LLM's weights, but model.trainable is {trainable}, without llm")
        self.processor = build_processor(encoder, llm, image_resize)
        rows, columns = encoder.grid(encoder.load_config())
        self.image_tokens = rows * columns
        self.model = None
        self.metrics_before: dict[str, float] = {}  # of the run that this one goes on with
        self.val_loss, self.val_accuracy = MeanMetric(), MeanMetric()

    def configure_model(self) -> None:
        if self.model is not None:
            return
        args = self.hparams
        self.model = build_model(
            self.encoder,
            args.llm,
            self.processor,
            image_attention=args.image_attention,
            image_resize=args.image_resize,
            adapter=args.adapter,
            adapter_gain=args.adapter_gain,
            attn_implementation=args.attn_implementation,
            dtype=torch.get_default_dtype(),  # which the strategy sets
        )
        if self.lora:
            add_lora(self.model, self.lora)
        for part, parameters in set_trainable(self.model, args.trainable).items():
            log.info("training %s: %s parameters", part, f"{parameters:,}")
        if args.frozen_dtype != "float32":
            self._cast_frozen(getattr(torch, args.frozen_dtype))
        if args.compile:
            for layer in self.model.model.language_model.layers:
                layer.compile(dynamic=True)
        if args.gradient_checkpointing:
            self.model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    def _cast_frozen(self, dtype: torch.dtype) -> None:
        precision = self.trainer.precision
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            raise UserError("model.frozen_dtype is for runs without ZeRO, which has all weights in bfloat16 already")
        if precision != "bf16-mixed":
            raise UserError(f"model.frozen_dtype bfloat16 needs trainer.precision bf16-mixed, got {precision}")
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    def on_fit_start(self) -> None:
        self.model.train()
        self.model.model.vision_tower.eval()

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Dropout depends on the position in the run and on nothing before it, so that a resumed run repeats it."""
        position = self.trainer.fit_loop.epoch_loop.total_batch_idx * self.trainer.world_size + self.global_rank
        torch.manual_seed(self.trainer.datamodule.seed * 1_000_003 + position)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        size = len(batch["ids"])
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log("train/supervised_tokens", float(batch["supervised"]), batch_size=size)
        return loss if self.hparams.loss_average == "llava" else loss * batch["weight"]

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean cross-entropy over the supervised tokens of a micro-batch, as LLaVA takes it; 0 if there is none."""
        with self._black_image(needed=batch["pixel_values"] is None):
            logits = self.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                pixel_values=batch["pixel_values"],
                logits_to_keep=batch["predicts"],
                use_cache=False,
            ).logits
        targets = batch["labels"][:, batch["predicts"] + 1]
        total = F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return total / max(batch["supervised"], 1)

    @contextmanager
    def _black_image(self, needed: bool) -> Iterator[None]:
        """Sends a black image through encoder and adapter where a batch has none, and adds zero times the outcome to
        the word embeddings. Otherwise this rank's adapter would have no gradients, and under ZeRO-3 this rank would
        gather other weights than its neighbours at the same time: they wait for each other for ever.
        Source: LLaVA train.py:735 and llava_arch.py:234."""

        def add(module, args, embedded: Tensor) -> Tensor:
            hook.remove()  # once: when generating, the steps after the first have no image on any rank
            size = self.processor.image_processor.crop_size
            black = torch.zeros(1, 3, size["height"], size["width"], device=embedded.device, dtype=self.model.dtype)
            features = self.model.get_image_features(black).pooler_output[0]
            return embedded + 0.0 * features.mean().to(embedded.dtype)

        if not needed:
            yield
            return
        hook = self.model.get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        """Loss on the answers, and the share of first questions answered word for word by greedy decoding."""
        self.val_loss.update(self.loss(batch), weight=batch["supervised"])
        answers = self.answer(batch["prompts"])[: len(batch["answers"])]  # without the sample that only fills up
        right = [float(a.strip() == b.strip()) for a, b in zip(answers, batch["answers"], strict=True)]
        self.val_accuracy.update(torch.tensor(right, device=self.device))
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.log("val/answer_accuracy", self.val_accuracy, prog_bar=True)
        return answers

    test_step = validation_step

    @torch.no_grad()
    def answer(self, prompts: dict[str, Tensor]) -> list[str]:
        """Greedy answers to left-padded prompts."""
        with self._black_image(needed="pixel_values" not in prompts):
            ids = self.model.generate(**prompts, do_sample=False, max_new_tokens=self.hparams.max_new_tokens)
        return self.processor.tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)

    def on_train_batch_end(self, outputs, batch: dict[str, Any], batch_idx: int) -> None:
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):  # which adds the gradients of all ranks up itself
            norm = self.trainer.model.get_global_grad_norm()
            if norm is not None:
                self.log("train/grad_norm", float(norm))

    def on_before_optimizer_step(self, optimizer) -> None:
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))

    def configure_optimizers(self) -> dict[str, Any]:
        args = self.hparams
        rates = {part: args.learning_rate for part in args.trainable}
        if args.adapter_learning_rate is not None:
            rates["adapter"] = args.adapter_learning_rate
        # Lightning clips no gradients that a fused optimizer might still have to unscale
        fused = not (self.trainer.gradient_clip_val and "mixed" in self.trainer.precision)
        optimizer = build_optimizer(self.model, rates, tuple(args.betas), args.weight_decay, fused)
        schedule = build_schedule(optimizer, self.optimizer_steps(), args.warmup_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_steps(self) -> int:
        """Steps of the whole run, from its config. `trainer.estimated_stepping_batches` would start the data loader
        before a checkpoint has told it where to resume."""
        epochs = 1 if self.trainer.max_epochs is None else self.trainer.max_epochs
        limits = (self.trainer.datamodule.steps_per_epoch * epochs, self.trainer.max_steps)  # negative: no limit
        if max(limits) < 0:
            raise UserError("trainer.max_epochs and trainer.max_steps are both unlimited; the schedule needs an end")
        return min(limit for limit in limits if limit >= 0)

    def facts(self) -> dict[str, Any]:
        """How the model is made, for its card: the stage, and every setting that has a value."""
        settings = {k: v for k, v in self.hparams.items() if v is not None and not k.startswith("_")}
        return {"stage": "+".join(self.hparams.trainable), **settings}

    def progress(self) -> dict[str, Any]:
        """How far the run is, and the newest value of each metric that the clock does not decide."""
        measured = {f"train/{name}" for name in MEASURED}
        return {
            "global_batch": self.trainer.datamodule.batch_size,
            "steps": self.trainer.global_step,
            "epochs": self.trainer.fit_loop.epoch_progress.current.processed,
            "devices": self.trainer.world_size,
            **self.metrics_before,
            **{k: float(v) for k, v in self.trainer.callback_metrics.items() if k not in measured},
        }

    @property
    def _samples_at_a_time(self) -> int:
        """Samples of a micro-batch over all devices."""
        return self.trainer.datamodule.micro_batch_size * self.trainer.world_size

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what trains; the frozen rest is where it was loaded from. And what the position in the epoch counts."""
        checkpoint["samples_at_a_time"] = self._samples_at_a_time
        checkpoint["progress"] = self.progress()
        checkpoint["data"] = self.trainer.datamodule.settings()
        trained = {"model." + name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """`strict_loading` is off for the frozen parts only: nothing that trains may be missing."""
        if self._trainer is not None and self.trainer.training:
            check_resume_compatible(checkpoint["hyper_parameters"], self.hparams, "model", RESUME_OVERRIDABLE)
            check_resume_compatible(checkpoint["data"], self.trainer.datamodule.settings(), "data")
            rescale_progress(checkpoint, checkpoint["samples_at_a_time"], self._samples_at_a_time)
            self.metrics_before = {k: v for k, v in checkpoint["progress"].items() if "/" in k}
        if "state_dict" not in checkpoint:
            return  # ZeRO's weights are elsewhere, and it checks them itself
        trained = {"model." + name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        missing = trained - set(checkpoint["state_dict"])
        if missing:
            raise UserError(
                f"the checkpoint lacks {len(missing)} of {len(trained)} tensors that model.trainable={self.hparams.trainable} "
                f"trains, {min(missing)} for one; it belongs to another stage or model"
            )
