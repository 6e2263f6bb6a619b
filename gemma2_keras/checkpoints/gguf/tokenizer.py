"""The tokenizer in a GGUF file: a SentencePiece model as keys, and keys as a SentencePiece model.

Source: https://github.com/ggml-org/llama.cpp, `convert_hf_to_gguf.py`, which files of Gemma 2 come from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np

from gemma2_keras.checkpoints.guard import shown
from gemma2_keras.checkpoints.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE_MARK,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    make_model,
    parse_model,
)
from gemma2_keras.errors import CheckpointError

# What a Modelfile of ours begins with.
MODELFILE_MARK = "# Written by gemma2-keras together with the GGUF file below, and replaced with it."
# The same numbers as in a SentencePiece model.
_KINDS = range(NORMAL, BYTE + 1)
# Pieces that text must not spell: llama.cpp's converter marks them so as well.
_LOOKS_CONTROL = re.compile(r"<mask>|<2mass>|\[@BOS@\]|<unused\d+>|<(?:start|end)_of_turn>")

_PREFIX = "tokenizer.ggml."
# Keys that say how text is split, and the values that mean what Gemma 2's tokenizer does.
_FIXED: dict[str, tuple] = {
    "model": ("llama",),
    "pre": ("default", None),
    "add_space_prefix": (False,),
    "remove_extra_whitespaces": (False, None),
    "precompiled_charsmap": (None,),
}
# Keys that say nothing about it.
_HARMLESS = re.compile(r"(\w+_token_id|add_(bos|eos|sep)_token|tokens|scores|token_type|token_type_count|merges)")

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = (message['content'] | trim) + '\n\n' %}{% else %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + ns.system"
    " + (message['content'] | trim) + '<end_of_turn>\n' }}{% set ns.system = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_OLLAMA_TEMPLATE = (
    "<start_of_turn>user\n{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}<end_of_turn>\n"
    "<start_of_turn>model\n{{ .Response }}<end_of_turn>\n"
)


class Vocabulary:
    """A SentencePiece model, and what a GGUF file keeps of it.

    Args:
        proto: bytes of the model.
        rows: of the embedding table. Where it has more than there are pieces, made-up ones stand for the others.
        stop_token_ids: ids that end a text; `None` for `<eos>` and, where there is one, `<end_of_turn>`.

    Raises:
        ValueError: if `proto` is no model of Gemma's kind, has more pieces than `rows`, or `stop_token_ids` are not
            `<eos>` and at most one more.
    """

    def __init__(self, proto: bytes, rows: int, stop_token_ids: Sequence[int] | None) -> None:
        model = parse_model(proto)
        self._ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
        missing = [name for name in SPECIAL.values() if name not in self._ids]
        if missing:
            raise ValueError(f"`proto` is no Gemma vocabulary: it lacks {', '.join(missing)}.")
        if len(model.pieces) > rows:
            raise ValueError(f"`proto` has {len(model.pieces)} pieces, more than the {rows} rows of the embedding.")
        self.has_turns = {"<start_of_turn>", "<end_of_turn>"} <= set(self._ids)
        end = self._ids["<eos>"]
        if stop_token_ids is None:
            stop_token_ids = [end, self._ids["<end_of_turn>"]] if self.has_turns else [end]
        others = sorted(set(stop_token_ids) - {end})
        if end not in stop_token_ids or len(others) > 1 or not all(0 <= i < len(model.pieces) for i in others):
            raise ValueError(
                f"`stop_token_ids` must be {end}, which is <eos>, and at most one other id of the vocabulary: a GGUF "
                f"file has room for no more; given {list(stop_token_ids)}."
            )
        self._end_of_turn = others[0] if others else None
        self._pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
        self._pieces += [(f"[PAD{i}]", -1000.0, UNUSED) for i in range(len(self._pieces), rows)]

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys to a file."""
        kinds = [CONTROL if _LOOKS_CONTROL.fullmatch(piece) else kind for piece, _, kind in self._pieces]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        # llama.cpp looks for pieces that users define in the text as it is.
        writer.add_token_list(
            [
                piece.replace(SPACE_MARK, " ") if kind == USER_DEFINED else piece
                for (piece, _, _), kind in zip(self._pieces, kinds, strict=True)
            ]
        )
        writer.add_token_scores([score for _, score, _ in self._pieces])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(self._ids["<bos>"])
        writer.add_eos_token_id(self._ids["<eos>"])
        writer.add_unk_token_id(self._ids["<unk>"])
        writer.add_pad_token_id(self._ids["<pad>"])
        if self._end_of_turn is not None:
            writer.add_eot_token_id(self._end_of_turn)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(False)
        if self.has_turns:
            writer.add_chat_template(_CHAT_TEMPLATE)

    def modelfile(self, name: str) -> str:
        """What tells Ollama how to run the file of that name, which lies in the same folder."""
        template = _OLLAMA_TEMPLATE if self.has_turns else "{{ .Prompt }}"
        lines = [MODELFILE_MARK, f"FROM ./{name}", f'TEMPLATE """{template}"""']
        if self._end_of_turn is not None:
            lines.append(f'PARAMETER stop "{self._pieces[self._end_of_turn][0]}"')
        return "\n".join(lines) + "\n"


