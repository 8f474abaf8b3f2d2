"""Options of a dataclass: the command line and values make the same one, and both are checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from llava_bidir.common.errors import UserError
from llava_bidir.common.options import (
    Count,
    Indices,
    add_options,
    options_from,
    positional,
    read_options,
    value_from_text,
)
from llava_bidir.common.usage_errors import ArgumentParser


@dataclass(frozen=True, kw_only=True)
class Base:
    """What all have.

    Args:
        probes: Two folders,
            on the same images.
    """

    probes: tuple[Path, Path]


@dataclass(frozen=True, kw_only=True)
class Options(Base):
    """More.

    Args:
        photos: Photos.
        image: Indices.
        layers: Layers.
        control: A control.
        by_class: Hold classes fixed.
        share: A share.
        draws: Draws.
    """

    photos: tuple[Path, ...] = positional()
    image: Indices = (0,)
    layers: tuple[int, ...] | None = None
    control: Literal["random", "matched"] = "random"
    by_class: bool = False
    share: float = 0.9
    draws: Count | None = None


def parse(*words: str) -> Options:
    parser = ArgumentParser(prog="x")
    add_options(parser, Options)
    return read_options(Options, parser.parse_args(words))


def test_words_and_values_make_the_same_options():
    words = "p1 p2 --probes a b --image 3 4 --layers 1 2 --control matched --by-class --draws 2"
    values = {
        "photos": ["p1", "p2"],
        "probes": ["a", "b"],
        "image": [3, 4],
        "layers": [1, 2],
        "control": "matched",
        "by_class": True,
        "draws": 2,
    }
    made = options_from(Options, values, "x")
    assert parse(*words.split()) == made
    assert made.probes == (Path("a"), Path("b"))
    assert made.layers == (1, 2)
    assert (made.share, made.by_class) == (0.9, True)
    defaults = parse("p1", "--probes", "a", "b", "--by-class", "false")
    assert defaults == options_from(Options, {"photos": ["p1"], "probes": ["a", "b"]}, "x")


REQUIRED = {"photos": ["p"], "probes": ["a", "b"]}
BAD = [
    ({"imag": 1}, r"x has no option 'imag'; did you mean 'image'"),
    ({"image": 1}, r"x: image is 1; expected a valid tuple"),
    ({"control": "none"}, r"x: control is 'none'; expected 'random' or 'matched'"),
    ({"draws": 0}, r"x: draws is 0; expected greater than or equal to 1"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_a_bad_value_is_an_error_that_names_it(values, message):
    with pytest.raises(UserError, match=message):
        options_from(Options, REQUIRED | values, "x")


def test_an_option_that_must_be_given_is_missing():
    with pytest.raises(UserError, match=r"^x: probes is missing; it must be given"):
        options_from(Options, {"photos": ["p"]}, "x")
    with pytest.raises(UserError, match=r"^x: probes is missing; it must be given"):
        options_from(Options, REQUIRED | {"probes": ["a"]}, "x")


def test_texts_of_lists_are_split_at_commas():
    assert value_from_text(Options, "layers", "1,2", "x") == ["1", "2"]
    assert value_from_text(Options, "image", "[1, 2]", "x") == ["1", "2"]
    assert value_from_text(Options, "by-class", "true", "x") == "true"
    with pytest.raises(UserError, match="x has no option 'windows'"):
        value_from_text(Options, "windows", "2", "x")
