"""The model card of an exported model: architecture, loading, training settings."""

import transformers
from transformers import LlavaConfig

CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, {attention}-image-attention]
---

# LLaVA-1.5 with {attention} attention among image tokens

{encoder} encoder ({tokens} image tokens), two-layer MLP adapter, {llm} of {layers} layers.
{mask}

## Loading

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(DIR{remote})
processor = AutoProcessor.from_pretrained(DIR{remote})
```

Images are {resize}. Attention backends: sdpa, eager or flex_attention{flash}.

## Training

{training}

Written by llava-bidir {version} with transformers {transformers}.
"""

MASKS = {
    "causal": "Image tokens attend causally, as in LLaVA-1.5.",
    "bidirectional": "Image tokens attend to each other in both directions (arXiv 2603.17228, Eq. 2); text is causal.",
    "prefix": "All tokens up to the last image token attend in both directions; the text after it is causal.",
}
RESIZES = {"pad": "padded to a square with the mean colour", "center_crop": "cropped to the centre square"}


def model_card(config: LlavaConfig, training: dict) -> str:
    """Return the Markdown of an exported model's card; `training` lists settings and metrics of its training run."""
    from llava_bidir import __version__

    attention = getattr(config, "image_attention", "causal")
    facts = {name: value for name, value in training.items() if name != "checkpoint"}  # a path on one machine
    stock = config.model_type == "llava"
    return CARD.format(
        attention=attention,
        encoder=config.vision_config.model_type,
        tokens=config.image_seq_length,
        llm=config.text_config.model_type,
        layers=config.text_config.num_hidden_layers,
        mask=MASKS.get(attention, f"Image attention: {attention}."),
        remote="" if stock else ", trust_remote_code=True",
        resize=RESIZES[getattr(config, "image_resize", "pad")],
        flash="" if stock else "; flash attention ignores the mask and is rejected",
        training="\n".join(f"- {name}: {value}" for name, value in facts.items()) or "Not recorded.",
        version=__version__,
        transformers=transformers.__version__,
    )
