"""Perplexities of given texts against those from all logits."""

from __future__ import annotations

import numpy as np
import pytest
from keras import ops

from gemma2_keras import Gemma2CausalLM
from gemma2_keras.errors import InputError
from gemma2_keras.generation import engine
from tests.preprocessing import tiny
from tests.tasks.sharp import sharpened

TEXTS = ["The cat sat on the mat.", "7 + 5 = 12", "Once upon a time there was a dog.", "blue"]


@pytest.fixture(scope="module")
def short():
    """A model with a context of 24 tokens."""
    return sharpened(context_length=24)


def surprises(model, token_ids) -> np.ndarray:
    """Of each token but the first, in float64."""
    # One length for all, so that each shape is met once.
    padded = np.array([token_ids + [0] * (96 - len(token_ids))], "int32")
    inputs = {"token_ids": padded, "padding_mask": (np.arange(96) < len(token_ids))[None].astype("int32")}
    logits = ops.convert_to_numpy(ops.stop_gradient(model(inputs)))[0, : len(token_ids)].astype("float64")
    shifted = logits - logits.max(-1, keepdims=True)
    log_shares = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_shares[:-1], np.array(token_ids)[1:, None], -1)[:, 0]


def ids_of(model, text) -> list[int]:
    return [2, *model.preprocessor.tokenizer.encode(text)]


def expected_of(model, texts=TEXTS) -> np.ndarray:
    return np.exp([surprises(model, ids_of(model, text)).mean() for text in texts])


@pytest.mark.parametrize("chunk", [8, 16, 512])
def test_a_list_gives_what_each_text_has_alone(sharp, monkeypatch, chunk):
    monkeypatch.setattr(engine, "CHUNK", chunk)
    expected = expected_of(sharp)
    assert expected.max() > 2 * expected.min()
    found = sharp.perplexity(TEXTS, verbose=0)
    assert found.dtype == "float64"
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(sharp.perplexity(TEXTS[::-1], verbose=0)[::-1], found, rtol=1e-5)
    alone = [sharp.perplexity(text) for text in TEXTS]
    assert all(type(value) is float for value in alone)
    np.testing.assert_allclose(alone, found, rtol=1e-5)


def test_what_counts_is_what_training_counts_but_the_end(sharp):
    prompt, response = "The cat", " sat on the mat."
    start = len(ids_of(sharp, prompt)) - 1
    token_ids = ids_of(sharp, prompt) + sharp.preprocessor.tokenizer.encode(response)
    expected = np.exp(surprises(sharp, token_ids)[start:].mean())
    assert sharp.perplexity({"prompts": prompt, "responses": response}) == pytest.approx(expected, rel=1e-4)
    records = [{"prompt": prompt, "response": response}] * 2
    np.testing.assert_allclose(sharp.perplexity(records), [expected] * 2, rtol=1e-4)
    # A text says the same with and without the end that training puts behind it.
    bare_end = Gemma2CausalLM(sharp.backbone, tiny.preprocessor(add_end_token=False))
    np.testing.assert_allclose(bare_end.perplexity(TEXTS), sharp.perplexity(TEXTS), rtol=1e-6)


def test_of_conversations_what_the_model_says_counts(sharp):
    messages = [{"role": "user", "content": "The cat"}, {"role": "model", "content": "sat on the mat."}]
    (example,), single = sharp.preprocessor.encode_examples({"messages": messages})
    counted = np.array(example.counted[1:])
    assert single
    assert 0 < counted.sum() < len(counted)
    expected = np.exp(surprises(sharp, example.token_ids)[counted].mean())
    assert sharp.perplexity({"messages": messages}) == pytest.approx(expected, rel=1e-4)


def windowed(model, token_ids, context, stride) -> float:
    """By the rule: each token in the first window that has it, each window with the start token first."""
    found, last = [], 0
    inputs = len(token_ids) - 1
    for start in range(0, inputs, stride):
        stop = min(inputs, start + context)
        window = [2, *token_ids[start + 1 : stop + 1]]
        found.append(surprises(model, window)[last - start :])
        last = stop
        if stop == inputs:
            break
    found = np.concatenate(found)
    assert len(found) == inputs
    return np.exp(found.mean())


