from __future__ import annotations

import json

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from gemma2_keras import DataReport, Gemma2CausalLMPreprocessor, TokenDataset, prepare
from gemma2_keras.errors import InputError
from tests.preprocessing import tiny
from tests.tasks.sharp import sharpened

TEXTS = ["The cat sat.", "The dog sat on the log by the old house.", "7 + 5 = 12", "The sky is blue.", "The", "A girl."]
PAIRS = {"prompts": ["The cat", "The dog", "7 + 5"], "responses": [" sat.", " sat on the log.", " = 12"]}
CHATS = {
    "messages": [
        [{"role": "user", "content": "The cat"}, {"role": "model", "content": "sat."}],
        [{"role": "user", "content": "7 + 5"}, {"role": "assistant", "content": "12"}],
    ]
}


@pytest.fixture(scope="module")
def sharp():
    """A model whose losses depend on all that it sees."""
    model = sharpened(num_layers=2)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    return model


@pytest.fixture(scope="module")
def preprocessor() -> Gemma2CausalLMPreprocessor:
    return tiny.preprocessor(sequence_length=32)


def everything(dataset: TokenDataset):
    """All rows of a dataset, in the order of the data."""
    return dataset.x, dataset.y, dataset.sample_weight


def pieces(x, y, weight) -> list[tuple]:
    """The examples of rows, each as its tokens, labels and weights."""
    found = []
    for i, segments in enumerate(np.asarray(x["padding_mask"]).astype(int)):
        for segment in dict.fromkeys(segments[segments > 0].tolist()):
            own = segments == segment
            found.append(tuple(tuple(each[i][own].tolist()) for each in (x["token_ids"], y, weight)))
    return found


def expected_pieces(preprocessor, data) -> list[tuple]:
    """The same of what the preprocessor makes of the data, in which nothing is cut."""
    x, y, weight = preprocessor(data, sequence_length=200)
    found = []
    for ids, mask, labels, weights in zip(x["token_ids"], x["padding_mask"], y, weight, strict=True):
        # The last token is only a label.
        kept = slice(0, int(mask.sum()) - 1)
        found.append(tuple(tuple(each[kept].tolist()) for each in (ids, labels, weights)))
    return found


# What is made


@pytest.mark.once
@pytest.mark.parametrize("data", [TEXTS, PAIRS, CHATS], ids=["texts", "pairs", "chats"])
def test_rows_count_what_the_preprocessor_counts(preprocessor, data):
    dataset = prepare(data, preprocessor, sequence_length=64, batch_size=2)
    x, y, weight = everything(dataset)
    _, labels, weights = preprocessor(data, sequence_length=64)
    np.testing.assert_array_equal(y, labels)
    np.testing.assert_array_equal(weight, weights)
    assert pieces(x, y, weight) == expected_pieces(preprocessor, data)
    assert {array.dtype.name for array in x.values()} == {"int32"}
    assert (dataset.batch_size, dataset.report.sequences) == (2, len(y))


@pytest.mark.once
@given(
    st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=12),
    st.integers(2, 24),
    st.sampled_from(["end", "start", "drop"]),
)
def test_packing_keeps_every_example_token_and_weight_and_overfills_nothing(texts, length, truncation):
    preprocessor = tiny.preprocessor()
    options = {"sequence_length": length, "truncation": truncation}
    try:
        apart = prepare(texts, preprocessor, **options)
    except InputError:
        with pytest.raises(InputError, match="Nothing to learn is left"):
            prepare(texts, preprocessor, packing=True, **options)
        return
    packed = prepare(texts, preprocessor, packing=True, **options)
    assert sorted(pieces(*everything(packed))) == sorted(pieces(*everything(apart)))
    x, y, weight = everything(packed)
    assert y.shape == weight.shape == x["token_ids"].shape == (packed.report.sequences, length)
    assert not weight[x["padding_mask"] == 0].any()
    assert packed.report.sequences <= apart.report.sequences
    numbers = ("examples", "tokens", "counted_tokens", "cut_examples", "cut_tokens", "dropped_too_long")
    assert all(getattr(packed.report, name) == getattr(apart.report, name) for name in numbers)
    for a, b in zip(everything(prepare(texts, preprocessor, packing=True, **options))[1:], (y, weight), strict=True):
        np.testing.assert_array_equal(a, b)


# An example of 14 tokens and one of 9 for a sequence of 8, which takes 9.
LONG, SHORT = "The dog sat on the log", "The cat"


