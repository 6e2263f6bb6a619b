from __future__ import annotations

import dataclasses
import inspect
import re

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from keras_hub import samplers

from gemma2_keras import Gemma2CausalLM, NextTokenLoss
from gemma2_keras.errors import InputError
from gemma2_keras.generation import session
from gemma2_keras.generation.sampling import Sampling
from gemma2_keras.generation.session import Session
from gemma2_keras.kernels import native
from tests.preprocessing import tiny

IDS = np.array([[2, 480, 490]], "int32")
MASK = np.ones_like(IDS)
SIZE = tiny.VOCABULARY_SIZE
INFINITE, NO_NUMBER = float("inf"), float("nan")


@pytest.fixture(scope="module")
def bare(model) -> Gemma2CausalLM:
    return Gemma2CausalLM(model.backbone)


@pytest.fixture(scope="module", autouse=True)
def still_works(model):
    """After every refusal of this file, the model computes and says what it did before."""
    before = ops.convert_to_numpy(ops.stop_gradient(model({"token_ids": IDS, "padding_mask": MASK})))
    text = model.generate("The cat", max_new_tokens=2)
    yield
    after = ops.convert_to_numpy(ops.stop_gradient(model({"token_ids": IDS, "padding_mask": MASK})))
    np.testing.assert_array_equal(after, before)
    assert model.generate("The cat", max_new_tokens=2) == text


BAD_ARRAYS = [
    ("undefined", {"token_ids": IDS, "padding_mask": MASK * NO_NUMBER}, "`padding_mask` must be finite numbers"),
    ("dtype", {"token_ids": IDS.astype("float32"), "padding_mask": MASK}, "`token_ids` must be whole .* dtype float32"),
    ("bool", {"token_ids": IDS > 0, "padding_mask": MASK}, "`token_ids` must be whole numbers"),
    (
        "rank 1",
        {"token_ids": IDS[0], "padding_mask": MASK[0]},
        r"`token_ids` must have shape \(batch, length\).*\(3,\)",
    ),
    ("rank 3", {"token_ids": IDS[None], "padding_mask": MASK[None]}, r"`token_ids` must have .*\(1, 1, 3\)"),
    ("mask rank", {"token_ids": IDS, "padding_mask": MASK[0]}, "`padding_mask` must have shape"),
    ("shapes", {"token_ids": IDS, "padding_mask": MASK[:, :2]}, r"one shape; given \(1, 3\) and \(1, 2\)"),
    ("no rows", {"token_ids": IDS[:0], "padding_mask": MASK[:0]}, r"`token_ids` is empty: shape \(0, 3\)"),
    ("no tokens", {"token_ids": IDS[:, :0], "padding_mask": MASK[:, :0]}, r"`token_ids` is empty: shape \(1, 0\)"),
    ("too large", {"token_ids": IDS + SIZE, "padding_mask": MASK}, r"between 0 and 559; given 562 at \(0, 0\)"),
    ("one too large", {"token_ids": np.array([[2, SIZE, 3]]), "padding_mask": MASK}, r"given 560 at \(0, 1\)"),
    ("negative", {"token_ids": np.array([[2, 5, -1]]), "padding_mask": MASK}, r"given -1 at \(0, 2\)"),
    ("no mask", {"token_ids": IDS}, '"token_ids" and "padding_mask"; given'),
]


@pytest.mark.parametrize(("inputs", "message"), [case[1:] for case in BAD_ARRAYS], ids=[case[0] for case in BAD_ARRAYS])
def test_bad_arrays_are_refused_by_every_way_in(model, bare, inputs, message):
    with pytest.raises(InputError, match=message):
        model(inputs)
    with pytest.raises(InputError, match=message):
        model.backbone(inputs)
    with pytest.raises(InputError, match=message):
        bare.generate(inputs, stop_token_ids=None)
    with pytest.raises(InputError, match=message):
        model.fit(inputs, IDS, verbose=0)
    with pytest.raises(InputError, match=message):
        model.evaluate(inputs, IDS, verbose=0)
    with pytest.raises(InputError, match=message):
        model.predict(inputs, verbose=0)
    if "padding_mask" in inputs:
        with pytest.raises(InputError, match=message):
            model.score(inputs["token_ids"], inputs["padding_mask"])


