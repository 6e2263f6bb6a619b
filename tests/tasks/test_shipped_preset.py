from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import keras
import numpy as np
import pytest

import gemma2_keras
from gemma2_keras import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer, describe_preset
from tools.corpus import documents

NAME = "gemma2_tiny_en"
PROMPTS = ["Once upon a time", "The sun", "Long ago", "In the village", "A dentist works"]


@pytest.fixture(scope="module")
def shipped() -> Gemma2CausalLM:
    return Gemma2CausalLM.from_preset(NAME)


def test_it_is_what_the_catalogue_says(shipped):
    preset = describe_preset(NAME)
    assert not preset.needs_download
    assert shipped.backbone.config == preset.architecture
    assert sum(int(np.prod(v.shape)) for v in shipped.weights) == preset.parameters
    assert shipped.backbone.dtype_policy.name == "float32"
    assert shipped.preprocessor.tokenizer.vocabulary_size() == preset.architecture.vocabulary_size
    assert shipped.preprocessor.sequence_length <= preset.architecture.context_length


def test_every_part_loads_by_name(shipped):
    ids = Gemma2Tokenizer.from_preset(NAME).encode("The cat sleeps.")
    preprocessor = Gemma2CausalLMPreprocessor.from_preset(NAME, sequence_length=8)
    assert preprocessor(["The cat sleeps."])[0]["token_ids"][0, : len(ids) + 1].tolist() == [2, *ids][:8]
    for a, b in zip(Gemma2Backbone.from_preset(NAME).weights, shipped.backbone.weights, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b))


def test_what_it_says_is_made_of_english_words(shipped):
    texts = shipped.generate(PROMPTS, max_new_tokens=40, strip_prompt=True)
    known = {word for document in documents(0, 4000) for word in words(document.text)}
    for prompt, text in zip(PROMPTS, texts, strict=True):
        # The first word may continue the prompt's, and the last may have been cut.
        said = words(prompt + text)[:-1]
        assert len(said) > 10
        assert [word for word in said if word not in known] == []
        # Not one word over and over.
        assert len(set(said)) > len(said) / 4


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_it_expects_english_rather_than_shuffled_letters(shipped):
    text = next(document.text for document in documents(10**6, 50) if document.kind == "story")[:300]
    letters = list(text)
    np.random.default_rng(0).shuffle(letters)
    real, shuffled = (shipped.evaluate(cut(shipped, part), verbose=0)[0] for part in (text, "".join(letters)))
    assert real * 2 < shuffled


def cut(model, text):
    tokenizer = model.preprocessor.tokenizer
    return [tokenizer.decode(tokenizer.encode(text)[:60])]


def test_it_is_saved_and_loaded_as_it_was(shipped, tmp_path):
    shipped.save_to_preset(tmp_path / "saved")
    again = Gemma2CausalLM.from_preset(tmp_path / "saved")
    for a, b in zip(again.weights, shipped.weights, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b))
    assert again.backbone.config == shipped.backbone.config
    assert again.preprocessor.tokenizer.proto == shipped.preprocessor.tokenizer.proto
    assert again.preprocessor.sequence_length == shipped.preprocessor.sequence_length
    assert again.generate("The cat", max_new_tokens=8) == shipped.generate("The cat", max_new_tokens=8)


PACKAGE = Path(gemma2_keras.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


def test_there_are_examples():
    assert len(MODULES) > 30


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_hold(name):
    module = importlib.import_module(name)
    public = {name: getattr(gemma2_keras, name) for name in gemma2_keras.__all__}
    result = doctest.testmod(module, extraglobs=public, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.once
def test_every_public_class_has_an_example():
    for name in gemma2_keras.__all__:
        assert ">>> " in getattr(gemma2_keras, name).__doc__, name
