"""A model whose sizes tell one axis from another, and the two ways it is run."""

from __future__ import annotations

import numpy as np
import pytest
from keras import ops

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM
from gemma2_keras.generation.session import Engine
from gemma2_keras.kernels import native

# All rows that are looked at whole are padded to one shape, so that it is compiled once.
ROWS, LENGTH = 4, 64


def network():
    backbone = Gemma2Backbone(
        vocabulary_size=13,
        num_layers=3,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=24,
        intermediate_dim=20,
        head_dim=8,
        query_pre_attention_scalar=6,
        attention_logit_soft_cap=10.0,
        sliding_window_size=4,
        context_length=LENGTH,
    )
    random = np.random.default_rng(0)
    backbone.set_weights([random.normal(0, 0.4, w.shape).astype("float32") for w in backbone.weights])
    return backbone


@pytest.fixture(scope="module")
def backbone():
    return network()


@pytest.fixture(scope="module")
def model(backbone):
    return Gemma2CausalLM(backbone)


@pytest.fixture(scope="module")
def programs(backbone):
    return Engine(backbone)


@pytest.fixture(params=["native", "portable"])
def path(request, monkeypatch):
    """Sessions that decode with the CPU kernels, and those that do not."""
    if request.param == "portable":
        monkeypatch.setattr("gemma2_keras.generation.session.is_supported", lambda backbone: False)
    elif native.library() is None:
        pytest.skip("no C++ compiler here")
    return request.param


@pytest.fixture
def portable(monkeypatch):
    monkeypatch.setattr("gemma2_keras.generation.session.is_supported", lambda backbone: False)


def whole_rows(programs, network):
    run = programs.program(
        lambda token_ids, padding_mask: network({"token_ids": token_ids, "padding_mask": padding_mask})
    )

    def call(rows):
        """What a network makes of whole rows, each padded on the right: (B, 64, …)."""
        ids, mask = np.zeros((2, -(-len(rows) // ROWS) * ROWS, LENGTH), "int32")
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        parts = [slice(start, start + ROWS) for start in range(0, len(ids), ROWS)]
        return np.concatenate([ops.convert_to_numpy(run(ids[part], mask[part])) for part in parts])[: len(rows)]

    return call


@pytest.fixture(scope="module")
def states(backbone):
    return whole_rows(Engine(backbone), backbone)


@pytest.fixture(scope="module")
def forward(backbone):
    def logits(inputs):
        return backbone.token_embedding(backbone(inputs), reverse=True)

    return whole_rows(Engine(backbone), logits)
