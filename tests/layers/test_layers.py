from __future__ import annotations

import doctest
import importlib
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from gemma2_keras.layers.attention import Attention
from gemma2_keras.layers.cache import ChunkCache, StepCache, with_chunk
from gemma2_keras.layers.context import SequenceContext
from gemma2_keras.layers.decoder_block import DecoderBlock
from gemma2_keras.layers.embedding import TokenEmbedding
from gemma2_keras.layers.feed_forward import FeedForward
from gemma2_keras.layers.initialization import BlockwiseNormal, awaiting_weights
from gemma2_keras.layers.linear import Linear
from gemma2_keras.layers.low_rank import LowRank
from gemma2_keras.layers.norm import RMSNorm

array = ops.convert_to_numpy
BLOCK = {
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_dim": 10,
    "attention_scale": 0.3,
    "attention_logit_soft_cap": 2.0,
    "local": True,
    "layer_norm_epsilon": 1e-3,
}
POLICIES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def filled(layer):
    """The layer with normal weights."""
    random = np.random.default_rng(1)
    for weight in layer.weights:
        weight.assign(random.normal(0, 0.5, weight.shape).astype("float32"))
    return layer


def context_of(mask, window=3, **kwargs):
    return SequenceContext(head_dim=6, max_wavelength=100.0, window=window, **kwargs)(np.asarray(mask))


