"""Training data of any kind, preprocessed as Keras' own trainer can take it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from gemma2_keras.errors import InputError

Preprocess = Callable[[Any, Any, Any], Any]


def preprocessed(preprocess: Preprocess, x: Any, y: Any = None, sample_weight: Any = None) -> tuple[Any, Any, Any]:
    """Apply `preprocess` to whatever `fit` is given.

    Args:
        preprocess: takes and gives `(x, y, sample_weight)`.
        x: text, arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset`, a torch `DataLoader`, or another iterator of
            batches, each `x`, `(x, y)` or `(x, y, sample_weight)`.
        y: labels beside arrays.
        sample_weight: weights beside arrays.

    Returns:
        `(x, y, sample_weight)` for `keras.Model.fit`. Text and arrays are preprocessed at once, the others by batch.

    Raises:
        InputError: if `x` is a single text.
    """
    if isinstance(x, keras.utils.PyDataset):
        return PreprocessedDataset(x, preprocess), None, None
    if _is_from("tensorflow", x, "data.Dataset"):
        return x.map(lambda *batch: preprocess(*_unpacked(batch)), num_parallel_calls=2).prefetch(1), None, None
    if _is_from("torch", x, "utils.data.DataLoader"):
        return _preprocessed_loader(x, preprocess), None, None
    if isinstance(x, Iterator):
        return _batches(x, preprocess), None, None
    example = preprocess(x, y, sample_weight)
    if any(isinstance(text, str) for text in (x.values() if isinstance(x, dict) else [x])):
        raise InputError("Give texts as a list, `[text]` for a single one; a file is read before it is given.")
    return keras.utils.unpack_x_y_sample_weight(example)


class PreprocessedDataset(keras.utils.PyDataset):
    """A `PyDataset` of text, preprocessed when a batch is asked for.

    Args:
        dataset: the dataset of text.
        preprocess: takes and gives `(x, y, sample_weight)`.
    """

    def __init__(self, dataset: keras.utils.PyDataset, preprocess: Preprocess) -> None:
        super().__init__(dataset.workers, dataset.use_multiprocessing, dataset.max_queue_size)
        self._dataset = dataset
        self._preprocess = preprocess

    @property
    def num_batches(self) -> int | None:
        """As many as the dataset has."""
        return self._dataset.num_batches

    def __getitem__(self, index: int) -> Any:
        """One batch."""
        return self._preprocess(*_unpacked(self._dataset[index]))

    def on_epoch_begin(self) -> None:
        """Tell the dataset."""
        self._dataset.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Tell the dataset."""
        self._dataset.on_epoch_end()


def _preprocessed_loader(loader: Any, preprocess: Preprocess) -> Any:
    """A `DataLoader` of preprocessed batches, which each epoch begins anew."""
    from torch.utils import data

    class Batches(data.IterableDataset):
        def __iter__(self):
            return _batches(loader, preprocess)

    class SizedBatches(Batches):
        def __len__(self) -> int:
            return len(loader)

    # Keras asks a dataset for its length if it has one; that of a stream is not known.
    sized = not isinstance(loader.dataset, data.IterableDataset)
    return data.DataLoader(SizedBatches() if sized else Batches(), batch_size=None)


def _batches(batches: Any, preprocess: Preprocess) -> Iterator[Any]:
    for batch in batches:
        # A DataLoader stacks strings into a list, or pairs of a dictionary into a dictionary of lists.
        yield keras.tree.map_structure(np.asarray, preprocess(*_unpacked(batch)))


def _unpacked(batch: Any) -> tuple[Any, Any, Any]:
    return keras.utils.unpack_x_y_sample_weight(batch) if isinstance(batch, tuple) else (batch, None, None)


def _is_from(library: str, x: Any, path: str) -> bool:
    """Whether `x` is of a class of a library, which is not imported for the question."""
    found: Any = sys.modules.get(library)
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is not None and isinstance(x, found)
