"""The loss in blocks of tokens against the loss of all logits at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from gemma2_keras import kernels
from gemma2_keras.kernels import native
from gemma2_keras.ops import cross_entropy as portable
from gemma2_keras.ops.cross_entropy import LossTerms, Teacher

BACKEND = keras.backend.backend()
array = ops.convert_to_numpy
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler here")


def value_and_gradients(function, *tensors):
    """`function`'s loss, its other sums, and the gradients with respect to `tensors`."""
    if BACKEND == "jax":
        import jax

        def run(*tensors):
            sums = function(*tensors)
            return sums.loss, sums

        (_, sums), gradients = jax.value_and_grad(run, range(len(tensors)), has_aux=True)(*tensors)
    elif BACKEND == "torch":
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        sums = function(*tensors)
        sums.loss.backward()
        gradients = [tensor.grad for tensor in tensors]
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            sums = function(*tensors)
        gradients = tape.gradient(sums.loss, tensors)
    return [float(array(x)) for x in sums], [array(ops.cast(x, "float32")) for x in gradients]


def problem(seed, tokens, width, vocabulary, dtype="float32"):
    random = np.random.default_rng(seed)
    weights = random.choice([0.0, 0.0, 0.3, 1.0, 2.0], tokens)
    weights[0] = 1.0
    return (
        # Logits of one size for any width: where the cap is reached, words would come first by chance.
        ops.convert_to_tensor(random.normal(size=(tokens, width)) * (5 / width) ** 0.5, dtype),
        ops.convert_to_tensor(random.normal(size=(vocabulary, width)), dtype),
        ops.convert_to_tensor(random.integers(0, vocabulary, tokens), "int32"),
        ops.convert_to_tensor(weights, "float32"),
    )


