"""A LLaVA of your own class: `probes study DIR DATA --out OUT --import family.py`."""

from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

import probes


class MineConfig(LlavaConfig):
    model_type = "mine"  # as config.json says


class Mine(LlavaForConditionalGeneration):
    config_class = MineConfig


AutoConfig.register("mine", MineConfig)
family = probes.Family(
    Mine, adapter=("multi_modal_projector",), vision_tower="vision_tower", placeholder="<image>"
)
probes.register_family("mine", family)
