from __future__ import annotations

import pytest

from gemma2_keras.checkpoints import guard
from gemma2_keras.checkpoints.guard import file_inside, read_json
from gemma2_keras.errors import CheckpointError

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"{} {}", "cannot be read as JSON"),
        (b"\xff\xfe{\0}\0", "cannot be read as JSON"),
        (b'{"a": "\xff"}', "cannot be read as JSON"),
        (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
        (b'{"b": {"a": 1, "a": 1}}', "key 'a' stands twice"),
        (b'{"a": NaN}', "NaN is no finite number"),
        (b'{"a": [-Infinity]}', "-Infinity is no finite number"),
        (b'{"a": 1e999}', "1e999 is no finite number"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1]", "holds a list where a JSON object belongs"),
        (b"null", "holds a NoneType"),
        (b'"text"', "holds a str"),
    ],
)
def test_a_json_file_that_is_no_plain_object_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(tmp_path / "config.json")
    assert "config.json" in str(caught.value)


def test_a_json_file_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "LARGEST_JSON", 10)
    (tmp_path / "config.json").write_text('{"a": "0123456789"}')
    with pytest.raises(CheckpointError, match="has 19 bytes, too many"):
        read_json(tmp_path / "config.json")


def test_a_missing_json_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="no regular file"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "C:x", "a\0b", None, 5, ["x"], {"x": 1}]
)
def test_a_name_that_is_no_plain_file_name_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="no plain file name"):
        file_inside(tmp_path, name)


def test_a_plain_file_name_lies_in_the_folder(tmp_path):
    assert file_inside(tmp_path, "..model.safetensors") == tmp_path / "..model.safetensors"