# A shape is compiled anew on JAX.
@settings(max_examples=40 if BACKEND == "torch" else 8)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 40),
    width=st.integers(1, 70),
    vocabulary=st.integers(2, 300),
    cap=st.sampled_from([None, 30.0, 1.5]),
    terms=st.sampled_from([LossTerms(), LossTerms(0.1, 0.0), LossTerms(0.0, 0.01), LossTerms(0.2, 0.003)]),
    rows=st.sampled_from([8, 16, 1024]),
    table_trains=st.booleans(),
)
def test_sums_and_gradients_are_those_of_all_logits(seed, tokens, width, vocabulary, cap, terms, rows, table_trains):
    hidden, table, labels, weights = problem(seed, tokens, width, vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "_BLOCK", rows * vocabulary)
        found, expected = (
            value_and_gradients(
                lambda h, t=table, f=f: f(h, t, labels, weights, cap, terms, True, table_trains),
                *((hidden, table) if table_trains else (hidden,)),
            )
            for f in (kernels.projected_cross_entropy, portable.projected_cross_entropy)
        )
        alone = kernels.projected_cross_entropy(hidden, table, labels, weights, cap, terms, False, table_trains)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose([float(array(x)) for x in alone], expected[0], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def taught(seed, tokens, words, vocabulary, dtype="float32"):
    """For each token some words, each once, with shares of a part of the probability."""
    random = np.random.default_rng(seed)
    ids = np.stack([random.permutation(vocabulary)[:words] for _ in range(tokens)])
    shares = random.dirichlet(np.full(words, 0.5), tokens) * random.uniform(0.5, 1.0, (tokens, 1))
    return Teacher(ops.convert_to_tensor(ids, "int32"), ops.convert_to_tensor(shares, dtype))


@settings(max_examples=40 if BACKEND == "torch" else 8)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 30),
    vocabulary=st.integers(2, 200),
    words=st.integers(1, 40),
    dtype=st.sampled_from(["float32", "float16"]),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    terms=st.sampled_from([LossTerms(), LossTerms(0.2, 0.003)]),
    cap=st.sampled_from([None, 30.0, 1.5]),
    rows=st.sampled_from([8, 1024]),
    table_trains=st.booleans(),
)
def test_sums_and_gradients_with_a_teacher_are_those_of_all_logits(
    seed, tokens, vocabulary, words, dtype, weight, temperature, terms, cap, rows, table_trains
):
    hidden, table, labels, weights = problem(seed, tokens, 9, vocabulary)
    teacher = taught(seed, tokens, min(words, vocabulary), vocabulary, dtype)
    # Tokens that do not count need no shares.
    teacher = teacher._replace(shares=teacher.shares * ops.cast(weights != 0, dtype)[:, None])
    terms = terms._replace(teacher_weight=weight, temperature=temperature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "_BLOCK", rows * vocabulary)
        found, expected = (
            value_and_gradients(
                lambda h, t=table, f=f: f(h, t, labels, weights, cap, terms, True, table_trains, teacher),
                *((hidden, table) if table_trains else (hidden,)),
            )
            for f in (kernels.projected_cross_entropy, portable.projected_cross_entropy)
        )
        alone = kernels.projected_cross_entropy(hidden, table, labels, weights, cap, terms, False, False, teacher)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose([float(array(x)) for x in alone], expected[0], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_over_all_words_it_is_the_divergence_from_the_teacher_but_for_its_entropy(temperature):
    tokens, vocabulary = 20, 50
    hidden, table, labels, _ = problem(3, tokens, 9, vocabulary)
    theirs = np.random.default_rng(4).normal(size=(tokens, vocabulary)) * 2
    order = np.argsort(-theirs, axis=-1)
    shares = np.take_along_axis(np.exp(log_softmax(theirs)), order, axis=-1)
    teacher = Teacher(ops.convert_to_tensor(order, "int32"), ops.convert_to_tensor(shares, "float32"))
    terms = LossTerms(teacher_weight=1.0, temperature=temperature)
    ones = ops.ones((tokens,), "float32")
    sums = kernels.projected_cross_entropy(hidden, table, labels, ones, 8.0, terms, True, False, teacher)
    raw = array(hidden).astype("float64") @ array(table).astype("float64").T
    log_ours, log_theirs = (log_softmax(x / temperature) for x in (8.0 * np.tanh(raw / 8.0), theirs))
    shares = np.exp(log_theirs)
    divergence, entropy = (shares * (log_theirs - log_ours)).sum(), -(shares * log_theirs).sum()
    assert float(array(sums.loss)) == pytest.approx(temperature**2 * (divergence + entropy), rel=1e-5)


@needs_compiler
def test_a_teacher_does_not_go_to_the_cpu_kernel(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the kernel knows nothing of a teacher")

    monkeypatch.setattr(native, "expectation", refuse)
    if BACKEND == "jax":
        from gemma2_keras.kernels import jax as here

        monkeypatch.setattr(here, "_summed_by_kernel", refuse)
    hidden, table, labels, weights = problem(0, 6, 5, 11)
    arguments = labels, weights, 3.0, LossTerms(teacher_weight=0.5), False, False, taught(0, 6, 3, 11)
    kernels.projected_cross_entropy(hidden, table, *arguments)


def expectation(states, table, cap):
    """What `native.expectation` says, in float64."""
    raw = states.astype("float64") @ table.T.astype("float64")
    logits = raw if cap is None else cap * np.tanh(raw / cap)
    top = logits.max(-1, keepdims=True)
    shares = np.exp(logits - top)
    total = shares.sum(-1, keepdims=True)
    slope = 1.0 if cap is None else 1.0 - (logits / cap) ** 2
    return (top + np.log(total))[:, 0], logits.argmax(-1), shares / total * slope @ table


@pytest.mark.once
@needs_compiler
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 60),
    width=st.integers(1, 200),
    vocabulary=st.integers(1, 2000),
    cap=st.sampled_from([None, 30.0, 0.5]),
    scale=st.sampled_from([1e-3, 0.3, 3.0]),
    threads=st.integers(1, 3),
)
def test_the_cpu_kernel_knows_the_softmax(seed, tokens, width, vocabulary, cap, scale, threads):
    random = np.random.default_rng(seed)
    states, table = (random.normal(size=(n, width)).astype("float32") * scale**0.5 for n in (tokens, vocabulary))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(threads))
        found = native.expectation(states, table, cap, gradient=True)
        alone = native.expectation(states, table, cap, gradient=False)
        patch.setenv("OMP_NUM_THREADS", "2")
        again = native.expectation(states, table, cap, gradient=True)
    expected = expectation(states, table, cap)
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6, atol=2e-6 * width**0.5)
    # Where the cap is reached, any of the words that reach it may come first.
    logits = states @ table.T if cap is None else np.tanh(states @ table.T / cap)
    np.testing.assert_allclose(logits[np.arange(tokens), found[1]], logits.max(-1), rtol=1e-5, atol=1e-5)
    # A float32 logit is known to some units in its last place, which its probability repeats.
    slack = 1e-6 * max(1.0, np.abs(states @ table.T).max()) * np.abs(table).max()
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5, atol=slack)
    # Neither the number of threads nor what else is made changes a bit.
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(found[0], alone[0])
    assert alone[2].shape == (0, width)


@pytest.mark.once
@needs_compiler
def test_the_cpu_kernel_hands_on_what_is_not_a_number():
    states, table = np.ones((3, 4), "float32"), np.ones((40, 4), "float32")
    states[1, 2] = np.nan
    normaliser, _, expected = native.expectation(states, table, 30.0, gradient=True)
    assert np.isnan(normaliser).tolist() == [False, True, False]
    assert np.isnan(expected).all(-1).tolist() == [False, True, False]


@needs_compiler
@pytest.mark.skipif(BACKEND == "jax", reason="JAX calls it from within a program")
def test_a_frozen_table_goes_to_the_cpu_kernel(monkeypatch):
    calls = []
    whole = native.expectation
    monkeypatch.setattr(native, "expectation", lambda *a: calls.append(a[-1]) or whole(*a))
    hidden, table, labels, weights = problem(0, 6, 5, 11)
    for training in (True, False):
        kernels.projected_cross_entropy(hidden, table, labels, weights, 3.0, LossTerms(), training, False)
    assert calls == [True, False]


