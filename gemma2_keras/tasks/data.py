"""Training data of any kind, preprocessed as Keras' own trainer can take it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from gemma2_keras.errors import InputError
from gemma2_keras.preprocessing.records import is_example
from gemma2_keras.tasks.sources import (
    BATCH_SIZE,
    Preprocess,
    StreamBatches,
    TableBatches,
    batches_of,
    is_from,
    is_stream,
    is_table,
    unpacked,
    whole,
)


def preprocessed(
    preprocess: Preprocess,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    steps: int | None = None,
    shuffle: bool = False,
) -> tuple[Any, Any, Any]:
    """Apply `preprocess` to whatever `fit` is given.

    Args:
        preprocess: takes and gives `(x, y, sample_weight)`.
        x: text, records, arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset`, a torch `DataLoader`, a dataset of
            Hugging Face or of grain, or another iterator, of examples or of batches, each `x`, `(x, y)` or
            `(x, y, sample_weight)`.
        y: labels beside arrays.
        sample_weight: weights beside arrays.
        batch_size: how many examples make a batch where single ones come; 32 by default.
        steps: batches of an epoch, where asked for.
        shuffle: whether a dataset that can be read in any order is.

    Returns:
        `(x, y, sample_weight)` for `keras.Model.fit`. Text and arrays are preprocessed at once, the others by batch; of
        those that do not say how long they are, datasets of Hugging Face and of grain are read at once, too, unless
        `steps` are given.

    Raises:
        InputError: if `x` is a single text, or arrays have targets that come in batches only.
    """
    size = BATCH_SIZE if batch_size is None else batch_size
    if isinstance(x, keras.utils.PyDataset):
        return PreprocessedDataset(x, preprocess), None, None
    if is_table(x):
        return TableBatches(x, preprocess, size, shuffle), None, None
    if is_stream(x):
        return whole(x, preprocess) if steps is None else (StreamBatches(x, preprocess, size), None, None)
    if is_from("tensorflow", x, "data.Dataset"):
        return x.map(lambda *batch: preprocess(*unpacked(batch)), num_parallel_calls=2).prefetch(1), None, None
    if is_from("torch", x, "utils.data.DataLoader"):
        return _preprocessed_loader(x, preprocess), None, None
    if isinstance(x, Iterator):
        return _batches(batches_of(x, size), preprocess), None, None
    example = preprocess(x, y, sample_weight)
    if is_example(x):
        raise InputError(
            "Give texts as a list, `[text]` for a single one; a file is read before it is given, JSON lines by "
            "`gemma2_keras.read_jsonl`."
        )
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(example)
    if isinstance(y, dict) and sample_weight is not None:
        # Keras takes a dictionary to be of several outputs, each with weights of its own.
        raise InputError(
            "Arrays with a teacher's distributions and weights come in batches: give "
            "`gemma2_keras.TokenDataset(x, y, sample_weight)`, or what `gemma2_keras.teach` makes."
        )
    return x, y, sample_weight


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
        return self._preprocess(*unpacked(self._dataset[index]))

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
        yield keras.tree.map_structure(np.asarray, preprocess(*unpacked(batch)))
