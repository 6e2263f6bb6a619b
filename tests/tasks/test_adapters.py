from __future__ import annotations

import numpy as np
import pytest

from gemma2_keras.generation import session
from tests.tasks.sharp import sharpened

CAT = "The cat sat on"


def loud(model, seed):
    """Adapters large enough to change what is said."""
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(random.normal(1, 1, variable.shape))


def says(model):
    return model.generate(CAT, max_new_tokens=4)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "portable"])
def test_generation_hears_the_adapter_in_effect(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(session, "is_supported", lambda backbone: False)
    model = sharpened(num_layers=1)
    base = says(model)
    model.enable_lora(2)
    loud(model, 5)
    model.enable_lora(2, ["o_proj", "up_proj"], name="two", use_dora=True)
    loud(model, 6)
    two = says(model)
    model.backbone.set_adapter("default")
    one = says(model)
    assert len({base, one, two}) == 3
    with model.disable_adapter():
        # The seconds of compiling once more are spent on one of them.
        assert not kernels or says(model) == base
    model.set_adapter("two")
    assert not kernels or says(model) == two


def test_generation_with_a_merged_adapter():
    model = sharpened(num_layers=1)
    model.enable_lora(2, use_dora=True)
    loud(model, 5)
    before = says(model)
    model.merge_adapter()
    assert says(model) == before


def test_nothing_is_compiled_again_for_an_adapter_that_is_in_effect_already():
    model = sharpened(num_layers=1)
    model.enable_lora(2)
    model.generate(CAT, max_new_tokens=4)
    programs = model._engine
    model.set_adapter("default")
    model.enable_adapter()
    model.generate(CAT, max_new_tokens=4)
    assert model._engine is programs
