"""Which family a checkpoint is of, and what one without a family is told."""

import pytest
import transformers

from llava_bidir.common.errors import UserError
from probes.models.families import family_of


@pytest.mark.parametrize("kind", ["DonutSwinConfig", "SwinConfig"])
def test_an_encoder_that_is_not_registered_is_told_how_to_add_it(kind):
    expected = (
        "is a vision encoder that is not registered; registered: dinov2, .*probes.EncoderFamily"
    )
    with pytest.raises(UserError, match=expected):
        family_of(getattr(transformers, kind)())


def test_a_language_model_is_not_called_an_encoder():
    with pytest.raises(UserError, match="no MLLM or encoder family 'llama'"):
        family_of(transformers.LlamaConfig())


def test_a_model_of_timm_is_told_how_it_is_read():
    with pytest.raises(UserError, match="read it as timm:local-dir:DIR, or timm:hf-hub:ID"):
        family_of(transformers.TimmWrapperConfig())