def find_stop_token_ids(keys: Mapping[str, Any], rows: int) -> tuple[int, ...]:
    """The ids that end a text, as a file has them: of the end of a text, and of a turn.

    Raises:
        CheckpointError: if one is no id of the vocabulary.
    """
    ids = []
    for key in (f"{_PREFIX}eos_token_id", f"{_PREFIX}eot_token_id"):
        if key in keys:
            if not isinstance(keys[key], np.integer) or not 0 <= keys[key] < rows:
                raise CheckpointError(f"`{key}` is {shown(keys[key])}; ids lie between 0 and {rows - 1}.")
            ids.append(int(keys[key]))
    return tuple(dict.fromkeys(ids))


def describes_tokenizer(keys: Mapping[str, Any]) -> bool:
    """Whether there is a tokenizer among the keys of a file, of whatever kind."""
    return keys.get(f"{_PREFIX}model", "none") != "none"


def sentencepiece_model(keys: Mapping[str, Any], rows: int) -> bytes | None:
    """A SentencePiece model that splits text as the file's tokenizer does; `None` where the file has none.

    Args:
        keys: of the file.
        rows: of the embedding table.

    Raises:
        CheckpointError: if the tokenizer is of another kind than Gemma's, or its keys do not fit each other.
    """
    if not describes_tokenizer(keys):
        return None
    _require_gemma(keys)
    pieces = _pieces(keys, rows)
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    for name, piece in SPECIAL.items():
        key = f"{_PREFIX}{name}_token_id"
        if piece not in ids or keys.get(key, ids[piece]) != ids[piece]:
            raise CheckpointError(
                f"`{key}` is {shown(keys.get(key))}, and the piece {piece} has id {ids.get(piece)}: this is no Gemma "
                "vocabulary."
            )
    return make_model(pieces)


def _require_gemma(keys: Mapping[str, Any]) -> None:
    for key, allowed in _FIXED.items():
        value = keys.get(f"{_PREFIX}{key}")
        if not (isinstance(value, str | np.bool_) or value is None) or value not in allowed:
            either = " or ".join("absent" if one is None else repr(one) for one in allowed)
            raise CheckpointError(f"`{_PREFIX}{key}` is {shown(value)}; Gemma 2's tokenizer has {either}.")
    for key in keys:
        name = key.removeprefix(_PREFIX)
        if name != key and name not in _FIXED and not _HARMLESS.fullmatch(name):
            raise CheckpointError(f"The file has {shown(key)}, unknown here: it could change how text is split.")


def _pieces(keys: Mapping[str, Any], rows: int) -> list[tuple[str, float, int]]:
    """Text, score and kind of each piece, as SentencePiece has them."""
    tokens, scores, kinds = (keys.get(f"{_PREFIX}{name}") for name in ("tokens", "scores", "token_type"))
    if not isinstance(tokens, list) or len(tokens) != rows:
        raise CheckpointError(f"`{_PREFIX}tokens` is {shown(tokens)}; the embedding has {rows} rows.")
    if not isinstance(scores, np.ndarray) or scores.dtype != np.float32 or scores.shape != (rows,):
        raise CheckpointError(f"`{_PREFIX}scores` is {shown(scores)}; it must be {rows} float32.")
    if not isinstance(kinds, np.ndarray) or kinds.dtype.kind not in "iu" or kinds.shape != (rows,):
        raise CheckpointError(f"`{_PREFIX}token_type` is {shown(kinds)}; it must be {rows} whole numbers.")
    if not np.isfinite(scores).all() or not np.isin(kinds, _KINDS).all():
        raise CheckpointError(f"`{_PREFIX}scores` or `{_PREFIX}token_type` has numbers that mean nothing.")
    while rows and kinds[rows - 1] == UNUSED and tokens[rows - 1] == f"[PAD{rows - 1}]":
        rows -= 1
    pieces = []
    for token, score, kind in zip(tokens[:rows], scores.tolist(), kinds.tolist(), strict=False):
        if token == "<unk>":
            kind = UNKNOWN
        elif kind == CONTROL and token not in SPECIAL.values():
            kind = USER_DEFINED
        if kind == USER_DEFINED:
            token = token.replace(" ", SPACE_MARK)
        pieces.append((token, score, kind))
    return pieces
