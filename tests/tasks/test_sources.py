"""Records, conversations and datasets of other libraries, in `fit`, `evaluate` and `predict`."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from gemma2_keras.errors import InputError
from gemma2_keras.tasks.sources import StreamBatches, TableBatches
from tests.tasks.sharp import sharpened

TEXTS = ["The cat sat.", "The dog sat on the log.", "7 + 5 = 12", "The sky is blue."]
PAIRS = {"prompts": ["The cat", "The dog", "7 + 5", "The sky"], "responses": [" sat.", " sat.", " = 12", " is blue."]}
ANSWERS = {"The cat": "sat.", "7 + 5": "12", "The": "sky", "A": "girl."}
CHATS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}] for prompt, reply in ANSWERS.items()
]
# Of each kind: one by one, and as columns.
DATA = {
    "texts": ([{"text": text} for text in TEXTS], TEXTS),
    "pairs": ([{"prompt": p, "response": r} for p, r in zip(*PAIRS.values(), strict=True)], PAIRS),
    "chats": ([{"messages": messages} for messages in CHATS], {"messages": CHATS}),
}


@pytest.fixture(scope="module")
def still():
    """A model that training does not change, so that all data of one content gives one loss."""
    model = sharpened(num_layers=1)
    model.preprocessor.sequence_length = 40
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    return model


@pytest.fixture(scope="module")
def losses(still):
    """What tokens give that the preprocessor makes."""

    def loss(columns):
        x, y, weight = still.preprocessor(columns)
        return still.evaluate(x, y, 2, sample_weight=weight, verbose=0, return_dict=True)

    return {name: loss(columns) for name, (_, columns) in DATA.items()}


def hugging_face(records):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(records)


def grain_source(records):
    return pytest.importorskip("grain").MapDataset.source(records)


def grain_loader(records):
    grain = pytest.importorskip("grain")
    sampler = grain.samplers.SequentialSampler(len(records), grain.sharding.NoSharding())
    return grain.DataLoader(data_source=records, sampler=sampler)


KINDS = {
    "list": lambda records: records,
    "Dataset": hugging_face,
    "Dataset of batches": lambda records: hugging_face(records).batch(2),
    "IterableDataset": lambda records: hugging_face(records).to_iterable_dataset(),
    "IterableDataset of batches": lambda records: hugging_face(records).to_iterable_dataset().batch(2),
    "MapDataset": grain_source,
    "IterDataset": lambda records: grain_source(records).to_iter_dataset(),
    "grain's DataLoader": grain_loader,
}


@pytest.mark.parametrize(
    ("kind", "data"), [("list", "texts"), ("Dataset", "pairs"), *((kind, "chats") for kind in KINDS)]
)
def test_every_kind_gives_the_same_loss_in_every_epoch(still, losses, kind, data):
    given = KINDS[kind](DATA[data][0])
    history = still.fit(given, batch_size=2, epochs=2, validation_data=given, shuffle=False, verbose=0).history
    assert history["loss"] == pytest.approx([losses[data]["loss"]] * 2, rel=1e-5)
    assert history["val_loss"] == pytest.approx([losses[data]["loss"]] * 2, rel=1e-5)
    assert still.evaluate(given, batch_size=2, verbose=0, return_dict=True) == pytest.approx(losses[data], rel=1e-5)


@pytest.mark.parametrize("kind", ["IterableDataset", "IterableDataset of batches", "IterDataset", "grain's DataLoader"])
def test_a_stream_is_read_as_it_comes_where_steps_are_given(still, losses, kind):
    given = KINDS[kind](DATA["pairs"][0])
    options = {"steps_per_epoch": 2, "validation_data": given, "validation_steps": 2}
    history = still.fit(given, batch_size=2, epochs=3, verbose=0, **options).history
    assert history["loss"] == pytest.approx([losses["pairs"]["loss"]] * 3, rel=1e-5)
    assert history["val_loss"] == pytest.approx([losses["pairs"]["loss"]] * 3, rel=1e-5)
    assert still.evaluate(given, batch_size=2, steps=2, verbose=0)[0] == pytest.approx(
        losses["pairs"]["loss"], rel=1e-5
    )


def test_logits_of_records_are_those_of_columns(still):
    expected = still.predict(TEXTS, batch_size=2, verbose=0)
    for kind in ("list", "Dataset", "IterableDataset"):
        found = still.predict(KINDS[kind](DATA["texts"][0]), batch_size=2, verbose=0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("data", "items"), [("texts", TEXTS), *((name, records) for name, (records, _) in DATA.items())]
)
def test_an_iterator_of_single_examples_is_batched(still, losses, data, items):
    found = still.evaluate(iter(items), batch_size=2, steps=2, verbose=0)[0]
    assert found == pytest.approx(losses[data]["loss"], rel=1e-5)


def batches(dataset) -> list:
    return [dataset[i] for i in range(dataset.num_batches)]


def kept(x, y, weight):
    return x, y, weight


@pytest.mark.once
def test_a_table_has_each_example_once_in_an_order_of_each_epoch():
    keras.utils.set_random_seed(3)
    table = hugging_face([{"text": str(i)} for i in range(7)])
    shuffled = TableBatches(table, lambda x, y, weight: [record["text"] for record in x], 3, shuffle=True)
    epochs = []
    for _ in range(3):
        epochs.append([text for batch in batches(shuffled) for text in batch])
        shuffled.on_epoch_end()
    assert [sorted(epoch) for epoch in epochs] == [[str(i) for i in range(7)]] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    plain = TableBatches(table, lambda x, y, weight: [record["text"] for record in x], 3, shuffle=False)
    assert batches(plain) == [["0", "1", "2"], ["3", "4", "5"], ["6"]]


@pytest.mark.once
def test_a_stream_begins_again_where_it_ends_and_shuffles_anew():
    stream = hugging_face([{"text": str(i)} for i in range(5)]).to_iterable_dataset().shuffle(seed=1, buffer_size=5)
    made = StreamBatches(stream, lambda x, y, weight: [record["text"] for record in x], 2)
    found = [made[i] for i in range(6)]
    assert [len(batch) for batch in found] == [2, 2, 1] * 2
    epochs = [[text for batch in epoch for text in batch] for epoch in (found[:3], found[3:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [str(i) for i in range(5)]
    assert epochs[0] != epochs[1]
    # Keras asks for the first batch again when it begins anew.
    assert [made[i] for i in range(3)] == found[:3]


@pytest.mark.once
def test_what_a_filter_leaves_out_is_no_example(still):
    source = grain_source(TEXTS).filter(lambda text: "cat" not in text)
    assert still.predict(source, batch_size=2, verbose=0).shape[0] == 3


@pytest.mark.once
def test_data_without_an_example_or_an_end_is_refused(still):
    table = hugging_face(DATA["texts"][0])
    for empty in (table.select([]), table.to_iterable_dataset().filter(lambda record: False)):
        with pytest.raises(InputError, match="The dataset has no examples"):
            still.fit(empty, verbose=0)
    with pytest.raises(InputError, match="The dataset has no examples"):
        StreamBatches([], kept, 2)[0]
    with pytest.raises(InputError, match="never ends: give `steps_per_epoch`"):
        still.fit(grain_source(TEXTS).repeat(), verbose=0)
    assert still.fit(grain_source(TEXTS).repeat(), batch_size=2, steps_per_epoch=3, verbose=0).history["loss"]


@pytest.mark.once
@pytest.mark.parametrize("single", ["data.jsonl", b"The cat", {"text": "The cat"}, {"messages": CHATS[0]}])
def test_a_single_example_is_no_data(still, single):
    with pytest.raises(InputError, match=r"as a list.*read_jsonl"):
        still.fit(single, verbose=0)