def test_tensors_are_checked_as_arrays_are(model):
    mask = ops.convert_to_tensor(MASK)
    for bad, message in ((IDS + SIZE, "between 0 and 559"), (IDS.astype("float32"), "dtype float32")):
        with pytest.raises(InputError, match=message):
            model({"token_ids": ops.convert_to_tensor(bad), "padding_mask": mask})


@pytest.mark.parametrize("inputs", [None, 5, "text", [IDS, MASK], IDS])
def test_a_call_takes_a_dictionary(model, inputs):
    with pytest.raises(InputError, match="takes a dictionary with"):
        model(inputs)


@pytest.mark.parametrize("y", [IDS + SIZE, IDS - 3])
def test_labels_outside_the_vocabulary_are_refused(model, y):
    with pytest.raises(InputError, match="must lie between 0 and 559"):
        model.fit({"token_ids": IDS, "padding_mask": MASK}, y, verbose=0)


BAD_TEXT = [
    ("", "0 is an empty string"),
    ([], "is empty: give at least one string"),
    (["The cat", ""], "1 is an empty string"),
    (None, "must be a string or a list of strings; given None"),
    (5, "given 5"),
    ([5], r"given \[5\]"),
    ([["The", "cat"]], "must be a string or a list of strings"),
    (["The", None], "must be a string or a list of strings"),
    (np.array([1, 2]), "must be a string or a list of strings"),
    (b"\xff", "not UTF-8"),
    ("\ud83d", "lone surrogate"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TEXT)
def test_bad_text_is_refused_by_every_way_in(model, text, message):
    for method in (model.generate, lambda x: model.fit(x, verbose=0), lambda x: model.evaluate(x, verbose=0)):
        with pytest.raises(InputError, match=message):
            method(text)


@pytest.mark.parametrize("data", ["The cat sleeps.", "stories.txt", {"prompts": "a", "responses": "b"}])
def test_a_single_text_is_no_data(model, data):
    for method in (model.fit, model.evaluate):
        with pytest.raises(InputError, match="Give texts as a list"):
            method(data, verbose=0)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"prompts": ["a", "b"], "responses": ["c"]}, "as many; given 2 and 1"),
        ({"prompts": ["a"]}, 'needs the keys "prompts" and "responses"'),
        ({"prompts": ["a"], "responses": [""]}, "`responses` 0 is an empty string"),
        ({"content": ["a"]}, "needs the key"),
    ],
)
def test_bad_prompts_and_responses_are_refused(model, pairs, message):
    with pytest.raises(InputError, match=message):
        model.fit(pairs, verbose=0)


def test_labels_and_weights_beside_text_are_refused(model):
    with pytest.raises(InputError, match="`y` and `sample_weight` are made from the text"):
        model.fit(["The cat"], ["cat"], verbose=0)
    with pytest.raises(InputError, match="`y` and `sample_weight` are made from the text"):
        model.fit(["The cat"], sample_weight=np.ones(1), verbose=0)


def test_text_without_a_preprocessor_is_refused(bare):
    for method in (bare.fit, bare.evaluate):
        with pytest.raises(InputError, match="Without a preprocessor, data must be"):
            method(["The cat"], verbose=0)
    with pytest.raises(InputError, match=r"made without a tokenizer.*; given list"):
        bare.generate(["The cat"], stop_token_ids=None)
    with pytest.raises(InputError, match='`stop_token_ids="auto"` has no meaning'):
        bare.generate({"token_ids": IDS, "padding_mask": MASK})


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8", [8]])
@pytest.mark.parametrize("name", ["max_length", "max_new_tokens"])
def test_a_limit_that_is_none_is_refused(model, name, value):
    with pytest.raises(InputError, match=f"`{name}` must be a whole number of at least 1"):
        model.generate("The cat", **{name: value})


def test_both_limits_are_refused(model):
    with pytest.raises(InputError, match="`max_length` or `max_new_tokens`, not both"):
        model.generate("The cat", max_length=8, max_new_tokens=8)


