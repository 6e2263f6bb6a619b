"""The tokenizer's files that transformers reads, made from the SentencePiece model without that library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma2_keras.checkpoints.saving import write_json
from gemma2_keras.checkpoints.transformers import TOKENIZER_FILE
from gemma2_keras.checkpoints.vocabulary import parse_model

TOKENIZER_JSON_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

_SPACE_MARK = "\u2581"
# Turns and roles as Gemma 2 was taught them. Its weights know no system role; a system message comes before the first
# user message, as in our own conversations.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (system if loop.first else '') + message['content'] | trim "
    "+ '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`.

    With them transformers gives the ids that `tokenizer.encode(text, parse_special=True)` gives, with `<bos>` before,
    for any text without U+2581, the character that stands for a space.

    Args:
        folder: an existing folder.
        tokenizer: a `Gemma2Tokenizer`.
    """
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.proto)
    text = json.dumps(describe_tokenizer(tokenizer), ensure_ascii=False, separators=(",", ":"))
    (folder / TOKENIZER_JSON_FILE).write_text(text, encoding="utf-8")
    pieces = {"pad": tokenizer.pad_token_id, "eos": tokenizer.end_token_id, "bos": tokenizer.start_token_id}
    config = {f"{name}_token": tokenizer.id_to_token(i) for name, i in pieces.items()}
    config |= {
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": tokenizer.id_to_token(tokenizer.unk_token_id),
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.start_of_turn_id is not None and tokenizer.end_of_turn_id is not None:
        config["chat_template"] = CHAT_TEMPLATE
    write_json(folder / TOKENIZER_CONFIG_FILE, config)


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What `tokenizer.json` holds: the vocabulary, the order in which its pieces are put together, and what is whole.

    >>> from gemma2_keras import Gemma2Tokenizer
    >>> described = describe_tokenizer(Gemma2Tokenizer.from_preset("gemma2_tiny_en"))
    >>> described["model"]["vocab"]["<end_of_turn>"], described["model"]["type"]
    (107, 'BPE')
    """
    model = parse_model(tokenizer.proto)
    kinds, normal = type(model.pieces[0]), []
    control = set(tokenizer.special_token_ids)
    added = []
    for i, piece in enumerate(model.pieces):
        if piece.type == kinds.NORMAL:
            normal.append(piece)
        elif i in control or piece.type == kinds.USER_DEFINED:
            added.append(
                {
                    "id": i,
                    "content": piece.piece,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    # Pieces of spaces are looked for once these have become marks.
                    "normalized": _SPACE_MARK in piece.piece,
                    "special": i in control,
                }
            )
    start = tokenizer.id_to_token(tokenizer.start_token_id)
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    begin, again = ({"SpecialToken": {"id": start, "type_id": i}} for i in range(2))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_MARK},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, again, second],
            "special_tokens": {start: {"id": start, "ids": [tokenizer.start_token_id], "tokens": [start]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.id_to_token(tokenizer.unk_token_id),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: i for i, piece in enumerate(model.pieces)},
            "merges": _merges(normal),
        },
    }


def _merges(pieces: list[Any]) -> list[list[str]]:
    """The pairs of pieces that become a piece, those first that SentencePiece puts together first.

    Args:
        pieces: the ordinary ones, each with its score.
    """
    rank = {piece.piece: i for i, piece in enumerate(pieces)}
    merges = []
    # The best score first; Python keeps the order of equal ones.
    for piece in sorted(pieces, key=lambda piece: -piece.score):
        text = piece.piece
        pairs = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in rank and text[i:] in rank]
        merges += sorted(pairs, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return [list(pair) for pair in merges]