@pytest.mark.once
def test_what_is_too_long_is_cut_or_left_out_as_asked(preprocessor):
    (ids, labels, weights), kept = expected_pieces(preprocessor, [LONG, SHORT])
    length = len(ids) - 3
    options = {"sequence_length": length, "shuffle": False}
    assert len(kept[0]) <= length
    dataset = prepare([LONG, SHORT], preprocessor, **options)
    assert pieces(*everything(dataset)) == [(ids[:-3], labels[:-3], weights[:-3]), kept]
    assert (dataset.report.cut_examples, dataset.report.cut_tokens, dataset.report.examples) == (1, 3, 2)
    # It does not learn to stop where it was cut.
    assert 1 not in dataset.y[0]
    dataset = prepare([LONG, SHORT], preprocessor, truncation="start", **options)
    assert pieces(*everything(dataset)) == [((2, *ids[4:]), labels[3:], weights[3:]), kept]
    assert (dataset.report.cut_examples, dataset.report.cut_tokens) == (1, 3)
    dataset = prepare([LONG, SHORT], preprocessor, truncation="drop", **options)
    assert pieces(*everything(dataset)) == [kept]
    assert (dataset.report.dropped_too_long, dataset.report.cut_examples, dataset.report.cut_tokens) == (1, 0, 0)
    message = f"Example 0 has {len(ids) + 1} tokens, more than the {length + 1} that `sequence_length={length}` takes"
    with pytest.raises(InputError, match=message):
        prepare([LONG, SHORT], preprocessor, truncation="error", **options)
    assert prepare([LONG, SHORT], preprocessor, len(ids), truncation="error").report.cut_examples == 0


@pytest.mark.once
@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_start_stays_however_short_a_sequence_is(preprocessor, length):
    dataset = prepare([LONG], preprocessor, length, truncation="start")
    _, labels, _ = expected_pieces(preprocessor, [LONG])[0]
    assert dataset.y.tolist() == [list(labels[-length:])]
    assert dataset.x["token_ids"].tolist() == [[2, *labels[-length:-1]]]
    without = tiny.preprocessor(add_start_token=False)
    ids, labels, _ = expected_pieces(without, [LONG])[0]
    assert prepare([LONG], without, length, truncation="start").x["token_ids"].tolist() == [list(ids[-length:])]


@pytest.mark.once
def test_an_example_of_which_no_response_is_left_is_dropped_and_counted(preprocessor):
    pairs = [{"prompt": "The dog sat on the log", "response": " by the sea."}, {"prompt": "The", "response": " cat"}]
    length = len(expected_pieces(preprocessor, pairs)[1][0]) + 1
    dataset = prepare(pairs, preprocessor, length)
    assert (dataset.report.dropped_uncounted, dataset.report.sequences) == (1, 1)
    # What is dropped was not cut.
    assert (dataset.report.cut_examples, dataset.report.cut_tokens) == (0, 0)
    assert prepare(pairs, preprocessor, length, truncation="start").report.dropped_uncounted == 0
    only_user = {"messages": [*CHATS["messages"], CHATS["messages"][0][:1]]}
    assert prepare(only_user, preprocessor, 64).report.dropped_uncounted == 1
    with pytest.raises(InputError, match="Nothing to learn is left of 1 example: 0 too long, 1 in which nothing"):
        prepare(pairs[:1], preprocessor, 4)


@pytest.mark.once
def test_a_report_is_read_at_a_glance(preprocessor):
    report = prepare(TEXTS, preprocessor, 12, packing=True).report
    x, y, weight = everything(prepare(TEXTS, preprocessor, 12, packing=True))
    assert report.tokens == np.count_nonzero(x["padding_mask"])
    assert report.counted_tokens == weight.sum()
    assert report.fill == report.tokens / y.size
    lines = repr(report).splitlines()
    assert lines[0] == "6 examples"
    assert lines[2] == f"{len(y)} sequences of 12 tokens, {report.fill:.0%} full"
    assert str(DataReport(2000, 1, 1, 1, 1, dropped_too_long=1)).splitlines() == [
        "2,000 examples, 1,999 of them learned from",
        "1 token, 1 of them counted in the loss",
        "1 sequence of 1 tokens, 100% full",
        "1 example dropped: too long",
    ]


# What it is made of


class Texts(keras.utils.PyDataset):
    @property
    def num_batches(self):
        return 3

    def __getitem__(self, index):
        return TEXTS[2 * index : 2 * index + 2]


class Endless(Texts):
    @property
    def num_batches(self):
        return None


def written(folder, records) -> str:
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), "utf-8")
    return str(path)