@pytest.mark.once
@pytest.mark.parametrize(
    "layer",
    [
        Linear(3),
        RMSNorm(1e-3),
        FeedForward(7, name="feed"),
        TokenEmbedding(11, 4, final_logit_soft_cap=30.0, dtype="bfloat16"),
        SequenceContext(4, 10_000.0, 2),
        Attention(4, 2, 6, 0.3, None, local=False),
        DecoderBlock(**BLOCK, dropout=0.2, dtype="mixed_bfloat16"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_configuration_makes_the_same_layer(layer):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()
    assert again.dtype_policy == layer.dtype_policy


# Linear


def test_linear_multiplies_by_its_transposed_weight():
    layer, x = Linear(3), normal(2, 4, 5)
    layer.build(x.shape)
    filled(layer)
    assert layer.weight.shape == (3, 5)
    np.testing.assert_allclose(array(layer(x)), x @ array(layer.weight).T, rtol=1e-5, atol=1e-6)


def test_linear_saves_its_adapter_beside_the_weight():
    layer, x = Linear(3), normal(2, 5)
    layer.build(x.shape)
    base = array(filled(layer).weight)
    layer.enable_lora(2, alpha=5)
    a, b = normal(2, 5, seed=2), normal(3, 2, seed=3)
    layer.lora_a.assign(a)
    layer.lora_b.assign(b)
    store = {}
    layer.save_own_variables(store)
    store = {name: array(value) for name, value in store.items()}
    np.testing.assert_array_equal(store["0"], base)
    expected = x @ (base + 5 / 2 * b @ a).T
    np.testing.assert_allclose(array(layer(x)), expected, rtol=1e-5, atol=1e-5)

    with pytest.raises(ValueError, match="same `alpha`"):
        layer.load_own_variables({**store, "lora_scale": np.float32(1.0)})
    layer.load_own_variables({"0": base})
    np.testing.assert_allclose(array(layer(x)), x @ base.T, rtol=1e-5, atol=1e-5)
    layer.load_own_variables(store)
    np.testing.assert_allclose(array(layer(x)), expected, rtol=1e-5, atol=1e-5)

    plain = Linear(3)
    plain.build(x.shape)
    with pytest.raises(ValueError, match=r"adapter of rank 2.*enable_lora\(2\)"):
        plain.load_own_variables(store)


@pytest.mark.parametrize(
    ("rank", "alpha", "named"),
    [(0, None, "rank"), (2.0, None, "rank"), (True, None, "rank"), (2, 0, "alpha"), (2, -1, "alpha")],
)
def test_linear_refuses_adapters_that_cannot_be(rank, alpha, named):
    layer = Linear(3)
    with pytest.raises(ValueError, match="no weight yet"):
        layer.enable_lora(2)
    layer.build((None, 5))
    with pytest.raises(ValueError, match=f"`{named}`"):
        layer.enable_lora(rank, alpha)
    assert layer.trainable_variables == [layer.weight]
    layer.enable_lora(2)
    with pytest.raises(ValueError, match="already"):
        layer.enable_lora(2)


def adapted_layer(spec, dtype=None):
    layer = Linear(3, dtype=dtype)
    layer.build((None, 5))
    layer.weight.assign(normal(3, 5))
    layer.add_adapter("one", spec)
    layer.select("one")
    for seed, variable in enumerate(layer.adapters["one"].variables.values()):
        variable.assign(normal(*variable.shape, seed=seed + 5))
    return layer


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "alpha": 9.0}])
def test_linear_adapters_are_what_their_formulas_say(options):
    spec = LowRank(4, **{"alpha": 6.0, **options})
    layer, x = adapted_layer(spec), normal(2, 5, seed=1)
    a, b, *magnitude = (array(v) for v in layer.adapters["one"].variables.values())
    whole = array(layer.weight) + spec.alpha / (2 if spec.use_rslora else 4) * b @ a
    if magnitude:
        whole *= (magnitude[0] / np.linalg.norm(whole, axis=1))[:, None]
    np.testing.assert_allclose(array(layer(x)), x @ whole.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.merged_weight(), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_linear_adapters_start_from_no_effect(use_dora):
    layer, x = Linear(3), normal(2, 5)
    layer.build(x.shape)
    before = array(layer(x))
    layer.add_adapter("one", LowRank(2, use_dora=use_dora))
    layer.select("one")
    np.testing.assert_allclose(array(layer(x)), before, rtol=1e-6)
    assert all(v.dtype == "float32" for v in layer.adapters["one"].variables.values())


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_linear_unmerges_bit_for_bit(dtype, use_dora):
    layer, x = adapted_layer(LowRank(2, use_dora=use_dora), dtype), normal(2, 5, seed=1)
    base, adapted = np.array(array(layer.weight)), array(ops.cast(layer(x), "float32"))
    layer.merge()
    assert layer.adapter is None
    assert (array(layer.weight) != base).any()
    merged = array(ops.cast(layer(x), "float32"))
    np.testing.assert_allclose(
        merged, adapted, rtol=1e-5 if dtype == "float32" else 0.05, atol=1e-5 if dtype == "float32" else 0.2
    )
    store = {}
    layer.save_own_variables(store)
    np.testing.assert_array_equal(array(store["0"]), base)
    with pytest.raises(ValueError, match="merged"):
        layer.load_own_variables(store)
    layer.unmerge()
    np.testing.assert_array_equal(array(layer.weight), base)
    np.testing.assert_array_equal(array(ops.cast(layer(x), "float32")), adapted)


@pytest.mark.parametrize("use_dora", [False, True])
def test_linear_drops_the_input_of_its_adapter_in_training_alone(use_dora):
    layer, x = adapted_layer(LowRank(2, dropout=0.5, use_dora=use_dora)), np.repeat(normal(1, 5), 10_000, axis=0)
    without = array(adapted_layer(LowRank(2, use_dora=use_dora))(x))
    np.testing.assert_array_equal(array(layer(x)), without)
    np.testing.assert_array_equal(array(layer(x, training=False)), without)
    dropped, others = (array(ops.stop_gradient(layer(x, training=True))) for _ in range(2))
    assert (dropped.std(axis=0) > 0.1).all()
    assert np.abs(dropped - others).max() > 0.1
    # The mean over what is dropped is what stands without, but for chance.
    assert (np.abs(dropped.mean(axis=0) - without[0]) < 5 * dropped.std(axis=0) / len(x) ** 0.5).all()


def test_linear_holds_adapters_by_name():
    layer, x = adapted_layer(LowRank(2, dropout=0.1)), normal(2, 5, seed=1)
    one = array(layer(x))
    count = len(layer.variables)
    layer.add_adapter("two", LowRank(3))
    np.testing.assert_array_equal(array(layer(x)), one)
    layer.select("two")
    assert layer.trainable_variables == list(layer.adapters["two"].variables.values())
    assert len({v.path for v in layer.variables}) == len(layer.variables)
    np.testing.assert_allclose(array(layer(x)), x @ array(layer.weight).T, rtol=1e-5, atol=1e-5)
    layer.select("one", trainable=False)
    assert not layer.trainable_variables
    np.testing.assert_array_equal(array(layer(x)), one)
    layer.remove_adapter("two")
    assert len(layer.variables) == count
    layer.remove_adapter("one")
    assert layer.variables == [layer.weight]
    store = {}
    adapted_layer(LowRank(2)).save_own_variables(store)
    with pytest.raises(ValueError, match=r"rank 2.*name='one'"):
        layer.load_own_variables({key: array(value) for key, value in store.items()})


def test_linear_refuses_weights_of_another_kind_of_adapter():
    store = {}
    adapted_layer(LowRank(2)).save_own_variables(store)
    store = {key: array(value) for key, value in store.items()}
    for spec, message in (
        (LowRank(3), "rank 2"),
        (LowRank(2, use_rslora=True), "factor"),
        (LowRank(2, use_dora=True), "use_dora"),
    ):
        layer = adapted_layer(spec)
        before = array(layer.lora_b)
        with pytest.raises(ValueError, match=message):
            layer.load_own_variables(store)
        np.testing.assert_array_equal(array(layer.lora_b), before)


@pytest.mark.once
@pytest.mark.parametrize(
    "options", [{"dropout": 1.0}, {"dropout": -0.1}, {"dropout": True}, {"use_dora": 1}, {"use_rslora": None}]
)
def test_options_of_adapters_that_cannot_be(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        LowRank(2, **options)


# Embedding


def test_embedding_scales_by_the_root_of_its_width():
    layer, ids = TokenEmbedding(11, 5), np.array([[1, 10, 0]])
    layer.build(ids.shape)
    table = array(filled(layer).embeddings)
    np.testing.assert_allclose(array(layer(ids)), table[ids] * math.sqrt(5), rtol=1e-6)


def test_embedding_scale_is_rounded_to_the_compute_dtype():
    layer = TokenEmbedding(3, 3584, dtype="bfloat16")
    layer.build((None, None))
    layer.embeddings.assign(np.ones((3, 3584), "float32"))
    # The root of 3584 is 59.87; the nearest bfloat16 is 59.75.
    assert set(array(ops.cast(layer(np.array([[1]])), "float32")).ravel()) == {59.75}


@pytest.mark.parametrize("cap", [None, 1.5])
def test_reversed_embedding_gives_capped_float32_logits(cap):
    layer, x = TokenEmbedding(11, 5, cap), normal(2, 3, 5)
    layer.build((None, None))
    logits = x @ array(filled(layer).embeddings).T
    expected = logits if cap is None else cap * np.tanh(logits / cap)
    np.testing.assert_allclose(array(layer(x, reverse=True)), expected, rtol=1e-5, atol=1e-6)
    half = TokenEmbedding(11, 5, cap, dtype="bfloat16")
    half.build((None, None))
    assert array(half(ops.cast(x, "bfloat16"), reverse=True)).dtype == "float32"


# Blocks


def test_feed_forward_gates():
    layer, x = FeedForward(7), normal(2, 3, 4)
    layer.build(x.shape)
    gate, up, down = (array(getattr(filled(layer), f"{name}_proj").weight) for name in ("gate", "up", "down"))
    hidden = x @ gate.T
    hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))) * (x @ up.T)
    np.testing.assert_allclose(array(layer(x)), hidden @ down.T, rtol=1e-4, atol=1e-5)


