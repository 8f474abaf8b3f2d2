"""The model card of an exported model: architecture, loading, training settings."""

import transformers
from transformers import LlavaConfig, LlavaProcessor

CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, {attention}-image-attention]
---

# LLaVA-1.5 with {attention} attention among image tokens

{encoder} encoder ({tokens} image tokens), two-layer MLP adapter, {llm} of {layers} layers. Image resize: {resize}.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(DIR{remote})
processor = AutoProcessor.from_pretrained(DIR{remote})
```

## Training

{training}

Written by llava-bidir {version} with transformers {transformers}.
"""


def model_card(config: LlavaConfig, processor: LlavaProcessor, training: dict) -> str:
    """Return the Markdown of an exported model's card; `training` lists settings and metrics of its training run."""
    from llava_bidir import __version__

    # a path on one machine, and hashes, which training.json has
    left_out = ("checkpoint", "identity")
    facts = {name: value for name, value in training.items() if name not in left_out}
    return CARD.format(
        attention=getattr(config, "image_attention", "causal"),
        encoder=config.vision_config.model_type,
        tokens=config.image_seq_length,
        llm=config.text_config.model_type,
        layers=config.text_config.num_hidden_layers,
        resize="pad" if processor.image_processor.do_pad else "center_crop",
        remote="" if config.model_type == "llava" else ", trust_remote_code=True",
        training="\n".join(f"- {name}: {value}" for name, value in facts.items())
        or "Not recorded.",
        version=__version__,
        transformers=transformers.__version__,
    )
