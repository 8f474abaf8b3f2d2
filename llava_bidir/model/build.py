"""Construction of a model from encoder, adapter and LLM; the LLM's vocabulary."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import deepspeed as zero3

from llava_bidir.common.encoders import square_side
from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.hf import (
    check_merged,
    greedy_config,
    is_finite,
    load_weights,
    read_model_config,
    read_pretrained,
    read_tensors,
    read_training,
)
from llava_bidir.common.identity import Identity
from llava_bidir.common.tokenizer import load_tokenizer

from .configuration_llava_bidir import LlavaBidirConfig
from .encoders import Encoder, resize_stored_positions
from .modeling_llava_bidir import LlavaBidirForConditionalGeneration, check_mask_reaches_layers

ADAPTER_PREFIX = "multi_modal_projector."
MODEL_PARTS = ("encoder", "adapter", "llm")

# Source: Hugging Face's conversion of LLaVA-1.5, which extends the vocabulary by <image> and <pad>.
EXTRA_TOKENS = ("<image>", "<pad>")

# Source: Hugging Face's conversion of LLaVA-1.5 pads the extended vocabulary to a multiple of it.
VOCABULARY_MULTIPLE = 64

CHECKED_TOKENS = 8  # of a text whose logits are compared with the LLM's
NEAR = 1e-4  # relative difference that orders of operations make in float32

# Names of weights in a llava, by transformers 5 and by earlier versions, and those of its LLM alone
OF_LLAVA = {
    r"^(model\.language_model|language_model\.model)\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
ENCODER_OF_LLAVA = {r"^(model\.)?vision_tower\.": ""}

# Prompts have the ids of data/conversation.py. The tokenizer adds <s>. LLaVA encodes text after an image separately, so
# that it begins with a word-start marker. A tokenizer adds none after a special token, so a space replaces it.
CHAT_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('expected the roles user and assistant, got ' ~ message['role']) }}{% endif %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{{ '<image>' * images | length ~ (' \n' if images else '') }}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] | trim if images else part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

# Precedes an LLM's own chat template, which knows text only: contents with images become text, as in training.
IMAGES_IN_CHAT = (
    "{%- set turns = namespace(list=[]) -%}{%- for message in messages -%}"
    "{%- set content = message['content'] -%}{%- if content is not string -%}"
    "{%- set images = content | selectattr('type', 'equalto', 'image') | list | length -%}"
    "{%- set texts = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}"
    "{%- set content = ('<image>' * images ~ '\n' ~ texts | trim) | trim if images else texts -%}{%- endif -%}"
    "{%- set turns.list = turns.list + [{'role': message['role'], 'content': content}] -%}"
    "{%- endfor -%}{%- set messages = turns.list %}\n"
)


def build_processor(
    encoder: Encoder, llm: str, image_resize: str = "pad", template: str = "vicuna_v1"
) -> LlavaProcessor:
    """Return tokenizer, image processor and chat template of a model, without loading weights.

    Args:
        encoder: Determines pixel statistics, image size and number of image tokens.
        llm: Directory or hub id of the LLM; `<image>` and `<pad>` are added to its tokenizer.
        image_resize: "pad" or "center_crop", see :meth:`Encoder.image_processor`.
        template: Template of the conversations in training (data/conversation.py); "chat" keeps the LLM's own.

    Raises:
        UserError: The LLM has no chat template to keep.
    """
    vision_config = encoder.load_config()
    extra = encoder.extra_tokens(vision_config)
    tokenizer = load_tokenizer("model.llm", llm)
    tokenizer.add_tokens(list(EXTRA_TOKENS), special_tokens=True)
    tokenizer.pad_token = "<pad>"
    chat_template = CHAT_TEMPLATE
    if template == "chat":
        with error_context(f"data.template chat: the tokenizer of {llm}"):  # may have none
            llm_template = tokenizer.get_chat_template()
        # an exported model has the prefix
        chat_template = IMAGES_IN_CHAT + llm_template.removeprefix(IMAGES_IN_CHAT)
    return LlavaProcessor(
        image_processor=encoder.image_processor(vision_config, image_resize),
        tokenizer=tokenizer,
        patch_size=square_side(vision_config.patch_size),
        vision_feature_select_strategy=_select_strategy(extra),
        num_additional_image_tokens=min(extra, 1),  # which the strategy drops
        chat_template=chat_template,
    )


def read_llm_config(path: str) -> PreTrainedConfig:
    """Return the config of an LLM; that of a llava's LLM if `path` is a llava, from which a training goes on.

    Raises:
        UserError: There is no such checkpoint.
    """
    config = read_model_config("model.llm", path)
    if isinstance(config, LlavaConfig):
        return config.text_config
    return config


def build_model(
    encoder: Encoder,
    llm: str,
    processor: LlavaProcessor,
    *,
    image_attention: str = "causal",
    image_resize: str = "pad",
    adapter: str | None = None,
    attn_implementation: str = "sdpa",
    dtypes: Mapping[str, torch.dtype] | None = None,
    with_weights: bool = True,
) -> LlavaBidirForConditionalGeneration:
    """Load encoder and LLM, add the adapter, and resize the vocabulary to the processor's.

    Weights are read straight into their dtype, one after the other.

    Args:
        encoder: The vision tower.
        llm: Directory or hub id of a causal language model.
        processor: From :func:`build_processor`.
        image_attention, image_resize: Stored in the config, see :class:`LlavaBidirConfig`.
        adapter: Checkpoint directory to read the adapter from (of stage 1); None initialises a new adapter.
        attn_implementation: "sdpa", "eager" or "flex_attention".
        dtypes: Dtype of the weights of "encoder", "adapter" and "llm"; None: torch's default dtype for all.
        with_weights: False builds encoder and LLM of their configs alone, whose weights need not be there.

    Raises:
        UserError: The adapter does not fit this model, or the LLM computes its logits in a way that it does not know.
    """
    dtypes = dtypes or dict.fromkeys(MODEL_PARTS, torch.get_default_dtype())
    tokenizer = processor.tokenizer
    vision_config = encoder.load_config()
    with error_context(f"model.llm: {llm}"):
        check_mask_reaches_layers(image_attention, read_llm_config(llm).get_text_config())
    language_model = load_llm(
        llm,
        len(tokenizer),
        with_weights=with_weights,
        dtype=dtypes["llm"],
        attn_implementation=attn_implementation,
    )
    head = language_model.get_output_embeddings()
    extra = encoder.extra_tokens(vision_config)
    config = LlavaBidirConfig(
        vision_config=vision_config,
        text_config=language_model.config,
        image_token_index=processor.image_token_id,
        image_seq_length=encoder.image_tokens(vision_config),
        vision_feature_layer=encoder.layer,
        vision_feature_select_strategy=_select_strategy(extra),
        register_tokens=max(extra - 1, 0),
        encoder_norm=encoder.norm_path,
        image_attention=image_attention,
        image_resize=image_resize,
        lm_head_bias=head.bias is not None,
    )
    with no_zero3_partitioning():
        vision_tower = load_encoder(
            encoder, vision_config, dtype=dtypes["encoder"], with_weights=with_weights
        )
        if encoder.replaces_positions:
            resize_stored_positions(vision_tower, encoder.image_px)
    with error_context(f"model.llm: {llm}"), no_zero3_partitioning(), torch.device("meta"):
        model = LlavaBidirForConditionalGeneration._from_config(
            config, dtype=torch.get_default_dtype(), attn_implementation=attn_implementation
        )
    model.model.vision_tower = vision_tower
    model.model.language_model = language_model.base_model
    model.set_output_embeddings(head)
    if with_weights:
        with error_context(f"model.llm: {llm}"):
            check_text_logits(model, language_model)
    projector = model.model.multi_modal_projector.to_empty(device="cpu").float()
    for layer in (projector.linear_1, projector.linear_2):
        layer.reset_parameters()  # as LLaVA does
    projector.to(dtypes["adapter"])
    if adapter is not None:
        load_adapter(model, adapter)
    model.config.text_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = greedy_config(language_model.generation_config, tokenizer)
    return model


def load_encoder(
    encoder: Encoder, config: PreTrainedConfig, dtype: torch.dtype, with_weights: bool
) -> PreTrainedModel:
    """Load the vision tower; without weights, build it of its config."""
    reader = encoder.kind.model_cls
    if not with_weights:
        return reader._from_config(config, dtype=dtype)
    options = {}
    stored = read_model_config("model.encoder.path", encoder.path)
    if isinstance(stored, LlavaConfig):
        options = {"config": stored.vision_config, "key_mapping": ENCODER_OF_LLAVA}
    return load_weights("model.encoder.path", reader, encoder.path, dtype=dtype, **options)


def load_llm(path: str, tokens: int, *, with_weights: bool = True, **options) -> PreTrainedModel:
    """Load the LLM, also that of a llava, and resize its vocabulary to at least `tokens` rows.

    Args:
        path: Directory or hub id.
        tokens: Number of tokens of the tokenizer.
        with_weights: False builds it of its config.
        **options: Passed to `from_pretrained`, or `from_config`.

    Raises:
        UserError: As :func:`load_weights`, or the vocabulary cannot be resized.
    """
    if not with_weights:
        config = read_llm_config(path)
        with error_context(f"model.llm: {path}"):
            language_model = AutoModelForCausalLM.from_config(config, **options)
    else:
        if isinstance(read_model_config("model.llm", path), LlavaConfig):
            options |= {"config": read_llm_config(path), "key_mapping": OF_LLAVA}
        reader = AutoModelForCausalLM
        language_model = load_weights("model.llm", reader=reader, path=path, **options)
    with error_context(f"model.llm: {path}"):
        resize_vocabulary(language_model, tokens)
    return language_model


def resize_vocabulary(language_model: PreTrainedModel, tokens: int) -> None:
    """Resize the embeddings to at least `tokens` rows, a multiple that suits GPUs; new rows are the mean of the old.

    Source: smart_tokenizer_and_embedding_resize of LLaVA's train.py. The rows do not depend on the seed, since
    checkpoints lack those of a frozen LLM.

    Deviates: LLaVA trains with 32,000 rows. Here the softmax of a 7B's loss has the 64 new rows, too.
    """
    rows = language_model.get_input_embeddings().num_embeddings
    if tokens <= rows:
        return
    with torch.random.fork_rng(devices=[]):  # transformers draws rows first
        language_model.resize_token_embeddings(tokens, VOCABULARY_MULTIPLE, mean_resizing=False)
    head = language_model.get_output_embeddings()
    for embeddings in (language_model.get_input_embeddings(), head):
        embeddings.weight.data[rows:] = embeddings.weight.data[:rows].mean(0)
    if head.bias is not None:
        head.bias.data[rows:] = head.bias.data[:rows].mean()


@torch.no_grad()
def check_text_logits(
    model: LlavaBidirForConditionalGeneration, language_model: PreTrainedModel
) -> None:
    """Raise if the logits of a text differ from those of the LLM that is part of the model.

    LLMs scale their logits, feed ids into several layers, and more: a comparison notices what the model does not do.
    Under ZeRO-3, where no process has all weights, nothing is compared.
    """
    if any(hasattr(parameter, "ds_id") for parameter in language_model.parameters()):
        return
    embeddings = language_model.get_input_embeddings()
    numbers = torch.arange(1, CHECKED_TOKENS + 1, device=embeddings.weight.device)
    ids = numbers[None] * (embeddings.num_embeddings // (CHECKED_TOKENS + 2))
    llm_logits = language_model(input_ids=ids, use_cache=False).logits.float()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    difference = (logits - llm_logits).abs().max().item()
    largest = llm_logits.abs().max().item()
    if not difference <= largest * max(NEAR, 2 * torch.finfo(language_model.dtype).eps):
        kind = language_model.config.model_type
        raise UserError(
            f"the logits of a text differ by {difference:.3g} from those of the LLM itself, whose largest is "
            f"{largest:.3g}: {kind} computes them in a way that is not supported; use another LLM"
        )


@contextmanager
def no_zero3_partitioning() -> Iterator[None]:
    """Let transformers build unpartitioned models even under ZeRO-3.

    The LLM is partitioned while it is read. Encoder and adapter are small: DeepSpeed partitions them when the model is
    complete.
    """
    # private: transformers has a public function to unset it only
    config = zero3._hf_deepspeed_config_weak_ref
    zero3.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        zero3._hf_deepspeed_config_weak_ref = config


def load_adapter(model: LlavaBidirForConditionalGeneration, directory: str) -> None:
    """Load the adapter's weights from a checkpoint directory.

    Raises:
        UserError: The directory has no adapter, one for another encoder, LLM or mask, one with values that are not
            finite, or updates that are not merged.
    """
    config = read_pretrained("model.adapter", LlavaBidirConfig, directory)
    check_merged("model.adapter", directory)
    for name in ("image_attention", "vision_feature_layer", "image_seq_length", "encoder_norm"):
        saved = getattr(config, name)
        expected = getattr(model.config, name)
        if saved != expected:
            raise UserError(
                f"adapter checkpoint {directory} has {name} {saved!r}, this model {expected!r}; use the same in both "
                "stages (paper, Sec. 5)"
            )
    tensors = read_tensors(Path(directory), ADAPTER_PREFIX)
    weights = {name.partition(ADAPTER_PREFIX)[2]: tensor for name, tensor in tensors.items()}
    if broken := [name for name in weights if not is_finite(weights[name])]:
        raise UserError(
            f"model.adapter: {directory} has values that are not finite in {broken}; train it again"
        )
    with error_context(f"adapter checkpoint {directory} does not fit this encoder and LLM"):
        model.model.multi_modal_projector.load_state_dict(weights)


def check_same_parents(adapter: Path, encoder: Path, llm: Path, identity: Identity) -> None:
    """Raise if an adapter was trained with another encoder or LLM than this run has; shapes alone do not tell.

    Args:
        adapter: Exported model of stage 1. Trained on data without an identity, it records none.
        encoder, llm: Directories of this run's; those of the adapter's own export were trained with it.
        identity: Of this run.

    Raises:
        UserError: Names what differs.
    """
    training = read_training(adapter)
    saved = (training.get("identity") or {}).get("model", {})
    parts = {"encoder": encoder, "llm": llm}
    compared = [part for part in parts if not _is_same(parts[part], adapter)]
    if "encoder" in compared and "encoder" in training.get("trainable", []):
        raise UserError(
            f"adapter checkpoint {adapter} was trained with its encoder, and {encoder} is another one; give "
            f"--model.encoder.path {adapter}"
        )
    for key in saved.keys() & identity["model"].keys():
        part = key.partition("/")[0]
        if part in compared and saved[key] != identity["model"][key]:
            raise UserError(
                f"adapter checkpoint {adapter} was trained with another {part} ({key} differs); use the same in both "
                "stages, or train an adapter for this one"
            )


def _is_same(folder: Path, other: Path) -> bool:
    return folder.is_dir() and folder.samefile(other)


def _select_strategy(extra_tokens: int) -> str:
    """Return Hugging Face's name for the tokens to drop: "default" is CLS, "full" none; the model drops registers."""
    if extra_tokens:
        return "default"
    return "full"
