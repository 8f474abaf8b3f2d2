"""A small tokenizer of Llama's kind, LLaVA's way to use one on the sentencepiece package, and texts to try both on."""

import io
import json
import re
from pathlib import Path
from pydoc_data.topics import topics

from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto

LLAMAS = {  # trainer_spec and normalizer_spec of Llama's tokenizer.model
    "model_type": "bpe",
    "character_coverage": 0.99995,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}


def write_tokenizer(folder: Path, pieces: int = 4000, rows: int = 32000, **settings) -> Path:
    """Train a tokenizer on Python's reference manual and write it as the hub has Vicuna's; return its folder.

    Args:
        folder: Where it is written.
        pieces: Pieces that are trained.
        rows: Pieces in all, as many as Llama has; none of the others can result from merges.
        **settings: Of sentencepiece's trainer.
    """
    # Llama has no piece with "<i" or "<p", either
    text = re.sub("<(?=[ip])", "< ", "\n".join(topics.values()))
    # Llama has "USER" and "▁US", not "▁USER": LLaVA counts its labels on that
    text += "\na US (USER)" * 500
    trained = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=trained,
        vocab_size=pieces,
        minloglevel=2,
        **{**LLAMAS, **settings},
    )
    model = ModelProto.FromString(trained.getvalue())
    for piece in model.pieces:
        if not piece.piece.strip("▁"):
            piece.score = -1e9  # as in Llama's
    for i in range(pieces, rows):
        model.pieces.add(piece=f"\ue000{i}", score=-i)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


class SlowLlama:
    """LLaVA's tokenizer: transformers 4.37's slow LlamaTokenizer with `legacy: false`, from its description.

    Special tokens are cut out first. sentencepiece tokenises the text between them, and begins the first one with "▁".
    """

    SPECIAL = ("<unk>", "<s>", "</s>")

    def __init__(self, folder: Path) -> None:
        model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
        self.first = SentencePieceProcessor(model_proto=model.SerializeToString())
        model.normalizer_spec.add_dummy_prefix = False
        self.later = SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text after <s>."""
        first, *parts = re.split(f"({'|'.join(self.SPECIAL)})", text)
        ids = [1, *self.first.encode(first)]
        for token, later in zip(parts[::2], parts[1::2], strict=True):
            ids += [self.SPECIAL.index(token), *self.later.encode(later)]
        return ids


WHITE_SPACE = " |  |    |\n|\n\n|\t|\r\n|\u00a0|\u3000|▁|▁▁|\u200b|\x00".split("|")
CODE = (
    "def f(x):\n    return x|if (a == b) {|};|// |# |===|----|***|...|_|__init__|"
    "<|>|<a>|</|<0x0A>|http://"
).split("|")
WORDS = (
    "the| a cat|I'm|ASSISTANT:|USER: |2048|3.14|"
    "é|e\u0301|ﬁ|日本語|안녕|עברית|👩‍👩‍👧|\U0010ffff|\ufffd|\ue000"
).split("|")
FRAGMENTS = WHITE_SPACE + CODE + WORDS


def texts(*more: str, min_size: int = 0) -> st.SearchStrategy[str]:
    """Return texts of white space, code, words, any Unicode, and `more`, without the tokens that Llama lacks."""
    fragment = st.one_of(
        st.sampled_from([*FRAGMENTS, *more]),
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
        st.builds(str.__mul__, st.sampled_from(" \n\t=-*#_./0a"), st.integers(1, 70)),
    )
    text = st.lists(fragment, min_size=min_size, max_size=12).map("".join)
    # Hypothesis tries strings of our code, too
    return text.filter(lambda x: "<image>" not in x and "<pad>" not in x)