def test_prompts_that_leave_no_room_are_refused(model, bare):
    length = len(model.preprocessor.tokenizer.encode("The cat")) + 1
    with pytest.raises(InputError, match=f"Prompt 0 has {length} tokens, which leaves no room within {length}"):
        model.generate("The cat", max_length=length)
    with pytest.raises(InputError, match=r"Prompt 1 has .* leaves no room within 16"):
        model.generate(["The", "The cat " * 10])
    with pytest.raises(InputError, match=r"leaves no room within 96.*the context is 96 tokens"):
        model.generate("The cat " * 100, max_new_tokens=5)
    with pytest.raises(InputError, match="`max_length` is 97, more than the model's context of 96"):
        model.generate("The cat", max_length=97)
    with pytest.raises(InputError, match="Prompt 0 has 3 tokens, which leaves no room"):
        bare.generate({"token_ids": IDS, "padding_mask": MASK}, stop_token_ids=None)
    with pytest.raises(InputError, match="Prompt 0 has no tokens"):
        bare.generate({"token_ids": IDS, "padding_mask": 0 * MASK}, stop_token_ids=None)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ([SIZE], "`stop_token_ids` must lie between 0 and 559"),
        (-1, "`stop_token_ids` must lie between 0 and 559"),
        ("eos", "`stop_token_ids` must be token ids"),
        (1.5, "`stop_token_ids` must be token ids"),
        ([1.5], "`stop_token_ids` must be token ids"),
        (True, "`stop_token_ids` must be token ids"),
        ([None], "`stop_token_ids` must be token ids"),
        ([[1], [2]], "`stop_token_ids` must be token ids"),
    ],
)
def test_stop_ids_that_are_none_are_refused(model, stop, message):
    with pytest.raises(InputError, match=message):
        model.generate("The cat", max_new_tokens=2, stop_token_ids=stop)


BAD_OPTIONS = [
    *(("temperature", value, "a number of at least 0") for value in (-0.1, "hot", True, [1.0], INFINITE, NO_NUMBER)),
    *(("top_k", value, "a whole number of at least 1, or None") for value in (0, -1, 1.5, "5", True, [5])),
    *(
        (name, value, "above 0 and at most 1, or None")
        for name in ("top_p", "min_p", "typical_p")
        for value in (0, -0.5, 1.01, "0.9", True, NO_NUMBER)
    ),
    *(("repetition_penalty", value, "a number above 0") for value in (0, -1, "1", True, INFINITE, 1e-45, 1e300)),
    *(
        (name, value, "a finite number")
        for name in ("presence_penalty", "frequency_penalty")
        for value in (INFINITE, NO_NUMBER, "1", True, [1], 1e300)
    ),
    *(("logit_bias", value, "map token ids to numbers") for value in ([(1, 2.0)], "a", 5)),
    *(("logit_bias", {500: value}, "a finite number") for value in (-INFINITE, NO_NUMBER, "1", None, -1e39)),
    *(("logit_bias", {token: 1.0}, "ids from 0 to 559") for token in (SIZE, -1, "a", 1.5, True)),
    *(("forbidden_tokens", value, "token ids") for value in ("500", [1.5], ["a"], [None], [True], [[500]], 500)),
    *(("forbidden_tokens", value, "ids from 0 to 559") for value in ([SIZE], [-1])),
    *(("logits_processors", value, "a list of functions") for value in (print, [None], ["a"], 5, "a")),
    *(("seed", value, "a whole number of at least 0, or None") for value in (-1, 1.5, "1", True, [1])),
    *(
        ("stop", value, "a string, or a list of strings")
        for value in ("", [""], 5, ["a", None], [["a"]], {"a": 1}, True)
    ),
    *(("verbose", value, '0, 1 or "auto"') for value in (2, -1, "yes", None, [1])),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD_OPTIONS)
