"""GGUF files put together byte by byte, so that each can be wrong in one place."""

from __future__ import annotations

import struct
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
TYPE_F32, TYPE_F16, TYPE_Q8_0, TYPE_BF16 = 0, 1, 8, 30


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def packed(type_: int, value: Any) -> bytes:
    """A value without its type; of an array (type of its elements, elements)."""
    if type_ == STRING:
        return text(value)
    if type_ == ARRAY:
        inner, elements = value
        return struct.pack("<IQ", inner, len(elements)) + b"".join(packed(inner, element) for element in elements)
    return struct.pack(f"<{_FORMATS[type_]}", value) if type_ in _FORMATS else value


def tensor(name: str, shape: tuple[int, ...], type_: int = TYPE_F32, size: int | None = None) -> dict[str, Any]:
    numbers = 1
    for dimension in shape:
        numbers *= dimension
    width = 4 if type_ == TYPE_F32 else 2
    return {"name": name, "shape": shape, "type": type_, "data": bytes(numbers * width if size is None else size)}


def whole(
    keys: list[tuple[str | bytes, int, Any]],
    tensors: list[dict[str, Any]],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    key_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file; a tensor's `offset` is where it belongs unless it says otherwise."""
    header = magic + struct.pack("<I", version)
    header += struct.pack("<Q", len(tensors) if tensor_count is None else tensor_count)
    header += struct.pack("<Q", len(keys) if key_count is None else key_count)
    for key, type_, value in keys:
        header += text(key) + struct.pack("<I", type_) + packed(type_, value)
    data = b""
    for entry in tensors:
        header += text(entry["name"]) + struct.pack("<I", entry.get("dimensions", len(entry["shape"])))
        header += b"".join(struct.pack("<Q", dimension) for dimension in reversed(entry["shape"]))
        header += struct.pack("<IQ", entry["type"], entry.get("offset", len(data)))
        data += entry["data"] + bytes(-len(entry["data"]) % alignment)
    return header + bytes(-len(header) % alignment) + data


def smallest_keys() -> list[tuple[str, int, Any]]:
    """The keys of the smallest Gemma 2."""
    numbers = {
        "context_length": 16,
        "embedding_length": 6,
        "block_count": 1,
        "feed_forward_length": 5,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 4,
        "attention.value_length": 4,
        "attention.sliding_window": 3,
    }
    return [
        ("general.architecture", STRING, "gemma2"),
        *((f"gemma2.{key}", U32, value) for key, value in numbers.items()),
        ("gemma2.attention.layer_norm_rms_epsilon", F32, 1e-6),
        ("gemma2.attn_logit_softcapping", F32, 50.0),
        ("gemma2.final_logit_softcapping", F32, 30.0),
    ]


def smallest_tensors() -> list[dict[str, Any]]:
    """Its tensors, all zero: the norms' weights are -1."""
    shapes = {
        "attn_norm": (6,),
        "attn_q": (8, 6),
        "attn_k": (4, 6),
        "attn_v": (4, 6),
        "attn_output": (6, 8),
        "post_attention_norm": (6,),
        "ffn_norm": (6,),
        "ffn_gate": (5, 6),
        "ffn_up": (5, 6),
        "ffn_down": (6, 5),
        "post_ffw_norm": (6,),
    }
    return [
        tensor("token_embd.weight", (7, 6)),
        tensor("output_norm.weight", (6,)),
        *(tensor(f"blk.0.{name}.weight", shape) for name, shape in shapes.items()),
    ]
