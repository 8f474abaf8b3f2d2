"""What a checkpoint that is no MLLM is told."""

import pytest
import transformers

from llava_bidir.common.errors import UserError
from probes.models.families import family_of


@pytest.mark.parametrize(
    "kind", ["Dinov2Config", "CLIPVisionConfig", "SiglipVisionConfig", "ViTConfig"]
)
def test_an_encoder_without_a_language_model_is_told_what_it_is(kind):
    config = getattr(transformers, kind)()
    with pytest.raises(UserError, match="is a vision encoder without an LLM.*--model.encoder.path"):
        family_of(config)


def test_a_language_model_is_not_called_an_encoder():
    with pytest.raises(UserError, match="no MLLM family 'llama'"):
        family_of(transformers.LlamaConfig())