def test_context_masks_padding_the_future_and_what_left_the_window():
    context = context_of([[0, 1, 1, 1, 0]], window=2)
    seen = [[0] * 5, [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0] * 5]
    near = [[0] * 5, [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0] * 5]
    assert array(context.global_mask).astype(int).tolist() == [seen]
    assert array(context.local_mask).astype(int).tolist() == [near]
    assert context.mask(local=True) is context.local_mask
    assert context.mask(local=False) is context.global_mask
    np.testing.assert_allclose(array(context.sine)[0, :, 0, 0], np.sin([0, 0, 1, 2, 0]), rtol=1e-6)


def test_context_keeps_packed_examples_apart():
    """Each example of a row has what it has in a row of its own, padding inside and between examples or not."""
    packed = context_of([[3, 3, 0, 3, 7, 7, 0, 7, 7]], window=2)
    for example, length in (([0, 1, 3], 3), ([4, 5, 7, 8], 4)):
        alone = context_of([[1] * length], window=2)
        for name in ("global_mask", "local_mask"):
            found = array(getattr(packed, name))[0][example]
            np.testing.assert_array_equal(found[:, example], array(getattr(alone, name))[0])
            assert found.sum() == array(getattr(alone, name)).sum()
        for name in ("cosine", "sine"):
            np.testing.assert_array_equal(array(getattr(packed, name))[0, example], array(getattr(alone, name))[0])
    assert not array(packed.global_mask)[0, [2, 6]].any()


