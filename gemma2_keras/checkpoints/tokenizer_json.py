"""`tokenizer.json`, in which transformers keeps a tokenizer: made from a SentencePiece model, and made into one."""

from __future__ import annotations

import re
from typing import Any

from gemma2_keras.checkpoints.guard import shown, some
from gemma2_keras.checkpoints.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE_MARK,
    SPECIAL,
    UNKNOWN,
    USER_DEFINED,
    make_model,
    parse_model,
)
from gemma2_keras.errors import CheckpointError

TOKENIZER_JSON_FILE = "tokenizer.json"

# How Gemma's tokenizers split text, in the words of the file.
_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
_PRE_TOKENIZER = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
_MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": SPECIAL["unknown"],
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": True,
    "ignore_merges": False,
}
# Keys of the file that say nothing about how text is split: its version, what is done to batches, and which tokens are
# put around a text, which is the preprocessor's.
_HARMLESS = {"version", "truncation", "padding", "post_processor"}
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


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
                    "normalized": SPACE_MARK in piece.piece,
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
        "normalizer": _NORMALIZER,
        "pre_tokenizer": _PRE_TOKENIZER,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, again, second],
            "special_tokens": {start: {"id": start, "ids": [tokenizer.start_token_id], "tokens": [start]}},
        },
        "decoder": _DECODER,
        "model": {
            **_MODEL,
            "vocab": {piece.piece: i for i, piece in enumerate(model.pieces)},
            "merges": _merges({piece.piece: piece.score for piece in normal}),
        },
    }


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """The pairs of pieces that become a piece, those first that SentencePiece puts together first.

    Args:
        scores: of the ordinary pieces, in the order of their ids.
    """
    rank = {piece: i for i, piece in enumerate(scores)}
    merges = []
    # The best score first; Python keeps the order of equal ones.
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in rank and piece[i:] in rank]
        merges += sorted(pairs, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return [list(pair) for pair in merges]


def sentencepiece_model(file: dict[str, Any]) -> bytes:
    """A SentencePiece model that splits text as a `tokenizer.json` of Gemma's says.

    Args:
        file: what it holds.

    Raises:
        CheckpointError: if it splits text in a way that no SentencePiece model does, or contradicts itself.
    """
    model = _require_gemma(file)
    added = _added(file.get("added_tokens", []))
    kinds = {piece: _kind(piece, added) for piece in _pieces(model.get("vocab"), added)}
    scores = _scores(model.get("merges"), [piece for piece, kind in kinds.items() if kind == NORMAL])
    return make_model([(piece, scores.get(piece, 0.0), kind) for piece, kind in kinds.items()])


def _require_gemma(file: dict[str, Any]) -> dict[str, Any]:
    """What stands under `model`, once all that says how text is split says what Gemma's tokenizers do."""
    model = file.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"`model` in {TOKENIZER_JSON_FILE} is {shown(model)}; it must be an object.")
    allowed = {
        "normalizer": (_NORMALIZER,),
        # Spaces have become marks before it looks for them: with it or without, nothing is split.
        "pre_tokenizer": (_PRE_TOKENIZER, None),
        "decoder": (_DECODER,),
    }
    for key, values in allowed.items():
        if file.get(key) not in values:
            raise _unlike(key, file.get(key))
    for key, value in _MODEL.items():
        # Files of earlier versions lack some keys, and have empty texts for none.
        if model.get(key, value) != value and not (value is None and model[key] == ""):
            raise _unlike(f"model.{key}", model[key])
    unknown = (file.keys() - allowed.keys() - _HARMLESS - {"model", "added_tokens"}) | (
        model.keys() - _MODEL.keys() - {"vocab", "merges"}
    )
    if unknown:
        raise CheckpointError(
            f"{TOKENIZER_JSON_FILE} has {some(unknown)}, unknown here: it could change how text is split."
        )
    return model


def _unlike(key: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"`{key}` in {TOKENIZER_JSON_FILE} is {shown(value)}, which no Gemma 2 tokenizer has: text would be split in "
        "another way. Put the `tokenizer.model` of the model beside it."
    )


