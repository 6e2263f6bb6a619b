"""The recipe of the small preset, on a few steps."""

import json

import numpy as np
import pytest

from gemma2_keras import Gemma2CausalLM, describe_preset
from tools import train_tiny


@pytest.mark.once
def test_catalogue_and_recipe_agree():
    hyperparameters = describe_preset(train_tiny.NAME).architecture.to_dict()
    recipe = {"vocabulary_size": train_tiny.VOCABULARY_SIZE, **train_tiny.ARCHITECTURE}
    assert {name: hyperparameters[name] for name in recipe} == recipe


@pytest.mark.once
def test_rows_begin_with_a_document_and_are_full():
    class Letters:
        start_token_id, end_token_id = 2, 1

        def encode(self, text):
            return [ord(letter) for letter in text]

    rows = train_tiny.rows_of(["abc", "defgh", "ij", "klmnop"], Letters(), 8)
    assert np.array_equal(rows[:, 0], [2, 2])
    assert rows.tolist()[0] == [2, 97, 98, 99, 1, 2, 100, 101]


@pytest.mark.once
def test_a_short_training_makes_a_preset(tmp_path):
    out = tmp_path / train_tiny.NAME
    train_tiny.train(out, seed=3, steps=6, batch_size=8, learning_rate=3e-3)
    record = json.loads((out / "training.json").read_text())
    # An untrained model of 2,560 tokens begins near ln 2560 = 7.85.
    assert record["held_out_loss"] < 7.8
    assert (out / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    model = Gemma2CausalLM.from_preset(out)
    assert model.backbone.token_embedding.embeddings.dtype == "float32"
    assert model.generate("The sun", max_new_tokens=3).startswith("The sun")
