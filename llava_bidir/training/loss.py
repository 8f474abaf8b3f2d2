"""Forward pass of a micro-batch and its loss, without waiting for the device.

Logits are computed for supervised tokens only. The host knows which they are and where images are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_bidir.data.collate import Batch
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration, build_masks


def supervised_loss(model: LlavaBidirForConditionalGeneration, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over the supervised tokens of a micro-batch, 0 if there are none.

    The parts of the model are called one by one. `LlavaModel.forward` finds image tokens on the device, and waits for
    it to count them. Under ZeRO-3 all ranks gather weights in one order, whether their batches have images or not.

    Args:
        model: Model in training or evaluation.
        batch: From :class:`llava_bidir.data.collate.Collate`.
    """
    embedded = model.get_input_embeddings()(batch["input_ids"])
    features = torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output)
    positions = batch["image_positions"]
    if not len(positions):
        # a black image, which gives the adapter zero gradients. Source: LLaVA llava_arch.py:234
        features = features[:0]
    rows = embedded.flatten(0, 1).index_copy(0, positions, features.to(embedded))
    config = model.config
    # padding needs none: it is on the right, where neither text nor image tokens attend
    mask = None
    if config.image_attention != "causal" and len(positions):
        is_image = batch["input_ids"] == config.image_token_id
        mask = build_masks(
            config.image_attention, config.get_text_config(), is_image, dtype=model.dtype
        )
    output = model.model.language_model(
        inputs_embeds=rows.view_as(embedded), attention_mask=mask, use_cache=False
    )
    states = output.last_hidden_state.flatten(0, 1)
    logits = model.lm_head(states[batch["predicts"]]).float()
    targets = batch["labels"].flatten()[batch["predicts"] + 1]
    return F.cross_entropy(logits, targets, reduction="sum") / max(batch["supervised"], 1)
