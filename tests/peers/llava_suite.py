"""transformers' own LLaVA tests on our class; run.py copies this file beside theirs and runs it for each mask."""

import os

from transformers import LlavaForConditionalGeneration
from transformers.models.auto import modeling_auto

from llava_bidir import LlavaBidirConfig, LlavaBidirForConditionalGeneration

from . import test_modeling_llava as upstream

MASK = os.environ["IMAGE_ATTENTION"]  # or "stock"
CLASS = LlavaForConditionalGeneration if MASK == "stock" else LlavaBidirForConditionalGeneration

# By these names the tests decide which models take labels.
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["llava_bidir"] = CLASS.__name__
modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["llava_bidir"] = CLASS.__name__


class Tester(upstream.LlavaVisionText2TextModelTester):
    """Their sizes and inputs with our config."""

    def get_config(self):
        config = super().get_config()
        if MASK == "stock":
            return config
        settings = {k: v for k, v in config.to_dict().items() if k != "model_type"}
        return LlavaBidirConfig(**settings, image_attention=MASK)


class LlavaBidirTest(upstream.LlavaForConditionalGenerationModelTest):
    """Their tests with our class."""

    all_model_classes = (CLASS,)
    pipeline_model_mapping = {}  # reads checkpoints from the hub
    test_can_init_all_missing_weights_before_2023 = True  # the tests find no year in our files

    def setUp(self):
        super().setUp()
        self.model_tester = Tester(self)
        self.config_tester.config_class = (
            LlavaBidirConfig if MASK != "stock" else self.config_tester.config_class
        )
