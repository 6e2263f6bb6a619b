from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from gemma2_keras import Gemma2CausalLMPreprocessor
from gemma2_keras.errors import InputError
from gemma2_keras.preprocessing.chat_template import encode_chat
from tests.preprocessing import tiny

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = ["The cat sat.", "The dog sat on the log by the sea.", "7 + 5 = 12"]
PAIRS = {"prompts": ["The cat", "The"], "responses": [" sat.", " dog sat."]}


@pytest.fixture(scope="session")
def preprocessor() -> Gemma2CausalLMPreprocessor:
    return tiny.preprocessor(sequence_length=24)


def assert_same(found, expected) -> None:
    keras.tree.assert_same_structure(found, expected)
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.once
def test_a_text_is_start_pieces_end_and_padding_and_labels_are_one_ahead(preprocessor, tokenizer):
    x, y, weight = preprocessor(["The cat sat."])
    ids = [2, *tokenizer.encode("The cat sat."), 1]
    row = ids + [0] * (25 - len(ids))
    assert x["token_ids"].tolist() == [row[:-1]]
    assert y.tolist() == [row[1:]]
    assert x["padding_mask"].tolist() == [[i < len(ids) for i in range(24)]]
    # Of n tokens, n - 1 are a next token of one.
    assert weight.tolist() == [[float(i < len(ids) - 1) for i in range(24)]]
    assert (x["token_ids"].dtype, x["padding_mask"].dtype, y.dtype, weight.dtype) == (
        "int32",
        "bool",
        "int32",
        "float32",
    )


@pytest.mark.once
@pytest.mark.parametrize("add_end", [True, False])
@pytest.mark.parametrize("add_start", [True, False])
@pytest.mark.parametrize("length", [2, 5, 9, 30])
@pytest.mark.filterwarnings("ignore:.* texts were cut")
def test_packing_is_that_of_keras_hub(tokenizer, length, add_start, add_end):
    packer = keras_hub.layers.StartEndPacker(
        sequence_length=length + 1, start_value=2, end_value=1, pad_value=0, return_padding_mask=True
    )
    packed = packer(tokenizer.encode(TEXTS), add_start_value=add_start, add_end_value=add_end)
    ids, mask = map(keras.ops.convert_to_numpy, packed)
    expected = {"token_ids": ids[:, :-1].astype("int32"), "padding_mask": mask[:, :-1].astype("bool")}
    ours = Gemma2CausalLMPreprocessor(tokenizer, length, add_start, add_end)
    x, y, weight = ours(TEXTS)
    assert_same(x, expected)
    assert_same(y, ids[:, 1:].astype("int32"))
    assert_same(weight, mask[:, 1:].astype("float32"))
    # The length of one call overrides the constructor's.
    assert_same(
        Gemma2CausalLMPreprocessor(tokenizer, 7, add_start, add_end)(TEXTS, sequence_length=length), (x, y, weight)
    )


class KerasHubsOwn(keras_hub.models.CausalLMPreprocessor):
    """KerasHub's methods, with our tokenizer in them."""


@pytest.mark.once
def test_results_are_those_of_keras_hubs_preprocessor(preprocessor, tokenizer):
    theirs = KerasHubsOwn(tokenizer, sequence_length=24)
    x, y, weight = theirs(TEXTS)
    expected = (x, y, np.asarray(weight, "float32"))
    ours = preprocessor(TEXTS)
    assert_same(keras.tree.map_structure(np.asarray, ours), keras.tree.map_structure(np.asarray, expected))
    prompts = preprocessor.generate_preprocess(TEXTS)
    assert_same(prompts, keras.tree.map_structure(np.asarray, theirs.generate_preprocess(TEXTS, sequence_length=24)))
    assert preprocessor.generate_postprocess(prompts) == theirs.generate_postprocess(prompts) == TEXTS


@pytest.mark.once
@pytest.mark.parametrize(
    "texts", [TEXTS, np.array(TEXTS), np.array(TEXTS, dtype=object), [t.encode() for t in TEXTS], (*TEXTS, "The")]
)
def test_texts_in_any_container_give_the_same(preprocessor, texts):
    assert_same(preprocessor(texts), preprocessor([t if isinstance(t, str) else t.decode() for t in texts]))