@pytest.mark.once
def test_every_kind_of_data_gives_the_same(preprocessor, tmp_path):
    records = [{"text": text} for text in TEXTS]
    x, y, weight = preprocessor(TEXTS)
    expected = pieces(*everything(prepare(TEXTS, preprocessor)))
    assert expected == expected_pieces(preprocessor, TEXTS)
    path = written(tmp_path, records)
    for data in (
        records,
        {"text": TEXTS},
        tuple(TEXTS),
        iter(TEXTS),
        iter(records),
        Texts(),
        path,
        tmp_path / "data.jsonl",
    ):
        assert pieces(*everything(prepare(data, preprocessor))) == expected
    assert pieces(*everything(prepare(iter([TEXTS[:4], TEXTS[4:]]), preprocessor))) == expected
    # Tokens keep the last, whose label is padding that does not count.
    found = pieces(*everything(prepare((x, y, weight), preprocessor)))
    assert [
        tuple(each[: len(part[0])] for each in whole) for whole, part in zip(found, expected, strict=True)
    ] == expected
    packed = prepare(TEXTS, preprocessor, packing=True)
    again = prepare(everything(packed), preprocessor)
    assert sorted(pieces(*everything(again))) == sorted(expected)
    assert pieces(*everything(prepare(Texts(), preprocessor, packing=True))) == pieces(*everything(packed))


@pytest.mark.once
def test_datasets_of_other_libraries_give_the_same(preprocessor):
    records = [{"text": text} for text in TEXTS]
    expected = pieces(*everything(prepare(TEXTS, preprocessor)))
    hugging_face, grain = pytest.importorskip("datasets"), pytest.importorskip("grain")
    hugging_face.disable_progress_bars()
    table, source = hugging_face.Dataset.from_list(records), grain.MapDataset.source(records)
    stream = source.to_iter_dataset()
    loader = grain.DataLoader(
        data_source=records, sampler=grain.samplers.SequentialSampler(len(records), grain.sharding.NoSharding())
    )
    iterable = table.to_iterable_dataset()
    for data in (table, table["text"], iterable, table.batch(4), iterable.batch(4), source, source.batch(4), loader):
        assert pieces(*everything(prepare(data, preprocessor))) == expected
    assert pieces(*everything(prepare(stream, preprocessor))) == expected
    kept = [piece for piece, text in zip(expected, TEXTS, strict=True) if "cat" not in text]
    assert pieces(*everything(prepare(source.filter(lambda r: "cat" not in r["text"]), preprocessor))) == kept
    tensorflow = pytest.importorskip("tensorflow")
    for batched in (False, True):
        data = tensorflow.data.Dataset.from_tensor_slices({"text": TEXTS})
        data = data.batch(4) if batched else data
        assert pieces(*everything(prepare(data, preprocessor))) == expected
    torch_data = pytest.importorskip("torch.utils.data")
    assert pieces(*everything(prepare(torch_data.DataLoader(records, batch_size=4), preprocessor))) == expected
    for endless in (source.repeat(), tensorflow.data.Dataset.from_tensor_slices(TEXTS).repeat(), Endless()):
        with pytest.raises(InputError, match="never ends"):
            prepare(endless, preprocessor)


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "The cat sat."}, "`data` as a string is a path"),
        ({"data": []}, "`texts` is empty"),
        ({"data": iter([])}, "Nothing to learn is left of 0 examples"),
        ({"data": None}, "`texts` must be a string or a list"),
        ({"data": [{"text": "a"}, {"txt": "b"}]}, "Example 1 needs the key"),
        ({"data": ({"token_ids": [[2]], "padding_mask": [[1]]},)}, "Tokens need labels"),
        ({"data": ({"token_ids": np.array([[2, 900]]), "padding_mask": [[1, 1]]}, np.array([[5, 1]]))}, "given 900"),
        ({"data": ({"token_ids": np.array([[2, 5]]), "padding_mask": [[1, 1]]}, np.array([[5, 900]]))}, "given 900"),
        ({"data": ({"token_ids": np.array([[2, 5]]), "padding_mask": [[1, 1]]}, np.array([[5]]))}, "`y` must have"),
        ({"preprocessor": None}, "`preprocessor` must be .* given NoneType without one"),
        ({"preprocessor": "gemma2_tiny_en"}, "`preprocessor` must be .* given str"),
        ({"sequence_length": 0}, "`sequence_length` must be"),
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"batch_size": 2.0}, "`batch_size` must be"),
        ({"packing": "yes"}, "`packing` must be"),
        ({"truncation": "middle"}, "`truncation` must be one of end, start, drop, error; given 'middle'"),
        ({"truncation": None}, "`truncation` must be one of"),
    ],
)
def test_what_cannot_be_prepared_is_refused(preprocessor, arguments, message):
    with pytest.raises(InputError, match=message):
        prepare(**{"data": TEXTS, "preprocessor": preprocessor, **arguments})


