"""Model shapes and prompts that every contender is given. Imports nothing of theirs."""

from __future__ import annotations

import random

# In the words of `Gemma2Config`.
SHAPES = {
    "mini": {
        "vocabulary_size": 32000,
        "num_layers": 8,
        "num_query_heads": 8,
        "num_key_value_heads": 4,
        "hidden_dim": 512,
        "intermediate_dim": 2048,
        "head_dim": 64,
        "sliding_window_size": 256,
    },
    # The mini shape's like with the whole vocabulary, which is what training is spent on.
    "wide": {
        "vocabulary_size": 256000,
        "num_layers": 6,
        "num_query_heads": 8,
        "num_key_value_heads": 4,
        "hidden_dim": 512,
        "intermediate_dim": 2048,
        "head_dim": 64,
        "sliding_window_size": 256,
    },
    "2b": {
        "vocabulary_size": 256000,
        "num_layers": 26,
        "num_query_heads": 8,
        "num_key_value_heads": 4,
        "hidden_dim": 2304,
        "intermediate_dim": 9216,
        "head_dim": 256,
        "sliding_window_size": 4096,
    },
}
# Prompt lengths of the ragged batch, and (prompt length, new tokens) of the calls that a session of work makes.
RAGGED = (20, 45, 80, 130, 190, 250, 330, 400)
CALLS = tuple((5 + 17 * i % 290, 6 + 5 * i % 23) for i in range(20))


def prompts(lengths: tuple[int, ...], vocabulary_size: int) -> list[list[int]]:
    """Random token ids, the same in every process."""
    draw = random.Random(0)
    return [[draw.randrange(300, min(vocabulary_size, 30000)) for _ in range(length)] for length in lengths]
