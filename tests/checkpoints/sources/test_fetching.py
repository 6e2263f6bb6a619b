from __future__ import annotations

import json
import threading

import pytest

from gemma2_keras.checkpoints.sources import fetching
from gemma2_keras.checkpoints.sources.fetching import (
    KERAS_HUB,
    TRANSFORMERS,
    alone_in,
    causes,
    fetch_by_name,
    was_fetched,
)
from gemma2_keras.errors import CheckpointError, PresetError

pytestmark = pytest.mark.once


@pytest.fixture
def source(tmp_path):
    """A source of one file by name, and the folder that it fetches into."""
    content = {"config.json": b"{}", "tokenizer.model": b"pieces", "model.safetensors": b"all", "model.h5": b"no"}
    asked = []

    def get(name):
        asked.append(name)
        if name in content:
            (tmp_path / name).write_bytes(content[name])
            return tmp_path / name
        return None

    get.content, get.asked = content, asked
    return get


@pytest.mark.parametrize(
    ("config", "layout"),
    [({"model_type": "gemma2"}, TRANSFORMERS), ({}, TRANSFORMERS), ({"class_name": "GemmaBackbone"}, KERAS_HUB)],
)
def test_the_configuration_tells_the_layout(tmp_path, config, layout):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fetching.layout_of(tmp_path) is layout
    assert fetching.weight_files(tmp_path) == [layout.weights]


def test_the_index_names_the_weights_once_each(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": ["1.safetensors", "3.safetensors"]}}
    (tmp_path / TRANSFORMERS.index).write_text(json.dumps(index))
    assert fetching.weight_files(tmp_path) == ["1.safetensors", "2.safetensors", "3.safetensors"]


def test_no_weights_are_among_the_settings():
    assert not [name for name in fetching.SETTINGS if name.endswith((".safetensors", ".h5", ".bin", ".gguf"))]
    assert len(set(fetching.SETTINGS)) == len(fetching.SETTINGS)


def test_nothing_is_asked_for_once_it_was_fetched(source, tmp_path):
    assert fetch_by_name(source, "x", weights=False) == tmp_path
    assert was_fetched(tmp_path, weights=False)
    assert not was_fetched(tmp_path, weights=True)
    assert "model.safetensors" not in source.asked
    fetch_by_name(source, "x", weights=True)
    assert was_fetched(tmp_path, weights=True)
    source.asked.clear()
    fetch_by_name(source, "x", weights=False)
    assert source.asked == ["config.json"]
    # What was fetched with weights is not forgotten.
    assert was_fetched(tmp_path, weights=True)


@pytest.mark.parametrize(
    "record", ["", "{}", "[]", '{"files": ["config.json"], "weights": 1', '{"files": 3, "weights": 1}']
)
def test_a_broken_record_is_none(source, tmp_path, record):
    fetch_by_name(source, "x", weights=True)
    (path,) = tmp_path.glob(".gemma2_keras*")
    path.write_text(record)
    assert not was_fetched(tmp_path, weights=False)
    fetch_by_name(source, "x", weights=True)
    assert was_fetched(tmp_path, weights=True)


def test_a_source_without_configuration_or_weights_says_so(source, tmp_path):
    del source.content["model.safetensors"]
    with pytest.raises(PresetError, match=r"^x lacks 'model\.safetensors'"):
        fetch_by_name(source, "x", weights=True)
    assert not was_fetched(tmp_path, weights=False)
    source.content["config.json"] = b"<html>"
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        fetch_by_name(source, "x", weights=False)
    del source.content["config.json"]
    with pytest.raises(PresetError, match=r"^x has no config\.json"):
        fetch_by_name(source, "x", weights=False)


def test_one_at_a_time_is_in_a_folder(tmp_path):
    folder, entered = tmp_path / "new" / "folder", []

    def enter():
        with alone_in(folder):
            entered.append("second")

    with alone_in(folder):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join(0.2)
        entered.append("first")
    thread.join()
    assert entered == ["first", "second"]


def test_a_folder_that_cannot_be_made_keeps_nobody_out(tmp_path):
    (tmp_path / "file").touch()
    with alone_in(tmp_path / "file" / "folder"):
        pass
    with pytest.raises(KeyError), alone_in(tmp_path / "file" / "folder"):
        raise KeyError


def test_causes_end():
    first, second, third = ValueError(1), ValueError(2), ValueError(3)
    first.__cause__, second.__context__, third.__cause__ = second, third, first
    assert list(causes(first)) == [first, second, third]
    assert list(causes(None)) == []