def test_options_that_are_none_are_refused(model, name, value, allowed):
    with pytest.raises(InputError, match=f"`{name}.* {re.escape(allowed)}.*given ") as error:
        model.generate("The cat", max_new_tokens=2, **{name: value})
    parts = [part for item in value.items() for part in item] if isinstance(value, dict) else [value]
    parts += value if isinstance(value, list) else []
    assert any(shown in str(error.value) for part in parts for shown in (repr(part), type(part).__name__))


def test_every_option_has_bad_values_here():
    taken = set(inspect.signature(Gemma2CausalLM.generate).parameters) - {"self", "inputs", "sampling", "strip_prompt"}
    options = {field.name for field in dataclasses.fields(Sampling)} - {"sampler"}
    # Of the others, these have tests of their own.
    elsewhere = {"max_length", "max_new_tokens", "stop_token_ids", "return_stats"}
    assert {name for name, _, _ in BAD_OPTIONS} | elsewhere == taken | options


def test_forbidding_every_token_is_refused(model):
    with pytest.raises(InputError, match="`forbidden_tokens` forbids every token"):
        model.generate("The cat", max_new_tokens=2, forbidden_tokens=range(SIZE))


@pytest.mark.parametrize("name", ["temprature", "sampler", "max_tokens", "values"])
def test_an_unknown_option_is_refused(model, name):
    for method in (model.generate, model.stream, lambda text, **options: model.chat().send(text, **options)):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            method("The cat", **{name: 1})


def test_what_a_processor_gives_is_checked(model):
    def halved(ids, logits):
        return logits[:, ::2]

    def undefined(ids, logits):
        return logits * float("nan")

    for processor, message in (
        (halved, r"Logits processor halved must return logits of shape \(1, 560\); it gave shape \(1, 280\)"),
        (undefined, "Logits processor undefined returned NaN in row 0"),
        (lambda ids, logits: None, "Logits processor <lambda> .* it gave nothing: does it lack a `return`"),
        (lambda ids, logits: "the", r"<lambda> must return logits of shape \(1, 560\) as an array; it gave str"),
        (lambda ids, logits: [logits[0], [1.0]], "<lambda> must return logits .* it gave list"),
        (lambda ids, logits: {}, "<lambda> must return logits .* it gave dict"),
        (lambda ids, logits: logits[0], r"<lambda> must return logits of shape \(1, 560\); it gave shape \(560,\)"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate("The cat", max_new_tokens=2, logits_processors=[processor])


@pytest.mark.parametrize(
    ("value", "what"),
    [(-np.inf, "-inf for every token"), (np.inf, "inf for every token"), (NO_NUMBER, "NaN"), (-3e38, "-inf for every")],
)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "top_p": 0.5, "typical_p": 0.5}], ids=["greedy", "random"]
)
def test_a_processor_that_leaves_no_choice_is_named_with_its_row(model, value, what, options):
    def fill(ids, logits):
        # The second row alone, and once it has made a token.
        logits[1] = value if len(ids[1]) > length else logits[1]
        return logits

    prompts, length = ["The cat", "The dog sat"], len(model.preprocessor.tokenizer.encode("The dog sat")) + 1
    for processors in ([fill], [lambda ids, logits: logits, fill, lambda ids, logits: logits]):
        with pytest.raises(InputError, match=f"Logits processor fill returned {what}.* in row 1, from which no token"):
            model.generate(prompts, max_new_tokens=4, logits_processors=processors, stop_token_ids=None, **options)


# In the whole table, in one row of it that no prompt has, in a projection.
@pytest.mark.parametrize("value", [NO_NUMBER, INFINITE])
@pytest.mark.parametrize("where", ["table", "word", "projection"])
@pytest.mark.parametrize("portable", [False, True], ids=["kernels", "portable"])
def test_a_model_whose_weights_are_no_numbers_says_so(where, value, portable, monkeypatch):
    if portable:
        monkeypatch.setattr(session, "is_supported", lambda backbone: False)
    model = tiny.causal_lm(num_layers=1)
    layer = model.backbone.transformer_layers[0].feed_forward.up_proj
    weight = layer.weight if where == "projection" else model.backbone.token_embedding.embeddings
    spoiled = np.array(ops.convert_to_numpy(weight))
    spoiled[slice(None) if where == "table" else SIZE - 1 if where == "word" else 3] = value
    weight.assign(spoiled)
    for options in ({}, {"temperature": 1.0, "seed": 1}, {"top_k": 5}, {"repetition_penalty": 1.2}):
        with pytest.raises(InputError, match="The model's logits are not finite"):
            model.generate("The cat", max_new_tokens=3, **options)
    with pytest.raises(InputError, match="The model's logits are not finite"):
        list(model.stream("The cat", max_new_tokens=3))


