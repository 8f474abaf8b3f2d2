"""The trainings that are compared: flags of both programs, and how far apart the results may be."""

from dataclasses import dataclass
from pathlib import Path

from world import MAX_LENGTH

MICRO_BATCH = 4
ACCUMULATED = 2  # 1,600 records: 200 steps

# What LLaVA's scripts/v1_5/pretrain.sh and finetune.sh set, for both stages.
RECIPE = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "num_train_epochs": 1,
    "per_device_train_batch_size": MICRO_BATCH,
    "gradient_accumulation_steps": ACCUMULATED,
    "save_strategy": "no",
    "weight_decay": 0.0,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "model_max_length": MAX_LENGTH,
    "logging_steps": 50,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "max_grad_norm": 0,  # as under DeepSpeed with zero2.json, which does not clip
}
STAGES = {
    1: {"version": "plain", "tune_mm_mlp_adapter": True, "learning_rate": 1e-3},
    2: {
        "version": "v1",
        "image_aspect_ratio": "pad",
        "group_by_modality_length": True,
        "learning_rate": 1e-3,  # 2e-5 would not move a model of this width in 200 steps
    },
}
PRECISIONS = {"float64": "64-true", "float32": "32-true", "bf16": "bf16-mixed"}


def as_flags(settings: dict) -> list[str]:
    """Return settings as words of a command."""
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


@dataclass(frozen=True)
class Case:
    """One training of each program.

    Args:
        name: Of its folder and its row.
        stage: 1 or 2.
        precision: "float64", "float32" or "bf16".
        loss: Largest difference of the loss of a step, in nats; of steps at which LLaVA's own rounding is not larger.
        weights: Largest difference of the final weights, to the largest update.
        grad_norm: Largest relative difference of the norm of a step's gradient.
        theirs, ours: More flags.
        llm, records: Folder and file in the world, by default the stage's.
        own_order: Whether ours draws its own order, from the same random numbers.
        theirs_of, ours_of: Name of a case with the training of LLaVA, or of ours, that this one compares.
        rounding_of: Name of a case with LLaVA's training in our precision, where its own is another.
        why: Row of the table of deviations that makes them differ.
    """

    name: str
    stage: int
    precision: str
    loss: float | None = None
    weights: float | None = None
    grad_norm: float | None = None
    theirs: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()
    llm: str = "vicuna"
    records: str | None = None
    own_order: bool = False
    theirs_of: str | None = None
    ours_of: str | None = None
    rounding_of: str | None = None
    why: str = ""

    @property
    def folder(self) -> str:
        """Name of the folder of its trainings."""
        return self.name.replace(", ", "_").replace(" ", "_").replace("'", "")

    def exceeded(self, result: dict) -> list[str]:
        """Return what differs more than it may, of the result of :func:`compare.compare`."""
        if self.why:
            return []
        found = [
            f"{n} batches differ in {key}" for key, n in result["different_batches"].items() if n
        ]
        if result["frozen_weights_changed"] or result["groups_differ"]:
            found.append("frozen weights or settings of AdamW differ")
        weights = max(result["weights"].values(), default=0.0)  # none if it stopped early
        for key, value, most in (
            ("loss", result["loss_beyond_rounding"], self.loss),
            ("weights", weights, self.weights),
            ("learning rate", result["lr"], 1e-12),
            ("gradient norm", result["grad_norm"], self.grad_norm),
        ):
            if most is not None and not value <= most:
                found.append(f"{key} differs by {value:.3g}, may by {most:.3g}")
        return found

    def records_file(self, world: Path) -> Path:
        """Return LLaVA's JSON."""
        return world / (self.records or f"stage{self.stage}.json")

    def their_flags(self, world: Path, adapter: Path, out: Path) -> list[str]:
        """Return the flags of LLaVA's train()."""
        settings = RECIPE | STAGES[self.stage]
        settings |= {
            "model_name_or_path": world / self.llm,
            "vision_tower": world / "encoder",
            "data_path": self.records_file(world),
            "image_folder": world,
            "pretrain_mm_mlp_adapter": adapter / "mm_projector.bin",
            "output_dir": out / "run",
            "bf16": self.precision == "bf16",
            "gradient_checkpointing": self.precision != "float64",  # see record.FloatIsDouble
        }
        return [*as_flags(settings), *self.theirs]

    def our_flags(self, world: Path, adapter: Path) -> list[str]:
        """Return the flags of `llava-bidir fit`, over the stage's config."""
        settings = {
            "model.encoder.name": "clip",
            "model.encoder.path": world / "encoder",
            "model.llm": world / self.llm,
            "model.adapter": adapter / "hf",
            "model.learning_rate": STAGES[self.stage]["learning_rate"],
            "model.gradient_checkpointing": str(self.precision != "float64").lower(),
            "data.annotations": self.records_file(world),
            "data.images": world,
            "data.batch_size": MICRO_BATCH * ACCUMULATED,
            "data.micro_batch_size": MICRO_BATCH,
            "data.max_length": MAX_LENGTH,
            "data.num_workers": 0,
            "trainer.accelerator": "cpu",
            "trainer.devices": 1,
            "trainer.precision": PRECISIONS[self.precision],
        }
        order = ["--own-order"] if self.own_order else []
        return [*order, "-c", f"stage{self.stage}", *as_flags(settings), *self.ours]


EXACT = {"loss": 1e-9, "weights": 1e-9, "grad_norm": 1e-9}
SINGLE = {"loss": 1e-5, "weights": 1e-4, "grad_norm": 1e-4}
MIXED = {
    stage: {
        "loss": 1e-2,
        "theirs_of": f"stage {stage}, float64",
        "ours_of": f"stage {stage}, bf16",
        "rounding_of": f"stage {stage}, bf16",
    }
    for stage in STAGES
}
MASTER = "weights without ZeRO"
DECAY = {
    "theirs": ("--weight_decay", "0.1", "--mm_projector_lr", "3e-4"),
    "ours": ("--model.weight_decay", "0.1", "--model.adapter_learning_rate", "3e-4"),
}
CASES = [
    Case("stage 1, float64", 1, "float64", **EXACT),
    Case("stage 1, float32", 1, "float32", **SINGLE),
    Case("stage 1, ours bf16-mixed, LLaVA float64", 1, "bf16", **MIXED[1]),
    Case("stage 2, float64", 2, "float64", **EXACT),
    Case("stage 2, float32", 2, "float32", **SINGLE),
    Case("stage 2, ours bf16-mixed, LLaVA float64", 2, "bf16", **MIXED[2]),
    Case("stage 2, weight decay, adapter's own rate", 2, "float64", **EXACT, **DECAY),
    Case("stage 1, bf16", 1, "bf16", why=MASTER),
    Case("stage 2, bf16", 2, "bf16", why=MASTER),
    Case(
        "own order",
        2,
        "float64",
        own_order=True,
        theirs_of="stage 2, float64",
        why="order of stage 2",
    ),
    Case("vocabulary without spare rows", 2, "float64", llm="vicuna_full", why="vocabulary"),
    Case(
        "records that LLaVA loses",
        2,
        "float64",
        records="stage2_broken.json",
        why="records whose tokens LLaVA miscounts",
    ),
]
BY_NAME = {case.name: case for case in CASES}