# Packed training is the same


class Gradients(keras.optimizers.Optimizer):
    """Puts its gradient in the place of every variable."""

    def __init__(self) -> None:
        super().__init__(learning_rate=1.0)

    def update_step(self, gradient, variable, learning_rate):
        self.assign(variable, gradient)


def loss_and_gradients(data, adapters: bool) -> tuple[float, dict[str, np.ndarray]]:
    model = tiny.causal_lm(num_layers=2)
    if adapters:
        model.enable_lora(2, targets="all-linear")
    random = np.random.default_rng(4)
    for variable in model.variables:
        if variable.dtype == "float32":
            variable.assign(random.normal(0, 0.2, variable.shape))
    # With adapters, each branch is computed again for the gradient as well.
    model.compile(optimizer=Gradients(), remat=adapters)
    x, y, weight = data
    logs = model.train_on_batch(x, y, sample_weight=weight, return_dict=True)
    found = {v.path: ops.convert_to_numpy(ops.stop_gradient(v)) for v in model.trainable_variables}
    return float(logs["loss"]), found


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "adapters, recomputed"])
def test_loss_and_gradients_of_packed_examples_are_those_of_the_examples_apart(preprocessor, adapters):
    data = {key: [*values, *values[::-1]] for key, values in PAIRS.items()}
    apart, packed = (prepare(data, preprocessor, 40, packing=packing) for packing in (False, True))
    # Longer than the window of 6, several in a row.
    assert apart.report.tokens > 6 * apart.report.examples
    assert 1 < packed.report.sequences <= apart.report.sequences // 2
    loss, gradients = loss_and_gradients(everything(apart), adapters)
    same, found = loss_and_gradients(everything(packed), adapters)
    assert same == pytest.approx(loss, rel=1e-5)
    assert found.keys() == gradients.keys()
    for path, gradient in gradients.items():
        assert np.abs(gradient).max() > 1e-3, path
        np.testing.assert_allclose(found[path], gradient, rtol=1e-5, atol=1e-5, err_msg=path)


def test_examples_in_one_row_are_seen_as_one_by_a_mask_of_ones(preprocessor, sharp):
    """The other way round: without the numbers the packed examples do see one another, and the loss tells."""
    x, y, weight = everything(prepare(TEXTS, preprocessor, 40, packing=True))
    apart = everything(prepare(TEXTS, preprocessor, 40))
    losses = [
        sharp.test_on_batch(inputs, labels, sample_weight=weights, return_dict=True)["loss"]
        for inputs, labels, weights in (
            apart,
            (x, y, weight),
            ({**x, "padding_mask": x["padding_mask"] > 0}, y, weight),
        )
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert abs(losses[2] - losses[0]) > 1e-2


def test_padding_inside_of_packed_examples_changes_nothing(preprocessor, sharp):
    x = prepare(TEXTS, preprocessor, 40, packing=True).x
    rows, length = x["token_ids"].shape
    # Each row spread over one twice as long, at places of its own.
    places = np.stack([np.sort(np.random.default_rng(i).permutation(2 * length)[:length]) for i in range(rows)])
    spread = {name: np.zeros((rows, 2 * length), "int32") for name in x}
    for name, array in x.items():
        np.put_along_axis(spread[name], places, array, axis=1)
    logits, wide = sharp.predict_on_batch(x), sharp.predict_on_batch(spread)
    found = np.take_along_axis(wide, places[..., None], axis=1)
    real = x["padding_mask"] > 0
    np.testing.assert_allclose(found[real], logits[real], rtol=1e-4, atol=1e-5 * np.abs(logits).max())
    scores = ops.convert_to_numpy(ops.stop_gradient(sharp.score(x["token_ids"], x["padding_mask"])))
    np.testing.assert_allclose(scores[real], logits[real], rtol=1e-4, atol=1e-5 * np.abs(logits).max())


def test_fit_learns_from_a_packed_file(preprocessor, tmp_path):
    path = written(tmp_path, [{"messages": messages} for messages in CHATS["messages"]])
    model = tiny.causal_lm(num_layers=1)
    model.compile(optimizer=keras.optimizers.Adam(0.03))
    dataset = prepare(path, model, 64, batch_size=2, packing=True)
    history = model.fit(dataset, epochs=12, verbose=0).history
    assert history["loss"][-1] < history["loss"][0] / 2