@pytest.mark.once
@pytest.mark.skipif(native.library() is None, reason="no C++ compiler here")
def test_kernels_never_follow_a_token_that_is_none(monkeypatch):
    model = tiny.causal_lm(num_layers=1)
    weight = model.backbone.layer_norm.weight
    weight.assign(ops.convert_to_numpy(weight) * NO_NUMBER)
    spoiled = Session(model.programs, 1, 20)
    # Numbers for the first token, and none for what follows it.
    monkeypatch.setattr(spoiled._native, "logits", lambda states: np.eye(1, SIZE, dtype="float32"))
    spoiled.extend([model.preprocessor.tokenizer.encode("The cat")])
    with pytest.raises(InputError, match="The model's logits are not finite"):
        list(spoiled.generate([8]))


class Own(keras_hub.samplers.Sampler):
    def __init__(self, chosen, **options):
        super().__init__(**options)
        self.chosen = chosen

    def get_next_token(self, probabilities):
        return self.chosen(probabilities)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (lambda p: ops.ones((1,), "int32") * 99999999, "ids from 0 to 559; given 99999999"),
        (lambda p: ops.ones((1,), "int32") * -1, "ids from 0 to 559; given -1"),
        (lambda p: p, r"a whole number for each of the 1 rows; given shape \(1, 560\)"),
        (lambda p: p[:, 0], "a whole number for each of the 1 rows; given .* dtype float32"),
        (lambda p: None, "a tensor of 1 token ids; given NoneType|a whole number for each .* dtype object"),
    ],
)
def test_what_a_sampler_of_ones_own_chooses_is_checked(bare, chosen, message):
    own = Gemma2CausalLM(bare.backbone)
    own.compile(sampler=Own(chosen))
    with pytest.raises(InputError, match=f"`Own.get_next_token` must return {message}"):
        own.generate(
            {"token_ids": np.array([[2, 480, 0, 0]]), "padding_mask": np.array([[1, 1, 0, 0]])}, stop_token_ids=None
        )


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        *[(samplers.BeamSampler(num_beams=n), "`num_beams` of BeamSampler") for n in (0, -1, 1.5, "3", None)],
        (samplers.BeamSampler(temperature=0), "`temperature` of BeamSampler must be a number above 0; given 0"),
        (samplers.BeamSampler(temperature=NO_NUMBER), "`temperature` of BeamSampler"),
        *[(samplers.ContrastiveSampler(k=k), "`k` of ContrastiveSampler") for k in (0, -1, SIZE + 1, 2.5)],
        *[
            (samplers.ContrastiveSampler(alpha=a), "`alpha` of Contrastive.* from 0 to 1")
            for a in (2, -1, "x", NO_NUMBER)
        ],
        (Own(lambda p: ops.argmax(p, -1), temperature=0.0), "`temperature` of Own must be a number above 0"),
    ],
)
def test_parameters_of_samplers_are_checked(model, bare, sampler, message):
    own = Gemma2CausalLM(bare.backbone, model.preprocessor)
    own.compile(sampler=sampler)
    with pytest.raises(InputError, match=message):
        own.generate("The cat", max_new_tokens=2)


@pytest.mark.parametrize("sampler", [None, 5, samplers.TopKSampler])
def test_a_sampler_that_is_none_is_refused_by_compile(bare, sampler):
    with pytest.raises(ValueError, match=r"`sampler` must be one of .* or an instance"):
        bare.compile(sampler=sampler)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"token_ids": [[2, 480], [2]], "padding_mask": [[1, 1], [1]]}, "must have one length: pad the shorter"),
        ({"token_ids": IDS.astype(object), "padding_mask": MASK}, "`token_ids` must be whole .* dtype object"),
        ({"token_ids": IDS, "padding_mask": MASK.astype(str)}, "`padding_mask` must be numbers, .* given dtype str"),
    ],
)
def test_what_is_no_array_of_numbers_is_not_continued(bare, inputs, message):
    with pytest.raises(InputError, match=message):
        bare.generate(inputs, stop_token_ids=None)


