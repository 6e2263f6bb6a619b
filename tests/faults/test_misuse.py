"""Things put together that do not belong together, and adapters added at odd times."""

import keras
import numpy as np
import pytest

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM
from gemma2_keras.errors import CheckpointError, InputError, PresetError
from tests.preprocessing import tiny

SMALL = {
    "vocabulary_size": 64,
    "num_layers": 1,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "head_dim": 4,
}


@pytest.mark.parametrize("dtype", ["float64", "int8_from_float32", "bool", "complex64", "mixed_float32x"])
def test_dtype_that_the_model_does_not_compute_in(dtype):
    with pytest.raises(ValueError, match=r"dtype|policy|identifier"):
        Gemma2Backbone(**SMALL, dtype=dtype)


@pytest.mark.once
def test_tokenizer_of_a_larger_model():
    preprocessor = tiny.causal_lm(num_layers=1).preprocessor
    with pytest.raises(ValueError, match=r"more than the backbone's `vocabulary_size` of 64"):
        Gemma2CausalLM(Gemma2Backbone(**SMALL), preprocessor)


@pytest.mark.once
def test_text_without_a_preprocessor():
    model = tiny.causal_lm(num_layers=1)
    model.preprocessor = None
    with pytest.raises(InputError, match="made without a tokenizer"):
        model.generate("The cat")


def test_adapters_of_the_backbone_after_training():
    model = tiny.causal_lm(num_layers=1)
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(["The cat sleeps."], verbose=0)
    before = model.generate("The cat", max_new_tokens=4)
    model.backbone.enable_lora(2)
    assert model.generate("The cat", max_new_tokens=4) == before
    frozen = [np.array(keras.ops.convert_to_numpy(v)) for v in model.non_trainable_variables if "lora" not in v.path]
    model.fit(["The cat sleeps."], verbose=0)
    after = [keras.ops.convert_to_numpy(v) for v in model.non_trainable_variables if "lora" not in v.path]
    for a, b in zip(frozen, after, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options", [{"alpha": "x"}, {"alpha": float("inf")}, {"targets": 5}, {"targets": "qproj"}])
def test_adapters_that_cannot_be(options):
    model = tiny.causal_lm(num_layers=1)
    with pytest.raises(ValueError, match=r"alpha|targets"):
        model.enable_lora(2, **options)
    assert not [v for v in model.variables if "lora" in v.path]


@pytest.mark.once
@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(PresetError, match="leads to no preset"):
        Gemma2CausalLM.from_preset(name)


@pytest.mark.once
def test_a_pipe_instead_of_a_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "gemma2_keras.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="no regular file"):
        Gemma2Backbone.from_preset(tmp_path)