def test_a_single_text_gives_arrays_without_a_batch(preprocessor):
    for text in (TEXTS[0], TEXTS[0].encode(), np.array(TEXTS[0])):
        assert_same(preprocessor(text), keras.tree.map_structure(lambda a: a[0], preprocessor(TEXTS[:1])))


@pytest.mark.once
def test_responses_alone_count_and_the_join_is_no_seam(preprocessor, tokenizer):
    x, y, weight = preprocessor(PAIRS)
    for i, (prompt, response) in enumerate(zip(PAIRS["prompts"], PAIRS["responses"], strict=True)):
        head, tail = [2, *tokenizer.encode(prompt)], [*tokenizer.encode(response), 1]
        assert x["token_ids"][i, : len(head + tail)].tolist() == head + tail
        assert y[i][weight[i] == 1].tolist() == tail
        assert set(weight[i].tolist()) == {0.0, 1.0}
    single = preprocessor({"prompts": PAIRS["prompts"][0], "responses": PAIRS["responses"][0]})
    assert_same(single, keras.tree.map_structure(lambda a: a[0], (x, y, weight)))


CHAT = [
    {"role": "user", "content": "The cat"},
    {"role": "model", "content": "sat."},
    {"role": "user", "content": "The"},
    {"role": "assistant", "content": "dog"},
]


@pytest.mark.once
def test_of_a_conversation_what_the_model_says_counts(preprocessor, tokenizer):
    x, y, weight = preprocessor({"messages": [CHAT, CHAT[:2]]}, sequence_length=64)
    for row, messages in enumerate((CHAT, CHAT[:2])):
        ids = encode_chat(tokenizer, messages, reply=False)
        assert x["token_ids"][row, : len(ids)].tolist() == ids
        assert x["padding_mask"][row].tolist() == [i < len(ids) for i in range(64)]
        # A template that ends with a line break has no end token.
        assert 1 not in x["token_ids"][row]
        said = [text for i in (1, 3)[: len(messages) // 2] for text in [*tokenizer.encode(messages[i]["content"]), 107]]
        assert y[row][weight[row] == 1].tolist() == said
    single = preprocessor({"messages": CHAT}, sequence_length=64)
    assert_same(single, keras.tree.map_structure(lambda a: a[0], (x, y, weight)))


RECORDS = [
    ([{"text": text, "source": None, "tags": [1, {"a": "b"}]} for text in TEXTS], TEXTS),
    ([{"prompt": "The cat", "response": " sat."}, {"prompt": "The", "response": " dog sat."}], PAIRS),
    ([{"prompt": "The cat", "completion": " sat."}, {"prompt": "The", "completion": " dog sat."}], PAIRS),
    ([{"messages": CHAT}, {"messages": CHAT[:2]}], {"messages": [CHAT, CHAT[:2]]}),
    ({"text": TEXTS, "id": [1, 2, 3]}, TEXTS),
    ({"prompt": np.array(PAIRS["prompts"]), "completion": PAIRS["responses"]}, PAIRS),
    ({"text": TEXTS[0]}, TEXTS[0]),
    ({"messages": np.array([CHAT, CHAT[:2]], dtype=object)}, {"messages": [CHAT, CHAT[:2]]}),
]


@pytest.mark.parametrize(("records", "columns"), RECORDS)
def test_records_and_columns_give_the_same(preprocessor, records, columns):
    assert_same(preprocessor(records, sequence_length=64), preprocessor(columns, sequence_length=64))


@pytest.mark.once
@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([{"text": "The"}, {"prompt": "The", "response": "cat"}], 'Example 1 has "prompt" and "response", example 0'),
        ([{"text": "The"}, "The"], "Example 1 is no record, as others are: given 'The'"),
        (["The", {"text": "The"}], "Example 0 is no record"),
        ([{"text": "The"}, {"txt": "cat"}], r"Example 1 needs the key .*given \['txt'\]"),
        ([{"text": "The"}, {"text": None}], "`text` must be a string or a list of strings; given .* number 1 is None"),
        ([{"text": "The"}, {"text": ["cat"]}], r"number 1 is \['cat'\]"),
        ([{"text": "The"}, {"text": ""}], "`text` 1 is an empty string"),
        ([{"prompt": "The", "response": "cat"}, {"prompt": "The"}], r"Example 1 needs .*given \['prompt'\]"),
        ([{"text": "a", "prompt": "b", "response": "c"}], "Example 0 could be read in several ways: it has 'text' and"),
        ({"text": ["a"], "messages": [CHAT]}, "several ways"),
        ({"messages": []}, "`messages` must be a list of conversations"),
        ({"messages": "The cat"}, "`messages` must be a list of conversations"),
        ({"messages": [CHAT, CHAT[1:]]}, "Example 1: Message 0 has the role 'model'; .*'user' is next"),
        ({"messages": [CHAT, [CHAT[0], CHAT[0]]]}, "Example 1: Message 1 has the role 'user'; .*'model' is next"),
        ({"messages": [CHAT, []]}, "Example 1: Messages are a list of"),
        ({"messages": [[CHAT[0], {"role": "model", "content": " "}]]}, "Example 0: Message 1 needs text"),
        ({"messages": [[CHAT[0], {"role": "model", "content": None}]]}, "Example 0: Message 1 needs text"),
        ({"messages": [[{"role": "robot", "content": "a"}]]}, "Example 0: Message 0 has the role 'robot'; allowed are"),
        ({"messages": [[{"role": ["user"], "content": "a"}]]}, "Example 0: Message 0 has the role"),
        ({"messages": [CHAT, [{"from": "user", "value": "a"}]]}, "Example 1: Message 0 must be"),
        ([{"messages": CHAT}, {"messages": [CHAT[1]]}], "Example 1: Message 0 has the role"),
        (["The", "\ud800"], "Example 1: The text holds a lone surrogate"),
    ],
)
def test_an_example_that_cannot_be_learned_from_is_named_by_its_number(preprocessor, x, message):
    with pytest.raises(InputError, match=message):
        preprocessor(x)


