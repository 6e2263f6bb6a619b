"""AdamW with the schedule that most fine-tuning uses."""

from __future__ import annotations

import math
import numbers
from typing import Any

import keras

from gemma2_keras.errors import InputError
from gemma2_keras.training.token_dataset import TokenDataset


def adamw(
    data: TokenDataset,
    *,
    epochs: int = 1,
    learning_rate: float = 1e-4,
    warmup: float = 0.05,
    end: float = 0.1,
    **kwargs: Any,
) -> keras.optimizers.AdamW:
    """AdamW whose learning rate rises in a line, then falls along a cosine, over all steps of the data.

    Args:
        data: what is trained on.
        epochs: how many times.
        learning_rate: the highest, after the warm-up.
        warmup: share of the steps in which the rate rises, from 0 to below 1.
        end: share of the rate that is left at the end, from 0 to 1.
        **kwargs: as `keras.optimizers.AdamW` takes them, such as `weight_decay`, `global_clipnorm=1.0` and
            `gradient_accumulation_steps`; steps that only accumulate count as steps.

    Raises:
        InputError: if `epochs`, `learning_rate`, `warmup` or `end` is out of its range.

    Example:

    >>> import numpy as np
    >>> x = {"token_ids": np.ones((10, 8), "int32"), "padding_mask": np.ones((10, 8), "int32")}
    >>> data = TokenDataset(x, x["token_ids"], np.ones((10, 8), "float32"), batch_size=1)
    >>> optimizer = adamw(data, epochs=2, learning_rate=1e-3, warmup=0.1, global_clipnorm=1.0)
    >>> [round(float(optimizer.get_config()["learning_rate"]["config"][name]), 4) for name in ("warmup_steps",)]
    [2.0]

    Source: AdamW (https://arxiv.org/abs/1711.05101), cosine schedule (https://arxiv.org/abs/1608.03983).
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise InputError(f"`epochs` must be a whole number of at least 1; given {epochs!r}.")
    for name, value in (("learning_rate", learning_rate), ("warmup", warmup), ("end", end)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise InputError(f"`{name}` must be a number; given {value!r}.")
    if not 0 < learning_rate < math.inf:
        raise InputError(f"`learning_rate` must be above 0 and finite; given {learning_rate!r}.")
    if not 0 <= warmup < 1:
        raise InputError(f"`warmup` must be at least 0 and below 1; given {warmup!r}.")
    if not 0 <= end <= 1:
        raise InputError(f"`end` must be from 0 to 1; given {end!r}.")
    steps = data.batches_per_epoch * epochs
    rising = round(steps * warmup)
    schedule = keras.optimizers.schedules.CosineDecay(
        # Not 0, with which the first step would do nothing.
        learning_rate / (rising + 1),
        max(1, steps - rising),
        alpha=end,
        warmup_target=learning_rate if rising else None,
        warmup_steps=rising,
    )
    return keras.optimizers.AdamW(schedule, **kwargs)