def test_lists_of_ids_are_continued(bare):
    inputs = {"token_ids": [[2, 480, 0]], "padding_mask": [[1, 1, 0]]}
    expected = bare.generate({name: np.array(rows) for name, rows in inputs.items()}, stop_token_ids=None)
    found = bare.generate(inputs, stop_token_ids=None)
    np.testing.assert_array_equal(found["token_ids"], expected["token_ids"])


def test_a_processor_may_leave_one_token_or_force_one(model):
    def only(ids, logits):
        return np.where(np.arange(logits.shape[1]) == 500, 0.0, -np.inf)[None]

    def forced(ids, logits):
        return np.where(np.arange(logits.shape[1]) == 500, np.inf, logits)

    expected = model.preprocessor.tokenizer.decode([500] * 3)
    for processor in (only, forced):
        for options in ({}, {"temperature": 1.0, "top_p": 0.9}):
            made = model.generate("The cat", max_new_tokens=3, logits_processors=[processor], **options)
            assert made == f"The cat{expected}"
    with pytest.raises(InputError, match="`logits_processors` and `forbidden_tokens` together leave no token"):
        model.generate("The cat", max_new_tokens=3, logits_processors=[only], forbidden_tokens=[500])


def test_of_a_row_that_has_ended_nothing_is_asked(model):
    def ends_the_first(ids, logits):
        forced = np.full_like(logits, -np.inf)
        forced[0, 1] = 0.0 if len(ids[0]) == length else NO_NUMBER
        forced[1, 500] = 0.0
        return forced

    length = len(model.preprocessor.tokenizer.encode("The cat")) + 1
    texts = model.generate(["The cat", "The dog"], max_new_tokens=4, logits_processors=[ends_the_first])
    assert texts == ["The cat", "The dog" + model.preprocessor.tokenizer.decode([500] * 4)]


@pytest.mark.parametrize("value", [NO_NUMBER, INFINITE, -INFINITE])
@pytest.mark.parametrize(
    "kind", [np.asarray, lambda x: x.tolist(), ops.convert_to_tensor], ids=["array", "list", "tensor"]
)
def test_weights_that_are_no_numbers_are_refused(value, kind):
    model = tiny.causal_lm(num_layers=1)
    x = {"token_ids": np.repeat(IDS, 4, axis=0), "padding_mask": np.repeat(MASK, 4, axis=0)}
    before = [np.array(ops.convert_to_numpy(w)) for w in model.weights]
    weights = np.ones((4, 3), "float32")
    weights[2, 1] = value
    for options in (
        {"sample_weight": kind(weights)},
        {"sample_weight": kind(weights[:, 1])},
        {"validation_data": (x, x["token_ids"], kind(weights))},
    ):
        with pytest.raises(InputError, match=r"`sample_weight` must be finite numbers; given -?(nan|inf) at \(2,"):
            model.fit(x, x["token_ids"], verbose=0, **options)
    with pytest.raises(InputError, match="`sample_weight` must be finite"):
        model.evaluate(x, x["token_ids"], sample_weight=kind(weights), verbose=0)
    for weight, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), old)


def test_weights_of_a_batch_are_looked_at(bare):
    class Batches(keras.utils.PyDataset):
        num_batches = 1

        def __getitem__(self, index):
            return {"token_ids": IDS, "padding_mask": MASK}, IDS, np.full(IDS.shape, NO_NUMBER)

    with pytest.raises(InputError, match="`sample_weight` must be finite"):
        bare.evaluate(Batches(), verbose=0)


