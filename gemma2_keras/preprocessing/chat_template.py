"""Conversations as Gemma 2 was taught to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma2_keras.errors import InputError
from gemma2_keras.preprocessing.records import shown
from gemma2_keras.preprocessing.tokenizer import Gemma2Tokenizer

Message = Mapping[str, str]


def encode_chat(tokenizer: Gemma2Tokenizer, messages: Sequence[Message], reply: bool = True) -> list[int]:
    """A conversation as token ids.

    What a message spells stays plain text: `"<start_of_turn>"` in it does not begin a turn. Gemma 2 knows no system
    role: a first message with the role `"system"` is put in front of the first user message, with an empty line
    between.

    Args:
        tokenizer: whose vocabulary has the pieces of turns.
        messages: `{"role": …, "content": …}` dictionaries. Roles are `"user"` and `"model"` (or `"assistant"`) in turn,
            the user first; one `"system"` message may come before.
        reply: whether to end where the model's reply begins.

    Returns:
        The ids, from `<bos>` on.

    Raises:
        InputError: if there is no message, roles are out of order, content is no text or empty, or the vocabulary has
            no turns.

    Source: the chat template of the model card (https://huggingface.co/google/gemma-2-2b-it).

    >>> tokenizer = Gemma2Tokenizer.from_preset("gemma2_tiny_en")
    >>> ids = encode_chat(tokenizer, [{"role": "user", "content": "Hello"}])
    >>> [tokenizer.id_to_token(i) for i in ids][:2], tokenizer.decode(ids)
    (['<bos>', '<start_of_turn>'], '<start_of_turn>user\\nHello<end_of_turn>\\n<start_of_turn>model\\n')
    """
    require_turns(tokenizer)
    ids = [tokenizer.start_token_id]
    for role, content in turns(messages):
        ids += encode_turn(tokenizer, role, content)
    return ids + begin_reply(tokenizer) if reply else ids


def encode_chat_example(tokenizer: Gemma2Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """A conversation to learn from.

    Args:
        tokenizer: as `encode_chat` takes it.
        messages: likewise.

    Returns:
        The ids that `encode_chat(…, reply=False)` gives, and which of them the loss counts: what the model says in each
        of its turns, with the `<end_of_turn>` behind it.

    Raises:
        InputError: as `encode_chat`.

    >>> tokenizer = Gemma2Tokenizer.from_preset("gemma2_tiny_en")
    >>> messages = [{"role": "user", "content": "Hello"}, {"role": "model", "content": "Aye!"}]
    >>> ids, counted = encode_chat_example(tokenizer, messages)
    >>> tokenizer.decode([i for i, counts in zip(ids, counted, strict=True) if counts])
    'Aye!<end_of_turn>'
    """
    require_turns(tokenizer)
    ids, counted = [tokenizer.start_token_id], [False]
    before, behind = len(begin_reply(tokenizer)), len(end_turn(tokenizer)) - 1
    for role, content in turns(messages):
        turn = encode_turn(tokenizer, role, content)
        said = len(turn) - before - behind
        ids += turn
        counted += [False] * before + [True] * said + [False] * behind if role == "model" else [False] * len(turn)
    return ids, counted


def require_turns(tokenizer: Gemma2Tokenizer) -> None:
    """Refuse a vocabulary that cannot write conversations."""
    if tokenizer.start_of_turn_id is None or tokenizer.end_of_turn_id is None:
        raise InputError(
            "The vocabulary has no <start_of_turn> and <end_of_turn>: this model cannot hold conversations."
        )


def encode_turn(tokenizer: Gemma2Tokenizer, role: str, content: str) -> list[int]:
    """One turn, with the line break behind it."""
    text = tokenizer.encode(f"{role}\n{content.strip()}", parse_special=False)
    return [tokenizer.start_of_turn_id, *text, *end_turn(tokenizer)]  # type: ignore[list-item]


def end_turn(tokenizer: Gemma2Tokenizer) -> list[int]:
    """What stands behind the text of a turn."""
    return [tokenizer.end_of_turn_id, *tokenizer.encode("\n")]  # type: ignore[list-item]


def begin_reply(tokenizer: Gemma2Tokenizer) -> list[int]:
    """What stands before the text of the model's turn."""
    return [tokenizer.start_of_turn_id, *tokenizer.encode("model\n")]  # type: ignore[list-item]


def turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """(role, content) pairs of `"user"` and `"model"`, a system text merged into the first.

    Raises:
        InputError: as `encode_chat`.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(
            f'Messages are a list of {{"role": …, "content": …}} with at least one; given {shown(messages)}.'
        )
    found: list[tuple[str, str]] = []
    system = ""
    for i, message in enumerate(messages):
        role, content = _checked(i, message)
        if role == "system":
            if i:
                raise InputError(f"Message {i} has the role 'system', which only the first message may have.")
            system = f"{content.strip()}\n\n"
            continue
        expected = "model" if len(found) % 2 else "user"
        if role != expected:
            raise InputError(f"Message {i} has the role {role!r}; roles alternate, and {expected!r} is next.")
        found.append((role, content if found else system + content.strip()))
    if not found:
        raise InputError("A system text alone is no conversation: a user message must follow.")
    return found


def _checked(i: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise InputError(f'Message {i} must be {{"role": …, "content": …}}; given {shown(message)}.')
    role, content = message["role"], message["content"]
    role = "model" if role == "assistant" else role
    if role not in ("system", "user", "model"):
        raise InputError(f"Message {i} has the role {shown(role)}; allowed are 'system', 'user' and 'model'.")
    if not isinstance(content, str) or not content.strip():
        raise InputError(f"Message {i} needs text as its content; given {shown(content)}.")
    return role, content
