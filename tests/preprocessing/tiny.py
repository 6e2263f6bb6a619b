"""A tokenizer and models small enough to be made anew in a test."""

from __future__ import annotations

import functools

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer
from tools.train_tokenizer import train_tokenizer

TEXTS = [
    "The cat sat on the mat, and the dog sat on the log by the old house.",
    "Once upon a time there was a kind girl who lived in a small house by the sea.",
    "Question: What colour is the sky?\nAnswer: The sky is blue.\n\n7 + 5 = 12",
]
VOCABULARY_SIZE = 560
# No two sizes coincide, the query heads' width is not the hidden one, and the window is shorter than the examples.
ARCHITECTURE = {
    "vocabulary_size": VOCABULARY_SIZE,
    "num_layers": 3,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 24,
    "intermediate_dim": 40,
    "head_dim": 8,
    "query_pre_attention_scalar": 10,
    "sliding_window_size": 6,
    "context_length": 96,
}


@functools.cache
def proto() -> bytes:
    """A SentencePiece model with Gemma's first 473 pieces."""
    return train_tokenizer(TEXTS, VOCABULARY_SIZE)


def tokenizer(**kwargs) -> Gemma2Tokenizer:
    return Gemma2Tokenizer(proto(), **kwargs)


def preprocessor(**kwargs) -> Gemma2CausalLMPreprocessor:
    return Gemma2CausalLMPreprocessor(tokenizer(), **{"sequence_length": 16, **kwargs})


def backbone(**kwargs) -> Gemma2Backbone:
    return Gemma2Backbone(**{**ARCHITECTURE, **kwargs})


def causal_lm(sequence_length: int = 16, **kwargs) -> Gemma2CausalLM:
    return Gemma2CausalLM(backbone(**kwargs), preprocessor(sequence_length=sequence_length))