def _added(tokens: Any) -> dict[str, int]:
    """The ids of the tokens that are found in a text before it is split, by their content."""
    if not isinstance(tokens, list):
        raise CheckpointError(f"`added_tokens` in {TOKENIZER_JSON_FILE} is {shown(tokens)}; it must be a list.")
    added = {}
    for token in tokens:
        content, i = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(content, str) or not content or type(i) is not int:
            raise CheckpointError(f"`added_tokens` in {TOKENIZER_JSON_FILE} has {shown(token)}, which is no token.")
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag, False) is not False:
                raise CheckpointError(
                    f"The token {shown(content)} in {TOKENIZER_JSON_FILE} has `{flag}`, which is not implemented."
                )
        content = content.replace(" ", SPACE_MARK)
        if added.setdefault(content, i) != i:
            raise CheckpointError(f"The token {shown(content)} in {TOKENIZER_JSON_FILE} has two ids.")
    return added


def _pieces(vocabulary: Any, added: dict[str, int]) -> list[str]:
    """All pieces in the order of their ids, those that were added to a vocabulary behind it."""
    if not isinstance(vocabulary, dict) or not all(type(i) is int for i in vocabulary.values()):
        raise CheckpointError(f"`vocab` in {TOKENIZER_JSON_FILE} must be an object of ids.")
    both = vocabulary | added
    for piece in vocabulary.keys() & added.keys():
        if vocabulary[piece] != added[piece]:
            raise CheckpointError(f"The token {shown(piece)} in {TOKENIZER_JSON_FILE} has two ids.")
    pieces = sorted(both, key=both.__getitem__)
    if [both[piece] for piece in pieces] != list(range(len(pieces))):
        raise CheckpointError(f"The ids in {TOKENIZER_JSON_FILE} are not 0 to {len(pieces) - 1}, each once.")
    return pieces


def _kind(piece: str, added: dict[str, int]) -> int:
    if piece == SPECIAL["unknown"]:
        return UNKNOWN
    if piece in SPECIAL.values():
        return CONTROL
    if piece in added:
        return USER_DEFINED
    return BYTE if _BYTE_PIECE.fullmatch(piece) else NORMAL


def _scores(merges: Any, normal: list[str]) -> dict[str, float]:
    """The scores by which SentencePiece puts pieces together in the order of the file's pairs.

    Args:
        merges: pairs of pieces, those first that are put together first; in the first versions of the file with a
            space between.
        normal: the ordinary pieces, in the order of their ids. Pairs of others never meet: those are found before.
    """
    if not isinstance(merges, list):
        raise CheckpointError(f"`merges` in {TOKENIZER_JSON_FILE} is {shown(merges)}; it must be a list.")
    ordinary, given, order = set(normal), set(), {}
    last = None
    for merge in merges:
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) if isinstance(merge, list) else ()
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise CheckpointError(f"`merges` in {TOKENIZER_JSON_FILE} has {shown(merge)}, which is no pair of pieces.")
        piece = "".join(pair)
        if not ordinary.issuperset((piece, *pair)):
            continue
        if piece != last and piece in order:
            raise _not_by_pieces(piece)
        order[piece] = last = piece
        given.add(pair)
    scores = {piece: -float(i) for i, piece in enumerate(order)}
    # What no pair makes is never looked for.
    scores |= {piece: -float(i) for i, piece in enumerate((p for p in normal if p not in scores), len(scores))}
    for pair in _merges({piece: scores[piece] for piece in normal}):
        if tuple(pair) not in given:
            raise _not_by_pieces("".join(pair))
    return scores


def _not_by_pieces(piece: str) -> CheckpointError:
    return CheckpointError(
        f"The pairs in {TOKENIZER_JSON_FILE} that make {shown(piece)} are not those of a SentencePiece model, which "
        "puts pieces together by their scores. Put the `tokenizer.model` of the model beside it."
    )
