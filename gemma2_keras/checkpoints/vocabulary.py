"""The SentencePiece model of a tokenizer, as the formats of other programs need it: piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from gemma2_keras.errors import CheckpointError

# The kinds of pieces, as SentencePiece numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# The pieces that every Gemma vocabulary has, by what they are for.
SPECIAL = {"bos": "<bos>", "eos": "<eos>", "unknown": "<unk>", "padding": "<pad>"}
SPACE_MARK = "\u2581"


def parse_model(proto: bytes) -> Any:
    """The pieces, scores and rules of a SentencePiece model, whose way to split text other programs know.

    Args:
        proto: its bytes.

    Raises:
        ValueError: if it is none, or splits text in another way than Gemma's.
    """
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(proto)
    except Exception as error:
        # What protobuf raises differs between its implementations.
        raise ValueError(f"`proto` is not a SentencePiece model ({len(proto)} bytes).") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    same = (
        trainer.model_type == trainer.BPE
        and trainer.byte_fallback
        and not trainer.treat_whitespace_as_suffix
        and not normalizer.precompiled_charsmap
        and not normalizer.add_dummy_prefix
        and not normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
    )
    if not same:
        raise ValueError(
            "`proto` is no Gemma vocabulary: those are BPE with byte fallback, and change nothing in the text before "
            "they split it. Other programs would split it in another way."
        )
    return model


def make_model(pieces: Sequence[tuple[str, float, int]]) -> bytes:
    """The bytes of a SentencePiece model that splits text as Gemma's do.

    Args:
        pieces: text, score and kind of each, in the order of their ids; those of `SPECIAL` among them.

    Raises:
        CheckpointError: if a piece stands twice, lacks, or is no text.
    """
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    missing = [piece for piece in SPECIAL.values() if piece not in ids]
    if missing:
        raise CheckpointError(f"The vocabulary has no {', '.join(missing)}: this is no Gemma vocabulary.")
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        for piece, score, kind in pieces:
            model.pieces.add(piece=piece, score=score, type=kind)
    except UnicodeEncodeError as error:
        raise CheckpointError(f"The vocabulary has a token that is no text: {error.reason}.") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(pieces)
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = (
        ids[piece] for piece in ("<pad>", "<eos>", "<bos>", "<unk>")
    )
    trainer.pad_piece, trainer.eos_piece, trainer.bos_piece, trainer.unk_piece = "<pad>", "<eos>", "<bos>", "<unk>"
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", False, False
    proto = model.SerializeToString()
    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(proto)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError("The tokens make no SentencePiece model: some stand twice, or lack.") from error
    return proto
