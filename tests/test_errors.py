from __future__ import annotations

import pytest

import gemma2_keras
from gemma2_keras.errors import warn

pytestmark = pytest.mark.once


def test_a_warning_points_at_who_called_the_package():
    with pytest.warns(UserWarning, match="once") as caught:
        warn("once")
    assert caught[0].filename == __file__


def test_a_warning_points_past_keras(tmp_path):
    model = gemma2_keras.Gemma2CausalLM.from_preset("gemma2_tiny_en")
    model.preprocessor.sequence_length = 4
    with pytest.warns(UserWarning, match="texts were cut") as caught:
        model.preprocessor(["one two three four five six seven eight"])
    assert caught[0].filename == __file__


def test_a_backend_that_is_not_installed_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'jax'", name="jax")

    monkeypatch.setattr("importlib.import_module", missing)
    monkeypatch.delitem(vars(gemma2_keras), "Gemma2Backbone", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'gemma2-keras\[jax\]', or set .* KERAS_BACKEND"):
        gemma2_keras.Gemma2Backbone  # noqa: B018
