"""How surprised a model is by given texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from gemma2_keras.errors import InputError
from gemma2_keras.generation import engine
from gemma2_keras.generation.programs import Engine
from gemma2_keras.generation.reading import read
from gemma2_keras.preprocessing.causal_lm_preprocessor import EncodedExample


class _Window(NamedTuple):
    """A stretch of an example that the model reads as a row.

    Attributes:
        example: number of the example.
        token_ids: what is read.
        labels: (n,) int32 array, the next tokens.
        counted: (n,) bool array, which of them count in this window.
    """

    example: int
    token_ids: np.ndarray
    labels: np.ndarray
    counted: np.ndarray


def examples_of_text(preprocessor: Any, texts: Any) -> tuple[list[EncodedExample], bool]:
    """Texts as they are read here, without the end token that training puts behind them; and whether it is one."""
    examples, single = preprocessor.encode_examples(texts)
    end = preprocessor.tokenizer.end_token_id if preprocessor.add_end_token else None

    def shortened(example: EncodedExample) -> EncodedExample:
        cut = len(example.token_ids) - (example.token_ids[-1] == end)
        return EncodedExample(example.token_ids[:cut], example.counted[:cut])

    return [shortened(example) for example in examples], single


def examples_of_tokens(inputs: dict[str, Any]) -> list[EncodedExample]:
    """The rows of `{"token_ids": (B, L), "padding_mask": (B, L)}`, of which everything counts.

    Raises:
        InputError: if a row holds several examples.
    """
    token_ids, mask = (ops.convert_to_numpy(inputs[name]) for name in ("token_ids", "padding_mask"))
    if mask.max() > 1:
        raise InputError(
            "`padding_mask` must be 1 at tokens and 0 at padding here: a row with several examples has no perplexity."
        )
    rows = [row[real].tolist() for row, real in zip(token_ids, mask.astype(bool), strict=True)]
    return [EncodedExample(row, [True] * len(row)) for row in rows]


def perplexities(
    programs: Engine,
    examples: Sequence[EncodedExample],
    start_token_id: int | None,
    stride: int | None,
    verbose: Any,
) -> np.ndarray:
    """(N,) float64 perplexities of N examples.

    Args:
        programs: the model's engine.
        examples: tokens, and which of them count.
        start_token_id: what every window begins with, of an example that does; `None` if it is not known.
        stride: from one window of a long example to the next; `None` is half the context.
        verbose: 1 shows a progress bar, 0 none; "auto" shows one for more tokens than are run at once.

    Raises:
        InputError: if an example has nothing that counts, or `stride` is not from 1 to the context.
    """
    context = programs.backbone.config.context_length
    stride = max(1, context // 2) if stride is None else stride
    if isinstance(stride, bool) or not isinstance(stride, int | np.integer) or not 1 <= stride <= context:
        raise InputError(
            f"`stride` must be a whole number from 1 to the model's context of {context} tokens, or None; given "
            f"{stride!r}."
        )
    windows = []
    for number, example in enumerate(examples):
        # A first token that counts has nothing before it to be expected from.
        if not any(example.counted[1:]):
            raise InputError(
                f"Text {number} has no token to be expected from one before it: its {len(example.token_ids)} token"
                f"{'' if len(example.token_ids) == 1 else 's'} can have no perplexity."
            )
        found = _windows(number, example, start_token_id, context, int(stride))
        windows += [window for window in found if window.counted.any()]
    owners = np.repeat([window.example for window in windows], [len(window.token_ids) for window in windows])
    labels, counted = (np.concatenate([window[field] for window in windows]) for field in (2, 3))
    first = np.cumsum([0, *(len(window.token_ids) for window in windows)])
    total = int(first[-1])
    shown = verbose == 1 or (verbose == "auto" and total > engine.CHUNK)
    progress = keras.utils.Progbar(total, unit_name="token") if shown else None
    surprise, counts = np.zeros((2, len(examples)))
    for states, rows, places in read(programs, [window.token_ids for window in windows]):
        tokens = first[rows] + places
        expected = np.zeros(states.shape[0], "int32")
        expected[: len(tokens)] = labels[tokens]
        found = ops.convert_to_numpy(programs.surprise(states, expected))[: len(tokens)]
        np.add.at(surprise, owners[tokens], found * counted[tokens])
        np.add.at(counts, owners[tokens], counted[tokens])
        if progress is not None:
            progress.add(len(tokens))
    return np.exp(surprise / counts)


def _windows(
    number: int, example: EncodedExample, start_token_id: int | None, context: int, stride: int
) -> list[_Window]:
    """An example as it is read: whole, or in windows of the context's length."""
    token_ids, counted = np.asarray(example.token_ids, "int32"), np.asarray(example.counted, bool)
    inputs, labels, counted = token_ids[:-1], token_ids[1:], counted[1:]
    windows, scored = [], 0
    for start in range(0, len(inputs), stride):
        here = slice(start, min(len(inputs), start + context))
        read_here = inputs[here].copy()
        if inputs[0] == start_token_id:
            read_here[0] = start_token_id
        new = np.arange(here.start, here.stop) >= scored
        windows.append(_Window(number, read_here, labels[here], counted[here] & new))
        scored = here.stop
        if scored == len(inputs):
            break
    return windows