@pytest.mark.once
def test_what_an_example_is_can_be_seen(preprocessor):
    shown = preprocessor.show({"messages": CHAT[:2]})
    assert repr(shown) == (
        "<bos><start_of_turn>user\nThe cat<end_of_turn>\n<start_of_turn>model\n⟦sat.<end_of_turn>⟧\n"
    )
    assert repr(preprocessor.show("The cat")) == "<bos>⟦The cat<eos>⟧"
    with pytest.raises(InputError, match="takes one example"):
        preprocessor.show(TEXTS)


@pytest.mark.once
def test_conversations_are_refused_within_tf_data(preprocessor):
    tensorflow = pytest.importorskip("tensorflow")
    columns = {"messages": {"role": ["user", "model"], "content": ["The cat", "sat."]}}
    # As TensorFlow says it: in an error of its own.
    with pytest.raises(Exception, match="Conversations do not go through"):
        tensorflow.data.Dataset.from_tensor_slices(columns).map(preprocessor)


@pytest.mark.once
def test_a_prompt_that_fills_the_length_leaves_no_response_to_count(tokenizer):
    preprocessor = Gemma2CausalLMPreprocessor(tokenizer, 3, add_end_token=False)
    with pytest.warns(UserWarning, match="1 of 1 texts were cut"):
        _, _, weight = preprocessor({"prompts": ["The dog sat on the log"], "responses": [" by the sea."]})
    assert weight.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.once
def test_cutting_keeps_the_end_token_and_warns_once(preprocessor, tokenizer):
    with pytest.warns(UserWarning, match=r"1 of 2 texts were cut to `sequence_length=8` tokens") as caught:
        x, y, _ = preprocessor(TEXTS[:2], sequence_length=8)
    assert len(caught) == 1
    # What is cut still ends with the end token, as in KerasHub.
    assert y[1, -1] == 1
    assert x["token_ids"][1].tolist() == [2, *tokenizer.encode(TEXTS[1])[:7]]
    exact = len(tokenizer.encode(TEXTS[0])) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preprocessor(TEXTS[:1], sequence_length=exact)


def test_tokenized_data_passes_through(preprocessor):
    x = {"token_ids": ops.ones((1, 4), "int32"), "padding_mask": ops.ones((1, 4), "int32")}
    y, weight = np.ones((1, 4), "int32"), np.ones((1, 4), "float32")
    given = preprocessor(x, y=y, sample_weight=weight)
    assert given[0] is x
    assert given[1] is y
    assert given[2] is weight