@needs_compiler
@pytest.mark.skipif(BACKEND != "jax", reason="JAX alone calls it from within a program")
def test_xla_calls_the_cpu_kernel():
    import jax

    hidden, table, labels, weights = problem(0, 6, 5, 11)

    def loss(hidden):
        return kernels.projected_cross_entropy(hidden, table, labels, weights, 3.0, LossTerms(), True, False).loss

    assert "gemma2_expectation" in jax.jit(jax.grad(loss)).lower(hidden).as_text()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only there is XLA a choice")
@pytest.mark.parametrize("words", [0, 3])
def test_xla_compiles_the_loss_without_the_cpu_kernel(words):
    import tensorflow as tf

    hidden, table, labels, weights = problem(0, 30, 5, 11)
    teacher = taught(0, 30, words, 11) if words else None
    terms = LossTerms(teacher_weight=0.5, temperature=2.0) if words else LossTerms()

    def run(hidden):
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            sums = kernels.projected_cross_entropy(hidden, table, labels, weights, 3.0, terms, True, False, teacher)
        return *sums, tf.convert_to_tensor(tape.gradient(sums.loss, hidden))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "_BLOCK", 8 * 11)
        for mine, theirs in zip(tf.function(run, jit_compile=True)(hidden), run(hidden), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_frozen_table_gets_no_gradient():
    hidden, table, labels, weights = problem(0, 6, 5, 11)
    arguments = labels, weights, 3.0, LossTerms(), True
    trained = value_and_gradients(
        lambda h, t: kernels.projected_cross_entropy(h, t, *arguments, table_trains=True), hidden, table
    )
    frozen = value_and_gradients(
        lambda h: kernels.projected_cross_entropy(h, table, *arguments, table_trains=False), hidden
    )
    np.testing.assert_allclose(frozen[1][0], trained[1][0], rtol=1e-5, atol=1e-6)


def test_no_token_that_counts_is_no_loss():
    hidden, table, labels, weights = problem(0, 6, 5, 11)
    sums, (gradient,) = value_and_gradients(
        lambda h: kernels.projected_cross_entropy(h, table, labels, weights * 0, 3.0, LossTerms(), True, False), hidden
    )
    assert sums == [0.0, 0.0, 0.0]
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("words", [0, 4])
def test_bfloat16_is_as_near_the_truth_as_all_logits_are(words):
    hidden, table, labels, weights = problem(1, 40, 64, 50, "bfloat16")
    terms = LossTerms(teacher_weight=0.5, temperature=2.0) if words else LossTerms()
    teacher = taught(1, 40, words, 50, "float16") if words else None

    def gradient(function, *tensors):
        tensors = [ops.cast(x, "float32") for x in tensors] if function is None else tensors
        function = function or portable.projected_cross_entropy
        return value_and_gradients(
            lambda h: function(h, tensors[1], labels, weights, 10.0, terms, True, False, teacher), tensors[0]
        )

    truth = gradient(None, hidden, table)
    plain = gradient(portable.projected_cross_entropy, hidden, table)
    found = gradient(kernels.projected_cross_entropy, hidden, table)
    error, usual = (np.linalg.norm(x[1][0] - truth[1][0]) for x in (found, plain))
    assert error <= 1.1 * usual
    np.testing.assert_allclose(found[0][:2], truth[0][:2], rtol=0.01)


_MEASURE = """
import numpy as np
from keras import ops
from gemma2_keras.kernels import compiled
from gemma2_keras.memory import peak_bytes
from gemma2_keras.layers.embedding import TokenEmbedding
from gemma2_keras.ops import cross_entropy
from gemma2_keras.ops.cross_entropy import LossTerms, Teacher

# So small that one block more or less at a time, which is chance where operations run side by side, is not seen.
cross_entropy._BLOCK = 2**23
words = {words}
terms = LossTerms(teacher_weight=0.5 if words else 0.0, temperature=2.0)
layer = TokenEmbedding(65536, 16, 30.0)
layer.build((None, None))
layer.embeddings.trainable = False

def run(states, labels):
    teacher = None
    if words:
        ids = ops.tile(labels[..., None], (1, 1, words))
        teacher = Teacher(ids, ops.ones_like(ids, "float16"))
    return tuple(layer.cross_entropy(states, labels, ops.ones_like(labels, "float32"), terms, True, teacher))

run = compiled(run, layer.variables, lambda: None, None)
peaks = []
for tokens in (1024, 1024, 6144):
    states = np.random.default_rng(0).normal(size=(1, tokens, 16)).astype("float32")
    ops.convert_to_numpy(run(states, np.ones((1, tokens), "int32"))[0])
    peaks.append(peak_bytes())
print(peaks[1], peaks[2])
"""


@pytest.mark.parametrize("words", [0, 4])
def test_memory_does_not_grow_with_tokens_times_vocabulary(words):
    code = _MEASURE.replace("{words}", str(words))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": BACKEND}
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    # The logits of the tokens that came in addition.
    assert after - before < 5120 * 65536 * 4 / 8