@pytest.mark.once
@pytest.mark.parametrize("reduction", ["none", None])
def test_a_loss_that_is_no_single_number_is_refused(bare, reduction):
    with pytest.raises(ValueError, match=f"`loss` has the reduction {reduction!r}, a number for each token;"):
        bare.compile(loss=NextTokenLoss(reduction=reduction))


def test_options_for_text_are_refused_without_a_preprocessor(bare):
    with pytest.raises(InputError, match="`stop` needs a preprocessor"):
        bare.generate({"token_ids": IDS, "padding_mask": MASK}, stop_token_ids=None, stop="a")


@pytest.mark.parametrize("sampler", ["zebra", 5, "Greedy"])
def test_an_unknown_sampler_is_refused(bare, sampler):
    with pytest.raises(ValueError, match=rf"sampler.*{sampler}"):
        bare.compile(sampler=sampler)


def test_bad_scores_are_refused(model):
    with pytest.raises(InputError, match="`scoring_mode` must be"):
        model.score(IDS, MASK, scoring_mode="entropy")
    with pytest.raises(InputError, match='`scoring_mode="loss"` needs `target_ids`'):
        model.score(IDS, MASK, scoring_mode="loss")
    with pytest.raises(InputError, match="must lie between 0 and 559; given 562"):
        model.score(IDS, MASK, scoring_mode="loss", target_ids=IDS + SIZE)
    with pytest.raises(InputError, match=r"`target_ids` must have the shape of `token_ids`, \(1, 3\)"):
        model.score(IDS, MASK, scoring_mode="loss", target_ids=IDS[:, :2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "`rank` must be"),
        ({"rank": 1.5}, "`rank` must be"),
        ({"rank": 2, "targets": ["zebra"]}, "must be among .*'q_proj'"),
        ({"rank": 2, "targets": []}, "must be among"),
        ({"rank": 2, "alpha": 0}, "`alpha` must be"),
    ],
)
def test_refused_adapters_change_nothing(model, arguments, message):
    count = len(model.trainable_variables)
    with pytest.raises(ValueError, match=message):
        model.enable_lora(**arguments)
    assert len(model.trainable_variables) == count
    assert not [v for v in model.variables if "lora" in v.path]


class Broken(keras.utils.PyDataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return ["The cat", ""]


def test_a_bad_batch_in_a_dataset_is_named(model):
    with pytest.raises(InputError, match="1 is an empty string"):
        model.evaluate(Broken(), verbose=0)


def test_options_of_a_dataset_are_checked(model):
    tensorflow = pytest.importorskip("tensorflow")
    dataset = tensorflow.data.Dataset.from_tensor_slices(["The cat"])
    with pytest.raises(InputError, match="`temperature` must be"):
        model.generate(dataset, temperature=-1)
    with pytest.raises(InputError, match="`verbose` must be"):
        model.generate(dataset, verbose="yes", max_new_tokens=1)
    texts, stats = model.generate(dataset, max_new_tokens=1, return_stats=True)
    assert (len(texts), stats.new_tokens) == (1, 1)


def test_more_candidates_than_tokens_are_all_of_them(model):
    options = {"max_new_tokens": 4, "temperature": 3.0, "seed": 1}
    assert model.generate("The cat", top_k=10**40, **options) == model.generate("The cat", top_k=SIZE, **options)


@pytest.mark.parametrize("which", ["token_ids", "y"])
def test_ids_in_a_dataset_are_looked_at_when_they_come(bare, which):
    import tensorflow as tf

    ids, labels = (IDS + SIZE * (which == name) for name in ("token_ids", "y"))
    dataset = tf.data.Dataset.from_tensor_slices(({"token_ids": ids, "padding_mask": MASK}, labels)).batch(1)
    bare.compile("sgd")
    before = [ops.convert_to_numpy(v).copy() for v in bare.trainable_variables]
    with pytest.raises(Exception, match=f"`{which}` must lie between 0 and 559"):
        bare.fit(dataset, verbose=0)
    for variable, value in zip(bare.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


@pytest.mark.once
def test_a_missing_text_in_a_table_is_named(model):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(InputError, match="None"):
        model.fit(datasets.Dataset.from_dict({"text": ["a", "b", None]}), verbose=0)
