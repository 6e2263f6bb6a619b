"""Decoding with the CPU kernels: the weights stay where the backend keeps them, the cache is in NumPy arrays."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import ml_dtypes
import numpy as np
from keras import ops

from gemma2_keras.generation.engine import Cache, slot_counts
from gemma2_keras.generation.processors import no_numbers
from gemma2_keras.kernels import native, stored

_DTYPES = ("float32", "bfloat16")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def is_supported(backbone: Any) -> bool:
    """Whether the kernels can run a model: a compiler was found, and its weights lie in the CPU's memory."""
    if native.library() is None or backbone.compute_dtype not in _DTYPES:
        return False
    table = backbone.token_embedding.embeddings
    return table.dtype in _DTYPES and native.is_on_cpu(stored(table))


class NativeModel:
    """A backbone as the kernels see it, while its weights stay as they are.

    Args:
        backbone: a `Gemma2Backbone` for which `is_supported` is true.
    """

    def __init__(self, backbone: Any) -> None:
        self._library = native.library()
        self._kept: list[Any] = []
        self._weights: list[tuple[int, int]] = []
        self._model = self._described(backbone)
        self.config = backbone.config
        self.cache_dtype = np.dtype(ml_dtypes.bfloat16 if backbone.compute_dtype == "bfloat16" else "float32")

    def _described(self, backbone: Any) -> native.Model:
        config = backbone.config
        layers = (native.Layer * config.num_layers)()
        for layer, block in zip(layers, backbone.transformer_layers, strict=True):
            attention, feed_forward = block.attention, block.feed_forward
            norms = (
                block.input_layernorm,
                block.post_attention_layernorm,
                block.pre_feedforward_layernorm,
                block.post_feedforward_layernorm,
            )
            layer.norms = (ctypes.c_void_p * 4)(*(self._array(norm.weight) for norm in norms))
            layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down = (
                self._linear(getattr(attention if hasattr(attention, name) else feed_forward, name))
                for name in _PROJECTIONS
            )
            layer.window = config.sliding_window_size if block.local else 0
        frequencies = float(config.rope_max_wavelength) ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        # The factor is rounded to the compute dtype, as the embedding layer does.
        factor = ops.convert_to_numpy(ops.cast(ops.cast(config.hidden_dim**0.5, backbone.compute_dtype), "float32"))
        return native.Model(
            layers=config.num_layers,
            width=config.hidden_dim,
            heads=config.num_query_heads,
            key_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            hidden=config.intermediate_dim,
            vocabulary=config.vocabulary_size,
            weights_bfloat16=backbone.token_embedding.embeddings.dtype == "bfloat16",
            cache_bfloat16=backbone.compute_dtype == "bfloat16",
            scale=config.attention_scale,
            cap=config.attention_logit_soft_cap or 0.0,
            final_cap=config.final_logit_soft_cap or 0.0,
            epsilon=config.layer_norm_epsilon,
            embedding_scale=float(factor),
            frequencies=self._held(frequencies.astype("float32")),
            embedding=self._weight(backbone.token_embedding.embeddings),
            final_norm=self._array(backbone.layer_norm.weight),
            layer=layers,
        )

    def _linear(self, layer: Any) -> native.Linear:
        out, inputs = layer.weight.shape
        weight = self._weight(layer.weight)
        adapter = layer.adapter
        if adapter is None:
            return native.Linear(weight=weight, out=out, inputs=inputs)
        return native.Linear(
            weight=weight,
            a=self._array(adapter.a),
            b=self._array(adapter.b),
            factors=self._array(adapter.row_factors(layer.weight)) if adapter.spec.use_dora else None,
            out=out,
            inputs=inputs,
            rank=adapter.spec.rank,
            scale=adapter.spec.scale,
        )

    def _weight(self, variable: Any) -> int:
        where, kept = native.address(stored(variable))
        self._kept.append(kept)
        self._weights.append((where, int(np.prod(variable.shape)) * (2 if variable.dtype == "bfloat16" else 4)))
        return where

    def _array(self, variable: Any) -> int:
        """A small weight or tensor, as float32."""
        return self._held(ops.convert_to_numpy(variable).astype("float32"))

    def _held(self, array: np.ndarray) -> int:
        array = np.ascontiguousarray(array)
        self._kept.append(array)
        return array.ctypes.data

    def settle(self) -> None:
        """Move the weights to huge pages, which takes a second for each gigabyte, beside what else is done."""

        def move():
            for where, size in self._weights:
                self._library.gemma2_use_huge_pages(where, size)

        threading.Thread(target=move, name="huge pages", daemon=True).start()

    def empty_cache(self, rows: int, length: int) -> Cache:
        """As `engine.empty_cache`, of NumPy arrays."""
        shape = (self.config.num_key_value_heads, self.config.head_dim)
        layers = [
            tuple(np.zeros((rows, slots, *shape), self.cache_dtype) for _ in range(2))
            for slots in slot_counts(self.config, length)
        ]
        return {"layers": layers, "lengths": np.zeros(rows, "int32")}

    def write(self, cache: Cache, chunks: list, offsets: np.ndarray, counts: np.ndarray) -> None:
        """As `engine.write_chunk`, in place."""
        lengths = cache["lengths"]
        for pair, made in zip(cache["layers"], chunks, strict=True):
            for buffer, new in zip(pair, made, strict=True):
                slots, new = buffer.shape[1], new.reshape(-1, *new.shape[2:])
                for row, (length, offset, count) in enumerate(zip(lengths, offsets, counts, strict=True)):
                    # Of more tokens than there are slots the last ones stay.
                    first = max(0, count - slots)
                    places = np.arange(length + first, length + count) % slots
                    buffer[row, places] = new[offset + first : offset + count]
        cache["lengths"] = lengths + counts

    def decode(
        self,
        cache: Cache,
        tokens: np.ndarray,
        steps: int,
        left: np.ndarray,
        finished: np.ndarray,
        stop_ids: tuple[int, ...],
    ) -> np.ndarray:
        """Choose the likeliest token of each unfinished row, up to `steps` times.

        Args:
            cache: advanced by the tokens run.
            tokens: (B,) int32, the next to run; the last chosen on return.
            steps: most steps.
            left: (B,) int32, tokens that each row may still get; counted down.
            finished: (B,) uint8, rows to leave alone; set where a row ends.
            stop_ids: tokens that end a row.

        Returns:
            (B, steps run) int32; what stands behind the end of a row means nothing.

        Raises:
            InputError: if a row's logits are no numbers.
        """
        made = np.zeros((len(tokens), steps), "int32")
        run = self._run(cache, tokens, steps, finished, left, stop_ids, None, made)
        if run < 0:
            raise no_numbers()
        return made[:, :run]

    def step(self, cache: Cache, tokens: np.ndarray, finished: np.ndarray) -> np.ndarray:
        """Run one token of each unfinished row: (B, V) float32 logits of the next."""
        logits = np.empty((len(tokens), self.config.vocabulary_size), "float32")
        self._run(cache, tokens, 1, finished, None, (), logits, None)
        return logits

    def _run(
        self,
        cache: Cache,
        tokens: np.ndarray,
        steps: int,
        finished: np.ndarray,
        left: np.ndarray | None,
        stop_ids: tuple[int, ...],
        logits: np.ndarray | None,
        made: np.ndarray | None,
    ) -> int:
        for layer, (keys, values) in zip(self._layers(), cache["layers"], strict=True):
            layer.keys, layer.values, layer.slots = keys.ctypes.data, values.ctypes.data, keys.shape[1]
        stops = np.asarray(stop_ids, "int32")
        arrays = (tokens, cache["lengths"], finished, left, stops)
        return self._library.gemma2_decode(
            self._model,
            len(tokens),
            steps,
            native.threads(),
            *(_data(array) for array in arrays),
            len(stops),
            _data(logits),
            _data(made),
        )

    def _layers(self) -> list[Any]:
        return [self._model.layer[i] for i in range(self._model.layers)]

    def logits(self, states: np.ndarray) -> np.ndarray:
        """(B, D) states that went through the last norm to (B, V) float32 soft-capped logits."""
        states = np.ascontiguousarray(states, "float32")
        logits = np.empty((len(states), self.config.vocabulary_size), "float32")
        self._library.gemma2_logits(self._model, len(states), native.threads(), states.ctypes.data, logits.ctypes.data)
        return logits


def _data(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data
