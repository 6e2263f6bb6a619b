"""Datasets of other libraries: told by their classes, which are not imported for the question."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from gemma2_keras.errors import InputError
from gemma2_keras.preprocessing.records import is_example, is_tokenized

Preprocess = Callable[[Any, Any, Any], Any]

# Keras' own default.
BATCH_SIZE = 32
_STREAMS = (
    ("datasets", "IterableDataset"),
    ("grain", "MapDataset"),
    ("grain", "IterDataset"),
    ("grain", "DataLoader"),
)


def is_from(library: str, x: Any, path: str) -> bool:
    """Whether `x` is of a class of a library, which is not imported for the question."""
    found: Any = sys.modules.get(library)
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is not None and isinstance(x, found)


def is_table(x: Any) -> bool:
    """Whether `x` is a `datasets.Dataset`, whose rows can be read in any order."""
    return is_from("datasets", x, "Dataset")


def is_stream(x: Any) -> bool:
    """Whether `x` is a `datasets.IterableDataset` or one of grain's datasets, which can be read again and again."""
    return any(is_from(library, x, name) for library, name in _STREAMS)


def unpacked(batch: Any) -> tuple[Any, Any, Any]:
    """A batch as `(x, y, sample_weight)`."""
    return keras.utils.unpack_x_y_sample_weight(batch) if isinstance(batch, tuple) else (batch, None, None)


def batches_of(items: Iterable[Any], size: int | None) -> Iterator[Any]:
    """Single examples in lists of `size`, of which the last may be shorter; batches as they are.

    Args:
        items: examples, batches, and `None` where a filter left one out.
        size: examples in a list; with `None` all that follow one another are in one.

    Example:

    >>> list(batches_of(["The", "cat", "sat"], 2))
    [['The', 'cat'], ['sat']]
    """
    examples: list[Any] = []
    for item in items:
        if item is not None and not is_example(item):
            if examples:
                yield examples
            examples = []
            yield item
        elif item is not None:
            examples.append(item)
            if len(examples) == size:
                yield examples
                examples = []
    if examples:
        yield examples


def finite_batches(x: Any) -> Iterator[Any]:
    """All that `fit` would be given in one epoch, single examples in one list.

    Raises:
        InputError: if it is known never to end.
    """
    endless = _is_endless_map(x)
    if isinstance(x, keras.utils.PyDataset):
        endless = x.num_batches is None
        items = (x[i] for i in range(x.num_batches or 0))
    elif is_from("tensorflow", x, "data.Dataset"):
        endless = int(x.cardinality()) == sys.modules["tensorflow"].data.INFINITE_CARDINALITY
        items = x.as_numpy_iterator()
    elif is_table(x) or is_stream(x) or isinstance(x, Iterator) or is_from("torch", x, "utils.data.DataLoader"):
        items = x
    else:
        # A tuple is a batch of tokens, or texts.
        yield list(x) if isinstance(x, tuple) and not any(map(is_tokenized, x[:1])) else x
        return
    if endless:
        raise InputError("The data never ends: give what one epoch reads, without `repeat`.")
    yield from batches_of(items, None)


def _is_endless_map(x: Any) -> bool:
    return is_from("grain", x, "MapDataset") and len(x) == sys.maxsize


class TableBatches(keras.utils.PyDataset):
    """A `datasets.Dataset` in batches, preprocessed when one is asked for.

    Args:
        table: the dataset, of examples or of batches.
        preprocess: takes and gives `(x, y, sample_weight)`.
        batch_size: examples in a batch; the dataset's own batches stay as they are.
        shuffle: whether each epoch has an order of its own.
    """

    def __init__(self, table: Any, preprocess: Preprocess, batch_size: int, shuffle: bool) -> None:
        super().__init__()
        if not len(table):
            raise InputError("The dataset has no examples.")
        self._table, self._preprocess, self._shuffle = table, preprocess, shuffle
        self._batch_size = batch_size if is_example(table[0]) else 1
        self.on_epoch_end()

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._table) // self._batch_size)

    def __getitem__(self, index: int) -> Any:
        """One batch."""
        rows = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        (batch,) = batches_of((self._table[int(row)] for row in rows), None)
        return self._preprocess(*unpacked(batch))

    def on_epoch_end(self) -> None:
        """Choose the order of the next epoch."""
        count = len(self._table)
        self._order = np.random.permutation(count) if self._shuffle else np.arange(count)


class StreamBatches(keras.utils.PyDataset):
    """A stream in batches, without end: where it ends, it is read again.

    Args:
        stream: the dataset, of examples or of batches.
        preprocess: takes and gives `(x, y, sample_weight)`.
        batch_size: examples in a batch; the stream's own batches stay as they are.
    """

    def __init__(self, stream: Any, preprocess: Preprocess, batch_size: int) -> None:
        super().__init__()
        self._stream, self._preprocess, self._batch_size = stream, preprocess, batch_size

    @property
    def num_batches(self) -> None:
        """Unknown."""
        return

    def _read(self) -> Iterator[Any]:
        epoch = 0
        while True:
            batch = None
            if hasattr(self._stream, "set_epoch"):
                # So that a shuffled one has another order.
                self._stream.set_epoch(epoch)
            for batch in batches_of(self._stream, self._batch_size):
                yield self._preprocess(*unpacked(batch))
            if batch is None:
                raise InputError("The dataset has no examples.")
            epoch += 1

    def __getitem__(self, index: int) -> Any:
        """The next batch; the first again for 0, with which Keras begins anew."""
        if index == 0:
            self._batches = self._read()
        return next(self._batches)


def whole(stream: Any, preprocess: Preprocess) -> tuple[Any, Any, Any]:
    """All of a stream, preprocessed, as `(x, y, sample_weight)` arrays.

    Raises:
        InputError: if it has no examples, or is known never to end.
    """
    if _is_endless_map(stream):
        raise InputError("The dataset never ends: give `steps_per_epoch` (for validation `validation_steps`).")
    made = [preprocess(*unpacked(batch)) for batch in batches_of(stream, BATCH_SIZE)]
    if not made:
        raise InputError("The dataset has no examples.")
    return keras.utils.unpack_x_y_sample_weight(keras.tree.map_structure(lambda *parts: np.concatenate(parts), *made))
