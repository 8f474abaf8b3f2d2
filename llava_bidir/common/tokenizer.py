"""Tokenizer of a checkpoint, with sentencepiece's ids for a Llama's `tokenizer.model`.

LLaVA tokenises with the sentencepiece package. transformers 5.23 converts a `tokenizer.model` with two differences: it
orders merges by id instead of score, which changes the ids of repeated spaces, and it adds no word-start marker to a
text that begins with a space. A checkpoint with a `tokenizer.json` only keeps the ids that it defines.
"""

from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, TokenizersBackend
from transformers.convert_slow_tokenizer import SentencePieceExtractor, generate_merges

from .errors import error_context
from .hf import read_pretrained

MARKER = "▁"  # replaces spaces and begins a text


def load_tokenizer(key: str, path: str, **hub: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a directory or hub id.

    Args:
        key: Name for errors.
        path: Directory or hub id.
        **hub: `revision` of a hub id.

    Raises:
        UserError: There is no tokenizer, or it is damaged.
    """
    tokenizer = read_pretrained(key, reader=AutoTokenizer, path=path, **hub)
    file = Path(getattr(tokenizer, "vocab_file", None) or "")
    if file.name != "tokenizer.model":
        return tokenizer
    # LlamaTokenizer takes vocabulary and merges from a tokenizer.json. Other classes take all of it.
    has_json = (file.parent / "tokenizer.json").is_file()
    if has_json and not isinstance(tokenizer, LlamaTokenizer):
        return tokenizer
    with error_context(f"{key}: {file}"):
        model = SentencePieceExtractor(str(file)).proto
    if _is_llama(model, tokenizer):
        return _convert(model, tokenizer)
    return tokenizer


def start_ids(tokenizer: PreTrainedTokenizerBase, text: str = "") -> list[int]:
    """Return the ids that a tokenizer puts before a text, such as BOS; [] if the text begins with these tokens.

    All prompts begin with them: those of training, of answers and of probing, and what an exported processor makes. A
    tokenizer can have a BOS and not add it (GPT-2, Pythia, SmolLM2), as in its LLM's own training.
    Source: LLaVA mm_utils.py tokenizer_image_token, which keeps a BOS if the tokenizer adds one.
    """
    plain = tokenizer.encode("a", add_special_tokens=False)
    complete = tokenizer.encode("a")
    places = (i for i in range(len(complete)) if complete[i : i + len(plain)] == plain)
    start = complete[: next(places, 0)]
    written = "".join(tokenizer.convert_ids_to_tokens(start))
    if text.startswith(written):
        return []
    return start


def _is_llama(model: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if a sentencepiece model has Llama's settings and the tokenizer's vocabulary."""
    trainer = model.trainer_spec
    normalizer = model.normalizer_spec
    has_settings = (
        trainer.model_type == trainer.BPE
        and trainer.byte_fallback
        and normalizer.name == "identity"
        and normalizer.add_dummy_prefix
        and not normalizer.remove_extra_whitespaces
    )
    if not has_settings:
        return False
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    return _ids(model.pieces) == vocabulary


def _ids(pieces: Any) -> dict[str, int]:
    return {piece.piece: i for i, piece in enumerate(pieces)}


def _convert(model: Any, tokenizer: PreTrainedTokenizerBase) -> TokenizersBackend:
    """Return the tokenizer with a sentencepiece model's merges and its treatment of spaces."""
    ids = _ids(model.pieces)
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    merges = generate_merges({piece: ids[piece] for piece in scores}, scores)
    backend = tokenizer.backend_tokenizer
    backend.model = BPE(
        ids, merges, unk_token=tokenizer.unk_token, fuse_unk=True, byte_fallback=True
    )
    # Metaspace replaces spaces, then adds its character to a text that does not begin with it. `space` below finds no
    # spaces and therefore adds one to each text, except after a special token (LLaVA's legacy: false).
    markers = pre_tokenizers.Metaspace(MARKER, prepend_scheme="never", split=False)
    space = pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Sequence([markers, space, markers])
    # LlamaTokenizer would ignore all but vocabulary and merges when it reads an export's tokenizer.json.
    kept = {name: getattr(tokenizer, name) for name in ("padding_side", "chat_template")}
    settings = {**tokenizer.init_kwargs, **kept}
    return TokenizersBackend(tokenizer_object=backend, **settings)
