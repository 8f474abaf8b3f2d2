"""LLaVA-NeXT's own choice of what trains, model, and optimizer, from a clone of LLaVA-VL/LLaVA-NeXT at COMMIT.

Its files import packages of their time (trl, decord, open_clip). The definitions below are taken out of them as they
stand, and executed with the installed transformers; what they call besides is `NAMES`.
"""

import ast
import re
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM, Trainer
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.trainer_pt_utils import get_parameter_names

COMMIT = "df179663ae8b83207df100a1f7af24caec633ff9"
IMAGE = -200
NAMES = {
    "torch": torch,
    "nn": nn,
    "ABC": ABC,
    "abstractmethod": abstractmethod,
    "re": re,
    "CLIPVisionConfig": CLIPVisionConfig,
    "CLIPVisionModel": CLIPVisionModel,
    "IGNORE_INDEX": -100,
    "IMAGE_TOKEN_INDEX": IMAGE,
    "Trainer": Trainer,
    "get_parameter_names": get_parameter_names,
    # transformers 4 appends the norm of Llama
    "ALL_LAYERNORM_LAYERS": [nn.LayerNorm, LlamaRMSNorm],
    "is_sagemaker_mp_enabled": lambda: False,
    "rank0_print": lambda *args: None,
}
TUNABLE_PARTS = "mm_vision_tower,mm_mlp_adapter,mm_language_model"


class Clone:
    """Files of LLaVA-NeXT at COMMIT, whatever is checked out."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, path: str) -> str:
        command = ["git", "-C", self.folder, "show", f"{COMMIT}:{path}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def find(self, path: str, name: str):
        """Return a function or class that a file defines at any depth."""
        nodes = ast.walk(ast.parse(self.read(path)))
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = next(node for node in nodes if isinstance(node, kinds) and node.name == name)
        names = dict(NAMES)
        exec(ast.unparse(node), names)
        return names[name]

    def choose_what_trains(self) -> Callable[[dict], None]:
        """Return the part of train() that freezes and unfreezes what --mm_tunable_parts says."""
        tree = ast.parse(self.read("llava/train/train.py"))
        (node,) = (
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.If)
            and ast.unparse(node.test) == "model_args.mm_tunable_parts is None"
        )
        return lambda names: exec(ast.unparse(node), NAMES | names)


class LlavaNext:
    """Its model with given weights, and the optimizer of its trainer.

    Args:
        clone: Files.
        ours: Our model, of a CLIP and a Llama, whose weights it begins with.
        encoder: Folder of the CLIP.
        arguments: Of transformers' Trainer, with mm_projector_lr and mm_vision_tower_lr.
    """

    def __init__(self, clone: Clone, ours: nn.Module, encoder: str, arguments: SimpleNamespace):
        meta = clone.find("llava/model/llava_arch.py", "LlavaMetaForCausalLM")
        tower_class = clone.find(
            "llava/model/multimodal_encoder/clip_encoder.py", "CLIPVisionTower"
        )
        build_projector = clone.find(
            "llava/model/multimodal_projector/builder.py", "build_vision_projector"
        )

        class Model(LlamaForCausalLM, meta):  # as LlavaLlamaForCausalLM
            def get_model(self):
                return self.model

        config = ours.config
        model = Model._from_config(config.text_config, attn_implementation="sdpa")
        layer = config.vision_feature_layer
        tower = tower_class(encoder, SimpleNamespace(mm_vision_select_layer=layer), delay_load=True)
        tower.vision_tower = CLIPVisionModel(config.vision_config)
        widths = {
            "mm_hidden_size": config.vision_config.hidden_size,
            "hidden_size": config.text_config.hidden_size,
        }
        inner = model.get_model()
        inner.vision_tower = tower
        inner.mm_projector = build_projector(
            SimpleNamespace(mm_projector_type="mlp2x_gelu", **widths)
        )
        inner.vision_resampler = nn.Identity()
        inner.get_vision_tower = lambda: tower
        weights = dict(ours.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[our_name(name)])
        self.model = model.double().train()
        parts = SimpleNamespace(mm_tunable_parts=TUNABLE_PARTS)
        settings = SimpleNamespace(lora_enable=False)
        names = {"model": model, "model_args": parts, "training_args": settings}
        clone.choose_what_trains()(names | {"vision_tower": tower})
        create_optimizer = clone.find("llava/train/llava_trainer.py", "create_optimizer")
        trainer = SimpleNamespace(
            model=model, args=arguments, optimizer=None, trainer_mode="regular"
        )
        self.optimizer = create_optimizer(trainer)

    def loss(self, ids: Tensor, mask: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        """Return the loss of a batch whose images are IMAGE, one of black for a text."""
        prepared = self.model.prepare_inputs_labels_for_multimodal(
            ids, None, mask, None, labels, images, ["image"] * len(ids)
        )
        _, positions, mask, _, embeddings, labels = prepared
        outputs = self.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, labels=labels
        )
        return outputs.loss


def our_name(name: str) -> str:
    """Return our name of a weight of its model."""
    for theirs, ours in (
        ("model.vision_tower.vision_tower.", "model.vision_tower."),
        ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
        ("model.", "model.language_model."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
