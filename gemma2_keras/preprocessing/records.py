"""Training text in any form: strings, columns, or records one by one."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma2_keras.errors import InputError
from gemma2_keras.preprocessing.inputs import to_python

# The fields of a record, or the names of columns, by which a kind of training text is told.
KINDS = (("text",), ("prompt", "response"), ("prompt", "completion"), ("prompts", "responses"), ("messages",))
_FIELDS = {field for kind in KINDS for field in kind}
_BRIEFLY = reprlib.Repr()
_BRIEFLY.maxstring = _BRIEFLY.maxother = 60


def is_tokenized(x: Any) -> bool:
    """Whether `x` is data that went through a preprocessor already."""
    return isinstance(x, dict) and "token_ids" in x


def is_example(x: Any) -> bool:
    """Whether `x` is one example, and no batch of them: a string, or a record.

    >>> is_example({"text": "The cat"}), is_example({"text": ["The cat", "The dog"]})
    (True, False)
    """
    if isinstance(x, str | bytes):
        return True
    if not isinstance(x, Mapping) or "token_ids" in x:
        return False
    if "messages" in x:
        messages = x["messages"]
        return isinstance(messages, Sequence | np.ndarray) and len(messages) > 0 and isinstance(messages[0], Mapping)
    values = [value for key, value in x.items() if key in _FIELDS]
    return any(isinstance(value, str | bytes | None) or getattr(value, "shape", None) == () for value in values)


def kind_of(keys: Iterable[str], what: str, pair: str = '"prompt" and "response"') -> tuple[str, ...]:
    """Which of the `KINDS` is among the keys; other keys are left aside.

    Args:
        keys: of a record, or the names of columns.
        what: what has them, for a message.
        pair: the two that it might have meant.

    Raises:
        InputError: if none is, or several are.
    """
    keys = {str(key) for key in keys}
    found = [kind for kind in KINDS if keys.issuperset(kind)]
    if not found:
        raise InputError(f'{what} needs the key "text" or "messages", or needs the keys {pair}; given {sorted(keys)}.')
    if len(found) > 1:
        several = " and ".join(" with ".join(repr(field) for field in kind) for kind in found)
        raise InputError(f"{what} could be read in several ways: it has {several}. Remove what is not to be learned.")
    return found[0]


def columns_of(x: Any) -> tuple[dict[str, list], bool]:
    """Training text as columns.

    Args:
        x: a string or a list of them; a record or a list of them, each with the fields of one of `KINDS`; or a
            dictionary of columns, under those names or as `{"prompts": …, "responses": …}`.

    Returns:
        Lists of one length under `"text"`, under `"prompt"` and `"response"`, or under `"messages"`; and whether a
        single example was given.

    Raises:
        InputError: if it is none of them, or kinds are mixed; it names the example by its number.

    Example:

    >>> columns_of([{"prompt": "The", "completion": " cat"}])
    ({'prompt': ['The'], 'response': [' cat']}, False)
    """
    if isinstance(x, Mapping):
        return _from_columns(x)
    items = to_python(x)
    if isinstance(items, list) and any(isinstance(item, Mapping) for item in items):
        return _from_records(items), False
    texts, single = texts_of(items, "texts")
    return {"text": texts}, single


def _from_columns(x: Mapping[str, Any]) -> tuple[dict[str, list], bool]:
    kind = kind_of(x, "A dictionary of training data", '"prompts" and "responses"')
    if kind == ("messages",):
        messages = to_python(x["messages"])
        single = is_example(x)
        messages = [messages] if single else messages
        if not isinstance(messages, list) or not messages:
            raise InputError(f"`messages` must be a list of conversations, with at least one; given {shown(messages)}.")
        return {"messages": messages}, single
    (first, *others) = ((field, texts_of(x[field], field)) for field in kind)
    for field, (texts, single) in others:
        if single != first[1][1]:
            raise InputError(f"`{first[0]}` and `{field}` must both be a string, or both be lists.")
        if len(texts) != len(first[1][0]):
            raise InputError(f"`{first[0]}` and `{field}` must be as many; given {len(first[1][0])} and {len(texts)}.")
    return _named(kind, [texts for _, (texts, _) in (first, *others)]), first[1][1]


def _from_records(records: list) -> dict[str, list]:
    kinds = []
    for i, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise InputError(f"Example {i} is no record, as others are: given {shown(record)}.")
        kinds.append(kind_of(record, f"Example {i}"))
        if kinds[i] != kinds[0]:
            fields = [" and ".join(f'"{field}"' for field in kind) for kind in (kinds[i], kinds[0])]
            raise InputError(
                f"Example {i} has {fields[0]}, example 0 has {fields[1]}: all must be of one kind. Train on one kind "
                "after the other, or bring them to one form."
            )
    kind = kinds[0]
    columns = [[to_python(record[field]) for record in records] for field in kind]
    if kind != ("messages",):
        for field, column in zip(kind, columns, strict=True):
            texts_of(column, field)
    return _named(kind, columns)


def _named(kind: tuple[str, ...], columns: list[list]) -> dict[str, list]:
    names = {"prompts": "prompt", "responses": "response", "completion": "response"}
    return {names.get(field, field): column for field, column in zip(kind, columns, strict=True)}


def texts_of(x: Any, what: str) -> tuple[list[str], bool]:
    """Strings as a list, and whether a single one was given.

    Raises:
        InputError: if there is none, one is empty, or something is no string; it names `what`.
    """
    x = to_python(x)
    single = isinstance(x, str)
    texts = [x] if single else x
    if not isinstance(texts, list):
        raise InputError(f"`{what}` must be a string or a list of strings; given {shown(x)}.")
    if not texts:
        raise InputError(f"`{what}` is empty: give at least one string.")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"`{what}` must be a string or a list of strings; given {shown(texts)}, of which number {i} is "
                f"{shown(text)}."
            )
        if not text:
            raise InputError(
                f"`{what}` {i} is an empty string: give it at least one character. To let a model begin on its own, "
                "generate from token ids that hold the start token alone."
            )
    return texts, single


def shown(x: Any) -> str:
    """What was given, short enough for a message, however long or deep it is.

    >>> shown(["The cat", 5]), len(shown("a" * 1000))
    ("['The cat', 5]", 60)
    """
    text = _BRIEFLY.repr(x)
    return text if len(text) <= 80 else f"{text[:77]}…"
