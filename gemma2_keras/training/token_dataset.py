"""Tokenized examples in batches, in an order that can be found again."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


class TokenDataset(keras.utils.PyDataset):
    """Tokenized examples for `fit`, in batches of one size, shuffled anew in each epoch.

    The order depends on the seed and the number of the epoch alone, so that a run that was interrupted goes on where
    it was: `start_at(epoch, step)`. If the last batch would be smaller, it is filled up with examples of weight 0.

    Args:
        x: `{"token_ids": (N, T) int32, "padding_mask": (N, T)}` arrays.
        y: (N, T) int32 array, the next tokens.
        sample_weight: (N, T) float32 array, 0 where a label does not count.
        batch_size: examples in a batch.
        shuffle: whether epochs are shuffled.
        seed: of the shuffling.

    Example:

    >>> x = {"token_ids": np.arange(6).reshape(3, 2), "padding_mask": np.ones((3, 2), "int32")}
    >>> dataset = TokenDataset(x, x["token_ids"] + 1, np.ones((3, 2), "float32"), batch_size=2, shuffle=False)
    >>> dataset.num_batches, dataset[1][2].tolist()
    (2, [[1.0, 1.0], [0.0, 0.0]])
    """

    def __init__(
        self,
        x: dict[str, np.ndarray],
        y: np.ndarray,
        sample_weight: np.ndarray,
        batch_size: int = 8,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.x, self.y, self.sample_weight = x, y, sample_weight
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self._first = 0
        self.start_at(0)

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.y)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a whole epoch."""
        return -(-len(self) // self.batch_size)

    @property
    def num_batches(self) -> int:
        """Batches that the current epoch still has."""
        return self.batches_per_epoch - self._first

    def start_at(self, epoch: int, step: int = 0) -> None:
        """Go to an epoch, counted from 0, past its first `step` batches."""
        self._epoch, self._first = epoch, step
        order = np.arange(len(self))
        self._order = np.random.default_rng([self.seed, epoch]).permutation(order) if self.shuffle else order

    def on_epoch_end(self) -> None:
        """Go to the next epoch."""
        self.start_at(self._epoch + 1)

    def __getitem__(self, index: int) -> Any:
        """One batch `(x, y, sample_weight)` of what the current epoch still has."""
        start = (self._first + index) * self.batch_size
        rows = self._order[start : start + self.batch_size]
        weight = self.sample_weight[rows]
        if missing := self.batch_size - len(rows):
            weight = np.concatenate([weight, np.zeros((missing, *weight.shape[1:]), weight.dtype)])
            rows = np.concatenate([rows, np.full(missing, rows[0])])
        return {name: array[rows] for name, array in self.x.items()}, self.y[rows], weight