@pytest.mark.parametrize("batch", [None, 2, 3])
def test_a_tf_dataset_of_strings_gives_the_same(preprocessor, batch):
    tensorflow = pytest.importorskip("tensorflow")
    dataset = tensorflow.data.Dataset.from_tensor_slices(TEXTS)
    dataset = dataset if batch is None else dataset.batch(batch)
    found = list(dataset.map(preprocessor).as_numpy_iterator())
    step = batch or 1
    expected = [preprocessor(TEXTS[i] if batch is None else TEXTS[i : i + step]) for i in range(0, len(TEXTS), step)]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("batch", [None, 2])
def test_a_tf_dataset_of_prompts_and_responses_gives_the_same(preprocessor, batch):
    tensorflow = pytest.importorskip("tensorflow")
    dataset = tensorflow.data.Dataset.from_tensor_slices(PAIRS)
    mapped = (dataset if batch is None else dataset.batch(batch)).map(preprocessor)
    length = (24,) if batch is None else (None, 24)
    assert [tuple(spec.shape) for spec in keras.tree.flatten(mapped.element_spec)] == [length] * 4
    first = next(mapped.as_numpy_iterator())
    pairs = PAIRS if batch else {key: texts[0] for key, texts in PAIRS.items()}
    assert_same(first, preprocessor(pairs))


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="a DataLoader is PyTorch's")
def test_it_collates_for_a_torch_data_loader(preprocessor):
    from torch.utils.data import DataLoader

    batches = list(DataLoader(TEXTS, batch_size=2, collate_fn=preprocessor))
    assert len(batches) == 2
    assert_same(batches[0], preprocessor(TEXTS[:2]))
    assert_same(batches[1], preprocessor(TEXTS[2:]))


class Batches(keras.utils.PyDataset):
    """Preprocesses in `__getitem__`, as a user would."""

    def __init__(self, preprocessor):
        super().__init__()
        self.preprocessor = preprocessor

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.preprocessor(TEXTS[2 * index : 2 * index + 2])


def test_it_works_inside_a_py_dataset(preprocessor):
    assert_same(Batches(preprocessor)[0], preprocessor(TEXTS[:2]))
    assert_same(Batches(preprocessor)[1], preprocessor(TEXTS[2:]))


def test_prompts_round_trip(preprocessor, tokenizer):
    prompts = preprocessor.generate_preprocess(TEXTS, sequence_length=26)
    assert prompts["token_ids"].shape == prompts["padding_mask"].shape == (3, 26)
    assert (prompts["token_ids"].dtype, prompts["padding_mask"].dtype) == ("int32", "bool")
    assert 1 not in prompts["token_ids"]
    assert prompts["token_ids"][0][prompts["padding_mask"][0]].tolist() == [2, *tokenizer.encode(TEXTS[0])]
    assert preprocessor.generate_postprocess(prompts) == TEXTS
    tensors = {key: ops.convert_to_tensor(value) for key, value in prompts.items()}
    assert preprocessor.generate_postprocess(tensors) == TEXTS
    assert_same(preprocessor.generate_preprocess({"prompts": TEXTS}, sequence_length=26), prompts)
    single = preprocessor.generate_preprocess(TEXTS[0])
    assert single["token_ids"].shape == (24,)
    assert preprocessor.generate_postprocess(single) == TEXTS[0]