@pytest.mark.parametrize(("stride", "resolved"), [(None, 12), (24, 24), (5, 5)])
def test_a_long_text_is_read_in_windows(short, stride, resolved):
    text = " ".join(TEXTS * 3)
    token_ids = ids_of(short, text)
    assert len(token_ids) > 50
    found = short.perplexity([text, TEXTS[0]], stride, verbose=0)
    assert found[0] == pytest.approx(windowed(short, token_ids, 24, resolved), rel=1e-4)
    assert found[1] == pytest.approx(expected_of(short)[0], rel=1e-4)


def test_a_text_that_just_fits_is_read_whole(short):
    token_ids = ids_of(short, " ".join(TEXTS * 3))[:25]
    bare = Gemma2CausalLM(short.backbone)
    for count in (24, 25):
        inputs = {"token_ids": np.array([token_ids[:count]]), "padding_mask": np.ones((1, count), "int32")}
        expected = np.exp(surprises(short, token_ids[:count]).mean())
        np.testing.assert_allclose(bare.perplexity(inputs), [expected], rtol=1e-4)


def test_without_a_preprocessor_tokens_are_taken(sharp, bare):
    rows = [ids_of(sharp, text) for text in TEXTS]
    token_ids, mask = np.zeros((2, len(rows), 24), "int32")
    for i, row in enumerate(rows):
        # Padding may stand anywhere.
        token_ids[i, i : i + len(row)] = row
        mask[i, i : i + len(row)] = 1
    found = bare.perplexity({"token_ids": token_ids, "padding_mask": mask})
    np.testing.assert_allclose(found, expected_of(sharp), rtol=1e-4)
    with pytest.raises(InputError, match="a row with several examples has no perplexity"):
        bare.perplexity({"token_ids": token_ids, "padding_mask": mask * 2})
    with pytest.raises(InputError, match="The model takes a dictionary"):
        bare.perplexity(TEXTS)


def test_adapters_count_at_once():
    model = sharpened(num_layers=1)
    before = model.perplexity(TEXTS)
    model.enable_lora(2)
    random = np.random.default_rng(5)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0, 1, variable.shape))
    after = model.perplexity(TEXTS)
    assert (np.abs(after / before - 1) > 1e-2).any()
    np.testing.assert_allclose(after, expected_of(model), rtol=1e-4)


def test_it_is_that_of_evaluate():
    model = tiny.causal_lm(num_layers=1)
    model.preprocessor = tiny.preprocessor(add_end_token=False)
    model.compile("sgd")
    results = model.evaluate([TEXTS[1]], verbose=0, return_dict=True)
    assert model.perplexity(TEXTS[1]) == pytest.approx(results["perplexity"], rel=1e-4)


@pytest.mark.parametrize("stride", [0, -1, 97, 1.5, True, "12"])
def test_bad_stride_is_refused(sharp, stride):
    with pytest.raises(InputError, match="`stride` must be a whole number from 1 to the model's context of 96"):
        sharp.perplexity(TEXTS, stride)


def test_texts_without_anything_to_expect_are_refused(sharp, bare):
    alone = Gemma2CausalLM(sharp.backbone, tiny.preprocessor(add_start_token=False))
    assert len(alone.preprocessor.tokenizer.encode("7")) == 1
    with pytest.raises(InputError, match="Text 1 has no token to be expected from one before it: its 1 token can"):
        alone.perplexity([TEXTS[0], "7"])
    inputs = {"token_ids": np.array([[2, 5], [2, 5]]), "padding_mask": np.array([[1, 1], [1, 0]])}
    with pytest.raises(InputError, match="Text 1 has no token to be expected"):
        bare.perplexity(inputs)
    for nothing in ([], "", [""]):
        with pytest.raises(InputError, match="empty"):
            sharp.perplexity(nothing)


def test_progress_is_shown_when_asked_for(sharp, capsys):
    sharp.perplexity(TEXTS[0])
    sharp.perplexity(TEXTS, verbose=0)
    assert capsys.readouterr().out == ""
    sharp.perplexity(TEXTS, verbose=1)
    total = sum(len(ids_of(sharp, text)) - 1 for text in TEXTS)
    assert f"{total}/{total}" in capsys.readouterr().out
    with pytest.raises(InputError, match="`verbose` must be 0, 1"):
        sharp.perplexity(TEXTS, verbose=2)
