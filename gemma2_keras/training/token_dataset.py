"""Tokenized examples in batches, in an order that can be found again."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import keras
import numpy as np

from gemma2_keras.errors import InputError

_HASHED_BYTES = 2**24


class TokenDataset(keras.utils.PyDataset):
    """Tokenized examples for `fit`, in batches of one size, shuffled anew in each epoch.

    The order depends on the seed and the number of the epoch alone, so that a run that was interrupted goes on where
    it was: `start_at(epoch, step)`. If the last batch would be smaller, it is filled up with examples of weight 0.

    `fine_tune` chooses the epoch by itself. Give `fit` `shuffle=False`: Keras would shuffle the batches once more, in
    an order that nobody can find again.

    Args:
        x: `{"token_ids": (N, T) int32, "padding_mask": (N, T)}` arrays.
        y: (N, T) int32 array, the next tokens; or a dictionary of arrays of N examples, the targets of another loss.
        sample_weight: (N, T) float32 array, 0 where a label does not count.
        batch_size: examples in a batch.
        shuffle: whether epochs are shuffled.
        seed: of the shuffling, a whole number of at least 0.

    Raises:
        InputError: if there is no example, the arrays differ in their number of examples, or `batch_size` is below 1.

    Example:

    >>> x = {"token_ids": np.arange(6).reshape(3, 2), "padding_mask": np.ones((3, 2), "int32")}
    >>> dataset = TokenDataset(x, x["token_ids"] + 1, np.ones((3, 2), "float32"), batch_size=2, shuffle=False)
    >>> dataset.num_batches, dataset[1][2].tolist()
    (2, [[1.0, 1.0], [0.0, 0.0]])
    """

    def __init__(
        self,
        x: dict[str, np.ndarray],
        y: np.ndarray | dict[str, np.ndarray],
        sample_weight: np.ndarray,
        batch_size: int = 8,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise InputError(f"`batch_size` must be a whole number of at least 1; given {batch_size!r}.")
        lengths = {len(array) for array in keras.tree.flatten((x, y, sample_weight))}
        if len(lengths) != 1 or lengths == {0}:
            raise InputError(
                "`x`, `y` and `sample_weight` must hold the same number of examples, at least 1; given "
                f"{' and '.join(map(str, sorted(lengths)))}."
            )
        self.x, self.y, self.sample_weight = x, y, sample_weight
        self.batch_size, self.shuffle, self.seed = int(batch_size), shuffle, seed
        self.start_at(0)

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.sample_weight)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a whole epoch."""
        return -(-len(self) // self.batch_size)

    @property
    def num_batches(self) -> int:
        """Batches that the current epoch still has."""
        return self.batches_per_epoch - self.first_step

    @property
    def first_step(self) -> int:
        """Batches of the current epoch that were passed over."""
        return self._first_step

    def start_at(self, epoch: int, step: int = 0) -> None:
        """Go to an epoch, counted from 0, past its first `step` batches."""
        self._epoch, self._first_step = epoch, step
        order = np.arange(len(self))
        self._order = np.random.default_rng([self.seed, epoch]).permutation(order) if self.shuffle else order

    def on_epoch_end(self) -> None:
        """Go to the next epoch."""
        self.start_at(self._epoch + 1)

    def __getitem__(self, index: int) -> Any:
        """One batch `(x, y, sample_weight)` of what the current epoch still has."""
        rows = self._rows(index)
        weight = self.sample_weight[rows]
        if missing := self.batch_size - len(rows):
            weight = np.concatenate([weight, np.zeros((missing, *weight.shape[1:]), weight.dtype)])
            rows = np.concatenate([rows, np.full(missing, rows[0])])
        x, y = keras.tree.map_structure(lambda array: array[rows], (self.x, self.y))
        return x, y, weight

    def _rows(self, index: int) -> np.ndarray:
        start = (self.first_step + index) * self.batch_size
        return self._order[start : start + self.batch_size]

    def num_tokens(self, index: int) -> int:
        """Tokens of a batch that are no padding."""
        return int(self._tokens_of_rows[self._rows(index)].sum())

    @cached_property
    def _tokens_of_rows(self) -> np.ndarray:
        return np.count_nonzero(self.x["padding_mask"], axis=1)

    @cached_property
    def digest(self) -> str:
        """A SHA-256 over all examples, which tells two datasets apart."""
        digest = hashlib.sha256()
        y = sorted(self.y.items()) if isinstance(self.y, dict) else [("y", self.y)]
        for name, array in [*sorted(self.x.items()), *y, ("sample_weight", self.sample_weight)]:
            digest.update(f"{name} {np.asarray(array[:0]).dtype} {array.shape}\n".encode())
            rows = max(1, _HASHED_BYTES // max(1, array[:1].nbytes))
            for first in range(0, len(array), rows):
                digest.update(np.ascontiguousarray(array[first : first + rows]).tobytes())
        return digest.hexdigest()
