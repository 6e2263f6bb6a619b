"""JSON lines from outside, read as examples to learn from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from gemma2_keras.errors import InputError
from gemma2_keras.preprocessing.chat_template import turns
from gemma2_keras.preprocessing.records import kind_of, shown

# A longer line is no line of examples: the file is of another kind.
LONGEST_LINE = 64 * 2**20
# How files of gzip, zip, zstd, xz and Parquet begin.
_PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"PAR1")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The examples of a file of JSON lines, checked one by one.

    Each line is an object with `"text"`; with `"prompt"` and `"response"` (or `"completion"`); or with `"messages"`, a
    list of `{"role": …, "content": …}`. All lines are of one kind. Blank lines are passed over, and so are other keys.

    Args:
        path: of a UTF-8 file.

    Returns:
        Records that `fit` and `prepare` take, without the other keys.

    Raises:
        InputError: if there is no example, a line is no such object, or a text in it is empty or none; it names the
            file and the line.
        OSError: if the file cannot be read.

    Example:

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     _ = file.write('{"prompt": "The cat", "completion": " sleeps.", "source": "a book"}')
    ...     file.flush()
    ...     read_jsonl(file.name)
    [{'prompt': 'The cat', 'completion': ' sleeps.'}]
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"`path` must be that of a file of JSON lines; given {shown(path)}.")
    records: list[dict[str, Any]] = []
    first = 0
    for number, line in _lines(path):
        try:
            record = _record(line)
            if records and record.keys() != records[0].keys():
                fields, others = (" and ".join(f'"{key}"' for key in keys) for keys in (record, records[0]))
                raise InputError(f"it has {fields}, line {first} has {others}: all lines must be of one kind.")
        except InputError as error:
            raise InputError(f"{os.fspath(path)}, line {number}: {error}") from error
        first = first or number
        records.append(record)
    if not records:
        raise InputError(f'{os.fspath(path)} is empty: give at least one line, a JSON object such as {{"text": …}}.')
    return records


def _lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, and their numbers."""
    with open(path, "rb") as file:
        number = 1
        while line := file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise InputError(
                    f"{os.fspath(path)}, line {number} is longer than {LONGEST_LINE >> 20} MiB: is each example on a "
                    "line of its own?"
                )
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                yield number, line
            number += 1


def _record(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        if line.startswith(_PACKED):
            raise InputError("the file is packed; unpack it first.") from error
        raise InputError(
            f"not UTF-8, byte {line[error.start]:#04x} at {error.start}. Save the file as UTF-8."
        ) from error
    except RecursionError as error:
        raise InputError("JSON nested too deeply.") from error
    except ValueError as error:
        raise InputError(f"no JSON ({error}). Each line must be a whole JSON object.") from error
    if not isinstance(value, dict):
        raise InputError(f"a {type(value).__name__} stands where a JSON object belongs.")
    kind = kind_of(value, "the object")
    record = {field: value[field] for field in kind}
    if kind == ("messages",):
        turns(record["messages"])
        record["messages"] = [{key: message[key] for key in ("role", "content")} for message in record["messages"]]
        texts = [message["content"] for message in record["messages"]]
    else:
        texts = [_text(field, text) for field, text in record.items()]
    for text in texts:
        _check_surrogates(text)
    return record


def _text(field: str, text: Any) -> str:
    if not isinstance(text, str) or not text:
        raise InputError(f"`{field}` must be a string of at least one character; given {shown(text)}.")
    return text


def _check_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"a text holds a lone surrogate, {text[error.start]!a}, which is no character.") from error
