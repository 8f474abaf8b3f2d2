"""Which answers lmms-eval 0.7.3 can read, by benchmark. The others count as wrong, are left out or are guessed."""

import re

from .scores import Item, clean_answer

# Short answers are asked for in "a single word or phrase"; this is more than any answer of GQA has.
LONGEST_PHRASE = 8  # words
SHORTEST_SENTENCE = 3  # words


def is_yes_or_no(item: Item) -> bool:
    """Return True for POPE's exact words in any case. "Yes." is not one of them."""
    return clean_answer(item) in ("yes", "no")


def begins_with_yes_or_no(item: Item) -> bool:
    """Return True if MME's rule finds "yes" or "no" in the first four letters, without full stops, or "y" or "n"."""
    answer = clean_answer(item).replace(".", "")
    return answer in ("y", "n") or "yes" in answer[:4] or "no" in answer[:4]


def is_option_letter(item: Item) -> bool:
    """Return True for an option of ScienceQA: a letter in any case, or a capital one and a full stop before a text."""
    return re.match(r"[A-Za-z]$|[A-Z]\.", item["answer"].strip()) is not None


def is_readable(item: Item) -> bool:
    """Return True if the answer is not empty and the harness need not guess its option, see `harness.is_guessed`."""
    return not item.get("guessed", not item["answer"].strip())


def is_phrase(item: Item) -> bool:
    """Return True for a word or phrase, as asked, and for what matched; sentences hardly match a target."""
    words = item["answer"].split()
    is_sentence = len(words) >= SHORTEST_SENTENCE and words[-1].endswith((".", "!", "?"))
    return item["right"] > 0 or (0 < len(words) <= LONGEST_PHRASE and not is_sentence)
