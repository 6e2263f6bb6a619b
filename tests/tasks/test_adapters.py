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


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "portable"])
def test_generation_hears_the_adapter_in_effect(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(session, "is_supported", lambda backbone: False)
    model = sharpened()

    def says():
        return model.generate(CAT, max_new_tokens=6)

    base = says()
    model.enable_lora(2)
    loud(model, 5)
    one = says()
    model.enable_lora(2, ["o_proj", "up_proj"], name="two", use_dora=True)
    assert says() == base
    loud(model, 6)
    two = says()
    assert len({base, one, two}) == 3
    model.set_adapter("default")
    assert says() == one
    with model.disable_adapter():
        assert says() == base
    model.backbone.set_adapter("two")
    assert says() == two
    model.merge_adapter()
    assert says() == two
    model.unmerge_adapter()
    assert says() == two
    model.unload_adapter()
    assert says() == base


def test_nothing_is_compiled_again_for_an_adapter_that_is_in_effect_already():
    model = sharpened(num_layers=1)
    model.enable_lora(2)
    model.generate(CAT, max_new_tokens=4)
    programs = model._engine
    model.set_adapter("default")
    model.enable_adapter()
    model.generate(CAT, max_new_tokens=4)
    assert model._engine is programs
