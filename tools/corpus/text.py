"""The template language that the corpus is written in, and the small rules of English that it needs.

A template is plain text with three marks:

- ``[one|two|]`` is one of the alternatives, taken at random; an alternative may be empty and may hold others;
- ``{name}`` is the value of a slot, ``{^name}`` the same with a capital letter;
- ``a(n)`` is "a" or "an", whichever the next word asks for.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TypeAlias

Slots: TypeAlias = Mapping[str, str]
# A parsed template: literal text, or the alternatives of a choice, each parsed in turn.
_Node: TypeAlias = "str | tuple[tuple[_Node, ...], ...]"

_SLOT = re.compile(r"\{(\^?)(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa])\(n\)(?=\s+[\"']?([\w-]+))")
# Words whose first letter and first sound are not of the same sort.
_AN_WORDS = re.compile(r"hour|honest|honou?r|heir|uni[mn]|[aeio]|u|8|11$|18$")
_A_WORDS = re.compile(r"(?:one|u)$|one-|once|us[eu]|uni(?![mn])|eu")
_NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def article(word: str) -> str:
    """Returns "a" or "an", as the sound that `word` starts with asks for."""
    lowered = word.lower()
    return "an" if _AN_WORDS.match(lowered) and not _A_WORDS.match(lowered) else "a"


def number_word(number: int) -> str:
    """Returns a number from 0 to 99 in words."""
    if number < 20:
        return _NUMBERS[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_NUMBERS[ones]}" if ones else "")


def capitalize(text: str) -> str:
    """Returns `text` with a capital first letter and the rest as it is."""
    return text[:1].upper() + text[1:]


def join(words: Sequence[str]) -> str:
    """Returns "a", "a and b" or "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


@cache
def _parse(template: str) -> tuple[_Node, ...]:
    nodes, end = _parse_sequence(template, 0, nested=False)
    if end != len(template):
        raise ValueError(f"Unbalanced brackets in the template {template!r}.")
    return nodes


def _parse_sequence(template: str, start: int, nested: bool) -> tuple[tuple[_Node, ...], int]:
    """Reads nodes up to the end, or where `nested` up to the "|" or "]" that closes this alternative."""
    nodes: list[_Node] = []
    index = start
    while index < len(template):
        character = template[index]
        if character == "[":
            alternatives = []
            while template[index] != "]":
                alternative, index = _parse_sequence(template, index + 1, nested=True)
                if index == len(template):
                    raise ValueError(f"Unbalanced brackets in the template {template!r}.")
                alternatives.append(alternative)
            nodes.append(tuple(alternatives))
            index += 1
        elif character in "|]":
            if not nested:
                raise ValueError(f"Unbalanced brackets in the template {template!r}.")
            return tuple(nodes), index
        else:
            end = index
            while end < len(template) and template[end] not in "[|]":
                end += 1
            nodes.append(template[index:end])
            index = end
    return tuple(nodes), index


def _choose(nodes: tuple[_Node, ...], rng: random.Random) -> str:
    return "".join(node if isinstance(node, str) else _choose(rng.choice(node), rng) for node in nodes)


def _fill(text: str, slots: Slots) -> str:
    def value(match: re.Match[str]) -> str:
        filled = slots[match[2]]
        return capitalize(filled) if match[1] else filled

    return _SLOT.sub(value, text)


def tidy(text: str, phrase: bool = False) -> str:
    """Resolves ``a(n)`` and mends what filling slots and taking alternatives leaves behind.

    Doubled spaces go, a full stop or a comma goes inside a closing quote, and a sentence gets its capital letter,
    unless the text is a `phrase` to be put inside one.
    """
    text = re.sub(r"(?<=\S) {2,}", " ", text)
    text = re.sub(r" +([,.;:!?](?:\s|$))", r"\1", text)
    text = re.sub(r" +(?=\n|$)", "", text).strip()
    text = _ARTICLE.sub(lambda match: match[1] + article(match[2])[1:], text)
    text = re.sub(r'([.!?])"[.,]', r'\1"', text)
    text = re.sub(r'([^\s.,!?])"([.,])', r'\1\2"', text)
    if phrase:
        return text
    return re.sub(r"(?:^|(?<=[.!?] )|(?<=\n))[a-z]", lambda match: match[0].upper(), text)


def expand(template: str, rng: random.Random, slots: Slots, phrase: bool = False) -> str:
    """Returns one text of a template: sentences, or a `phrase` to be put inside one.

    Raises:
        KeyError: The template names a slot that `slots` lacks.
        ValueError: Its brackets are unbalanced.
    """
    return tidy(_fill(_choose(_parse(template), rng), slots), phrase)


def template_slots(template: str) -> set[str]:
    """Returns the names of the slots that a template can ask for."""
    return {match[2] for match in _SLOT.finditer(template)}


def sample_text(rng: random.Random, templates: Sequence[str], slots: Slots) -> str:
    """Returns one text of one of the templates."""
    return expand(rng.choice(templates), rng, slots)


_SMALL_WORDS = frozenset(["a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"])


def title_case(text: str) -> str:
    """Returns `text` with the capital letters of a title."""
    words = text.split(" ")
    return " ".join(word if index and word in _SMALL_WORDS else capitalize(word) for index, word in enumerate(words))


def word_count(text: str) -> int:
    """Returns the number of words in `text`."""
    return len(text.split())