@pytest.mark.once
def test_control_tokens_are_left_out_of_generated_text_wherever_they_stand(preprocessor, tokenizer):
    ids = np.array([[2, *tokenizer.encode("The cat"), 107, 1, 5, 0, 0]])
    text = preprocessor.generate_postprocess({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    assert text == ["The cat"]


@pytest.mark.once
def test_a_prompt_may_fill_the_length_but_not_more(preprocessor, tokenizer):
    exact = len(tokenizer.encode(TEXTS[1])) + 1
    assert preprocessor.generate_preprocess(TEXTS, sequence_length=exact)["padding_mask"][1].all()
    with pytest.raises(InputError, match=f"Prompt 1 has {exact} tokens, more than the {exact - 1} allowed"):
        preprocessor.generate_preprocess(TEXTS, sequence_length=exact - 1)


@pytest.mark.once
def test_config_holds_what_it_was_made_with(tokenizer):
    made = Gemma2CausalLMPreprocessor(tokenizer, 9, add_start_token=False, add_end_token=False, name="mine")
    config = made.get_config()
    assert (config["sequence_length"], config["add_start_token"], config["add_end_token"]) == (9, False, False)
    restored = Gemma2CausalLMPreprocessor.from_config(config)
    restored.tokenizer.set_proto(tokenizer.proto)
    assert_same(restored(["The cat"]), made(["The cat"]))


@pytest.mark.once
@pytest.mark.parametrize("sequence_length", [0, 1, -5, 1.5, "8", None, True])
def test_a_sequence_length_that_is_none_is_refused(preprocessor, tokenizer, sequence_length):
    with pytest.raises(ValueError, match="`sequence_length` must be a whole number of at least 2"):
        Gemma2CausalLMPreprocessor(tokenizer, sequence_length)
    if sequence_length not in (None, 1):
        for method in (preprocessor, preprocessor.generate_preprocess):
            with pytest.raises(ValueError, match="`sequence_length` must be a whole number of at least 1"):
                method(["The"], sequence_length=sequence_length)


@pytest.mark.once
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (None, "`texts` must be a string or a list of strings; given None"),
        (5, "given 5"),
        ([], "`texts` is empty"),
        ("", "`texts` 0 is an empty string"),
        (["The", ""], "`texts` 1 is an empty string"),
        (["The", None], "must be a string or a list of strings"),
        (["The", 5], "must be a string or a list of strings"),
        ([["The"], ["cat"]], "must be a string or a list of strings"),
        (np.arange(3), "must be a string or a list of strings"),
        (np.array([], dtype=str), "`texts` is empty"),
        (b"\xff", "not UTF-8"),
        (["\ud800"], "lone surrogate"),
        ({}, 'needs the keys "prompts" and "responses"; given'),
        ({"prompts": ["The"]}, r"given \['prompts'\]"),
        ({"prompts": ["The"], "response": ["cat"]}, r"given \['prompts', 'response'\]"),
        ({"prompts": ["The"], "responses": ["a", "b"]}, "must be as many; given 1 and 2"),
        ({"prompts": [], "responses": []}, "`prompts` is empty"),
        ({"prompts": ["The"], "responses": [""]}, "`responses` 0 is an empty string"),
        ({"prompts": ["The"], "responses": [5]}, "`responses` must be"),
        ({"prompts": "The", "responses": ["cat"]}, "`prompts` and `responses` must both be"),
    ],
)
def test_what_is_no_training_text_is_refused(preprocessor, x, message):
    with pytest.raises(InputError, match=message):
        preprocessor(x)


@pytest.mark.once
@pytest.mark.parametrize("extra", [{"y": ["cat"]}, {"sample_weight": [1.0]}, {"y": ["a"], "sample_weight": [1.0]}])
def test_labels_beside_text_are_refused(preprocessor, extra):
    with pytest.raises(InputError, match="`y` and `sample_weight` are made from the text"):
        preprocessor(["The"], **extra)


@pytest.mark.once
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (None, "`prompts` must be"),
        ([], "`prompts` is empty"),
        ("", "`prompts` 0 is an empty string"),
        ([["The"]], "`prompts` must be"),
        ({"texts": ["The"]}, 'needs the key "prompts"'),
    ],
)
def test_what_is_no_prompt_is_refused(preprocessor, x, message):
    with pytest.raises(InputError, match=message):
        preprocessor.generate_preprocess(x)


@pytest.mark.once
@pytest.mark.slow
def test_no_tensorflow_is_needed_to_train_and_to_generate():
    script = """
        import os, sys
        os.environ["KERAS_BACKEND"] = "jax"

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("tensorflow", "tensorflow_text"):
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, Blocked())
        import keras_hub
        from tests.preprocessing import tiny

        model = tiny.causal_lm(num_layers=1)
        assert model.preprocessor(["The cat"])[1].shape == (1, 16)
        model.fit(["The cat", "The dog"], verbose=0)
        model.fit({"prompts": ["The"], "responses": [" cat"]}, verbose=0)
        print(model.generate("The cat", max_new_tokens=2).startswith("The cat"))
        assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=REPOSITORY, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.split() == ["True"], done.stderr[-2000:]