@pytest.mark.parametrize("policy", POLICIES)
def test_context_is_float32_under_every_policy(policy):
    context = context_of([[1, 1]], dtype=policy)
    assert {keras.backend.standardize_dtype(x.dtype) for x in (context.cosine, context.sine)} == {"float32"}


def test_symbolic_context_is_of_the_shapes_and_dtypes_of_the_real_one():
    layer = SequenceContext(head_dim=6, max_wavelength=100.0, window=3)
    symbolic, real = layer(keras.Input((5,), batch_size=2, dtype="int32")), layer(np.ones((2, 5), "int32"))
    for told, made in zip(symbolic, real, strict=True):
        assert tuple(told.shape) == tuple(made.shape)
        assert told.dtype == keras.backend.standardize_dtype(made.dtype)


def test_block_keeps_the_shape_and_the_compute_dtype():
    layer = DecoderBlock(**BLOCK, dtype="mixed_bfloat16")
    x = ops.cast(normal(2, 5, 8), "bfloat16")
    y = layer(x, context=context_of(np.ones((2, 5)), dtype="mixed_bfloat16"))
    assert tuple(y.shape) == (2, 5, 8)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert {w.dtype for w in layer.weights} == {"float32"}
    assert len(layer.weights) == 4 + 4 + 3


def test_block_adds_normalised_branches():
    layer, x = DecoderBlock(**BLOCK), normal(1, 4, 8)
    layer.build(x.shape)
    filled(layer)
    for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
        norm.weight.assign(-np.ones(8, "float32"))  # which silences a branch
    np.testing.assert_array_equal(array(layer(x, context=context_of([[1] * 4]))), x)
    layer.post_feedforward_layernorm.weight.assign(np.zeros(8, "float32"))
    branch = array(layer(x, context=context_of([[1] * 4]))) - x
    np.testing.assert_allclose(np.sqrt((branch**2).mean(-1)), 1, atol=0.01)


def test_dropout_acts_in_training_only():
    layer, x = DecoderBlock(**BLOCK, dropout=0.5), normal(1, 4, 8)
    context = context_of([[1] * 4])
    silent = array(layer(x, context=context))
    np.testing.assert_array_equal(array(layer(x, context=context, training=False)), silent)
    assert (array(layer(x, context=context, training=True)) != silent).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_await_a_checkpoint_without_being_drawn(dtype):
    layer, random = Linear(3, dtype=dtype), Linear(3, dtype=dtype)
    with awaiting_weights():
        layer.build((None, 5))
    assert tuple(layer.weight.shape) == (3, 5)
    assert keras.backend.standardize_dtype(layer.weight.dtype) == dtype
    layer.weight.assign(np.ones((3, 5)))
    np.testing.assert_array_equal(array(layer.weight), 1)
    random.build((None, 5))
    assert array(random.weight).all()


# Caches


