"""The SentencePiece model of a tokenizer, as the formats of other programs need it: piece by piece."""

from __future__ import annotations

from typing import Any

from sentencepiece import sentencepiece_model_pb2


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
