"""Puts an encoder, an adapter and an LLM together, and says what trains."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlavaProcessor
from transformers.integrations import deepspeed as zero3

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf_loading import error_context, load_weights, read_pretrained, weight_files

from .attention import image_attention as find_image_attention
from .encoders import Encoder
from .lora import UPDATES, has_lora
from .modeling_llava_bidir import LlavaBidirConfig, LlavaBidirForConditionalGeneration

log = logging.getLogger(__name__)

ADAPTER = "multi_modal_projector."
# The parts of a model and where their weights live. The encoder is always frozen, so it is not among them.
TRAINABLE = {"adapter": (f"model.{ADAPTER}",), "llm": ("model.language_model.", "lm_head.")}

# Source: Hugging Face's conversion of LLaVA-1.5, which widens the vocabulary by <image> and <pad>.
EXTRA_TOKENS = ("<image>", "<pad>")
VOCABULARY_MULTIPLE = 64

CHAT_TEMPLATE = (
    "{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_processor(encoder: Encoder, llm: str, image_resize: str = "pad") -> LlavaProcessor:
    """Tokenizer, image processor and chat template of a model, without its weights.

    Args:
        encoder: Decides how images become pixels and image tokens.
        llm: Directory or hub id whose tokenizer is taken; `<image>` and `<pad>` are added to it.
        image_resize: "pad" or "center_crop", see :meth:`Encoder.image_processor`.
    """
    vision_config = encoder.load_config()
    tokenizer = read_pretrained("model.llm", AutoTokenizer, llm)
    tokenizer.add_tokens(list(EXTRA_TOKENS), special_tokens=True)
    tokenizer.pad_token = "<pad>"
    return LlavaProcessor(
        image_processor=encoder.image_processor(vision_config, image_resize),
        tokenizer=tokenizer,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy=_select_strategy(encoder),
        num_additional_image_tokens=min(encoder.entry.extra_tokens, 1),  # those that the strategy drops
        chat_template=CHAT_TEMPLATE,
    )


def check_image_attention(name: str) -> None:
    """Raise UserError for an unknown mask; attention.py ships in checkpoints and cannot import it."""
    try:
        find_image_attention(name)
    except ValueError as error:
        raise UserError(f"model.image_attention: {error}") from None


def build_config(
    encoder: Encoder, llm: str, image_token_id: int, image_attention: str, image_resize: str, adapter_gain: float
) -> LlavaBidirConfig:
    """The configuration of encoder + adapter + LLM, read without loading weights."""
    check_image_attention(image_attention)
    vision_config = encoder.load_config()
    rows, columns = encoder.grid(vision_config)
    return LlavaBidirConfig(
        vision_config=vision_config,
        text_config=read_pretrained("model.llm", AutoConfig, llm),
        image_token_index=image_token_id,
        image_seq_length=rows * columns,
        vision_feature_layer=encoder.feature_layer,
        vision_feature_select_strategy=_select_strategy(encoder),
        register_tokens=max(encoder.entry.extra_tokens - 1, 0),
        image_attention=image_attention,
        image_resize=image_resize,
        adapter_gain=adapter_gain,
    )


def build_model(
    encoder: Encoder,
    llm: str,
    processor: LlavaProcessor,
    *,
    image_attention: str = "causal",
    image_resize: str = "pad",
    adapter: str | None = None,
    adapter_gain: float = 1.0,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> LlavaBidirForConditionalGeneration:
    """Loads encoder and LLM, adds the adapter, and widens the vocabulary to the processor's.

    Args:
        encoder: The vision tower.
        llm: Directory or hub id of a causal language model.
        processor: From :func:`build_processor`.
        image_attention: Registered mask among image tokens.
        image_resize, adapter_gain: Go into the config, see :class:`LlavaBidirConfig`.
        adapter: Checkpoint directory (stage 1's) whose adapter is taken; None draws a new one.
        attn_implementation: "sdpa", "eager" or "flex_attention".
        dtype: Of the weights.

    Raises:
        UserError: The adapter's checkpoint does not fit.
    """
    tokenizer = processor.tokenizer
    config = build_config(encoder, llm, processor.image_token_id, image_attention, image_resize, adapter_gain)
    language_model = load_weights(
        "model.llm", AutoModelForCausalLM, llm, config.text_config, dtype=dtype, attn_implementation=attn_implementation
    )
    resize_vocabulary(language_model, len(tokenizer))
    config.text_config = language_model.config
    with unpartitioned():
        vision_tower = load_weights(
            "model.encoder.path", encoder.entry.model_class, encoder.path, config.vision_config, dtype=dtype
        )
    with unpartitioned(), torch.device("meta"):
        model = LlavaBidirForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    model.model.vision_tower = vision_tower
    model.model.language_model = language_model.model
    model.lm_head = language_model.lm_head
    init_adapter(model.model.multi_modal_projector.to_empty(device="cpu").float(), adapter_gain)
    model.model.multi_modal_projector.to(dtype)
    if adapter is not None:
        load_adapter(model, adapter)
    model.generation_config = language_model.generation_config
    model.generation_config.pad_token_id = model.config.text_config.pad_token_id = tokenizer.pad_token_id
    return model


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Inside, transformers builds models whole even where ZeRO-3 is on (training/zero.py). The LLM is partitioned as it
    is read; encoder and adapter are small, and DeepSpeed takes care of them once the model is put together."""
    on = zero3._hf_deepspeed_config_weak_ref
    zero3.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        zero3._hf_deepspeed_config_weak_ref = on


def padded_vocab_size(rows: int, tokens: int) -> int:
    """Rows of an embedding that has `rows` and must hold `tokens`: as many, or a multiple that GPUs like."""
    return rows if tokens <= rows else math.ceil(tokens / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def resize_vocabulary(language_model, tokens: int) -> None:
    """Makes room for `tokens`; new rows are drawn around the mean of the old ones."""
    rows = language_model.get_input_embeddings().num_embeddings
    if padded_vocab_size(rows, tokens) > rows:
        with torch.random.fork_rng(devices=[]):  # drawn alike each time: where the LLM is frozen no checkpoint has them
            torch.manual_seed(0)
            language_model.resize_token_embeddings(padded_vocab_size(rows, tokens), mean_resizing=True)


def init_adapter(adapter: nn.Module, gain: float = 1.0) -> None:
    """Draws the adapter as torch draws Linear layers, which is what LLaVA does; `gain` scales the last weight."""
    for module in adapter.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    with torch.no_grad():
        adapter.linear_2.weight *= gain


def load_adapter(model: LlavaBidirForConditionalGeneration, directory: str) -> None:
    """Takes the adapter's weights from a checkpoint directory, refusing one trained for another encoder or mask."""
    config = read_pretrained("model.adapter", LlavaBidirConfig, directory)
    for name in ("image_attention", "vision_feature_layer", "image_seq_length"):
        theirs, ours = getattr(config, name), getattr(model.config, name)
        if theirs != ours:
            raise UserError(
                f"adapter checkpoint {directory}: {name} is {theirs!r} there and {ours!r} here; both stages of a model "
                "use the same one (paper, Sec. 5)"
            )
    model.config.adapter_gain = config.adapter_gain  # how it once began, for controls that begin anew
    weights = {k.partition(ADAPTER)[2]: tensor for k, tensor in read_tensors(Path(directory), ADAPTER).items()}
    if not weights:
        raise UserError(f"adapter checkpoint {directory} holds no tensor named {ADAPTER}*")
    try:
        model.model.multi_modal_projector.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"adapter checkpoint {directory} does not fit this encoder and LLM: {error}") from None


def read_tensors(directory: Path, part: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint directory whose names have `part` in them; the others stay on disk.

    Raises:
        UserError: There are no weights, or a file of them is damaged.
    """
    found = {}
    for file in weight_files(directory):
        with error_context(file):
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as tensors:
                    found |= {name: tensors.get_tensor(name) for name in tensors.keys() if part in name}
            else:
                tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                found |= {name: tensor for name, tensor in tensors.items() if part in name}
    return found


def set_trainable(model: nn.Module, parts: list[str]) -> dict[str, int]:
    """Freezes everything but `parts` ("adapter", "llm") and returns the number of parameters that train, by part.

    Of an LLM with low-rank updates (lora.py) only these train.
    """
    unknown = set(parts) - set(TRAINABLE)
    if unknown or not parts:
        raise UserError(
            f"model.trainable must be some of {', '.join(TRAINABLE)}; got {parts}. The encoder never trains"
        )
    counts = dict.fromkeys(parts, 0)
    updates_only = has_lora(model)
    for name, parameter in model.named_parameters():
        part = next((p for p in parts if name.startswith(TRAINABLE[p])), None)
        if part == "llm" and updates_only and UPDATES not in name:
            part = None
        parameter.requires_grad_(part is not None)
        if part is not None:
            counts[part] += getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves 0 elements in place
    return counts


def _select_strategy(encoder: Encoder) -> str:
    """Hugging Face's word for the tokens to drop: "default" drops CLS, "full" nothing. Registers go in the model."""
    return "default" if encoder.entry.extra_tokens else "full"