@settings(max_examples=25)
@given(
    lengths=st.tuples(*[st.integers(0, 9)] * 3),
    counts=st.tuples(*[st.integers(0, 8)] * 3),
    slots=st.sampled_from([4, 17]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_new_tokens_are_written_behind_those_of_their_row(lengths, counts, slots, dtype):
    """Each row against a ring that is written token by token; the chunk is two rows that tokens of three share."""
    cached, chunk = normal(3, slots, 2, 5), normal(2, 12, 2, 5, seed=1)
    # Numbers that bfloat16 has, too.
    cached, chunk = (np.round(x * 8) / 8 for x in (cached, chunk))
    offsets = np.cumsum([0, *counts])[:3]
    expected = cached.copy()
    for row, (length, offset, count) in enumerate(zip(lengths, offsets, counts, strict=True)):
        for i in range(count):
            expected[row, (length + i) % slots] = chunk.reshape(24, 2, 5)[offset + i]
    found = with_chunk(
        ops.cast(cached, dtype),
        ops.convert_to_tensor(chunk),
        *(ops.convert_to_tensor(np.asarray(x, "int32")) for x in (lengths, offsets, counts)),
    )
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    np.testing.assert_array_equal(array(ops.cast(found, "float32")), expected)


def test_a_chunk_attends_to_itself_and_to_what_was_cached_before():
    keys, values = ops.convert_to_tensor(normal(2, 3, 2, 4)), ops.convert_to_tensor(normal(2, 3, 2, 4, seed=1))
    alone = ChunkCache(None)
    assert alone.update_and_fetch(keys, values) == (keys, values)
    past = tuple(ops.cast(normal(2, 5, 2, 4, seed=seed), "bfloat16") for seed in (2, 3))
    behind = ChunkCache(past)
    for found, old, new in zip(behind.update_and_fetch(keys, values), past, (keys, values), strict=True):
        assert found.dtype == new.dtype
        np.testing.assert_array_equal(array(found)[:, :5], array(ops.cast(old, "float32")))
        np.testing.assert_array_equal(array(found)[:, 5:], array(new))
    assert alone.chunk == behind.chunk == (keys, values)


def test_a_step_is_written_at_the_place_of_its_row_before_it_is_attended_to():
    buffers = [normal(3, 4, 2, 5, seed=seed) for seed in (0, 1)]
    new = [normal(3, 1, 2, 5, seed=seed) for seed in (2, 3)]
    cache = StepCache(*(ops.convert_to_tensor(x.copy()) for x in buffers), ops.convert_to_tensor([0, 3, 9], "int32"))
    fetched = cache.update_and_fetch(*map(ops.convert_to_tensor, new))
    for found, kept, buffer, value in zip(fetched, (cache.keys, cache.values), buffers, new, strict=True):
        buffer[np.arange(3), [0, 3, 1]] = value[:, 0]
        np.testing.assert_array_equal(array(found), buffer)
        np.testing.assert_array_equal(array(kept), buffer)


# Examples in docstrings


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "errors",
        "ops.attention",
        "ops.cache",
        "ops.feed_forward",
        "ops.masks",
        "ops.norm",
        "ops.rotary",
        "layers.attention",
        "layers.cache",
        "layers.context",
        "layers.decoder_block",
        "layers.embedding",
        "layers.feed_forward",
        "layers.initialization",
        "layers.linear",
        "layers.low_rank",
        "layers.norm",
    ],
)
def test_examples(module):
    assert doctest.testmod(importlib.import_module(f"gemma2_keras.{module}")).failed == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_large_weights_are_drawn_in_blocks_that_differ(dtype):
    # Two whole blocks and a part of a third.
    drawn = BlockwiseNormal(stddev=0.02, seed=3)((9000, 1024), dtype)
    assert keras.backend.standardize_dtype(drawn.dtype) == dtype
    numbers = array(ops.cast(drawn, "float32"))
    assert abs(numbers.mean()) < 1e-4
    assert abs(numbers.std() - 0.02) < 1e-4
    starts = numbers[0], numbers[4096], numbers[8192]
    assert not any((a == b).all() for a, b in zip(starts, (*starts[1:], starts[0]), strict=True))
    again = BlockwiseNormal(stddev=0.02, seed=3)((9000, 1024), dtype)
    np.testing.assert_array_equal(array(ops.cast(again, "float32")), numbers)
