from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2_keras import read_jsonl
from gemma2_keras.errors import InputError
from gemma2_keras.training import jsonl

pytestmark = pytest.mark.once

CHAT = [{"role": "user", "content": "The cat"}, {"role": "model", "content": "sat."}]


@pytest.fixture
def written(tmp_path):
    def write(content: str | bytes):
        path = tmp_path / "data.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("lines", "records"),
    [
        (['{"text": "The cat"}', '{"text": "\\ud83d\\udc08"}'], [{"text": "The cat"}, {"text": "🐈"}]),
        (['{"prompt": "The", "response": " cat", "n": 1}'], [{"prompt": "The", "response": " cat"}]),
        (['{"prompt": "The", "completion": " cat"}'], [{"prompt": "The", "completion": " cat"}]),
        ([json.dumps({"messages": [{**turn, "time": 1.5} for turn in CHAT]})], [{"messages": CHAT}]),
        # Neither kind of line break is one of JSON lines.
        (['{"text": "a\u2028b\x85c"}'], [{"text": "a\u2028b\x85c"}]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_become_records(written, lines, records, end, mark):
    assert read_jsonl(written(mark + end.join(lines))) == records
    assert read_jsonl(str(written(f"{mark}{end}  {end}" + end.join(["", *lines, ""]) + end))) == records


@given(st.lists(st.text(min_size=1), min_size=1))
def test_any_text_is_read_as_it_was(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("jsonl") / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    assert read_jsonl(path) == [{"text": text} for text in texts]


GOOD = '{"text": "The cat"}\n'
BAD = {
    "empty": ("", r"data\.jsonl is empty"),
    "blank": ("\n \n\t\n", r"data\.jsonl is empty"),
    "a mark alone": ("\ufeff", r"data\.jsonl is empty"),
    "broken": (GOOD + '\n{"text": "The c', r"data\.jsonl, line 3: no JSON \(Unterminated string"),
    "no JSON": ("The cat sat.\n", "line 1: no JSON"),
    "two objects": ('{"text": "a"} {"text": "b"}', "line 1: no JSON .*Extra data"),
    "a number too long": ('{"text": 1' + "0" * 5000 + "}", "line 1: no JSON"),
    "an array": ('["The cat"]\n', "line 1: a list stands where a JSON object belongs"),
    "a string": ('"The cat"\n', "line 1: a str stands where"),
    "null": (GOOD + "null", "line 2: a NoneType stands where"),
    "no key": (GOOD + "{}", r"line 2: the object needs the key \"text\" .* given \[\]"),
    "another key": ('{"content": "The cat"}', r"line 1: .* given \['content'\]"),
    "half a pair": ('{"prompt": "The cat"}', r"line 1: .* \"prompt\" and \"response\"; given \['prompt'\]"),
    "several kinds in one": ('{"text": "a", "messages": []}', "line 1: the object could be read in several ways"),
    "mixed kinds": (
        "\n" + GOOD + '{"prompt": "a", "response": "b"}',
        'line 3: it has "prompt" and "response", line 2 has "text": all lines must be of one kind',
    ),
    "no text": ('{"text": 5}', "line 1: `text` must be a string .* given 5"),
    "null text": ('{"text": null}', "line 1: `text` must be a string .* given None"),
    "a list of texts": ('{"text": ["a"]}', "line 1: `text` must be a string .* given \\["),
    "two texts": ('{"text": ["a", "b"]}', "line 1: `text` must be a string .* given \\["),
    "an empty text": (GOOD + '{"text": ""}', "line 2: `text` must be a string of at least one character; given ''"),
    "no response": ('{"prompt": "a", "response": {}}', "line 1: `response` must be a string"),
    "no messages": ('{"messages": []}', "line 1: Messages are a list of"),
    "messages of another kind": ('{"messages": "The cat"}', "line 1: Messages are a list of .* given 'The cat'"),
    "a message of another kind": ('{"messages": [1]}', "line 1: Message 0 must be"),
    "no content": ('{"messages": [{"role": "user"}]}', "line 1: Message 0 must be"),
    "roles out of order": (
        GOOD.replace('"text": "The cat"', f'"messages": {json.dumps(CHAT)}')
        + json.dumps({"messages": [CHAT[0], CHAT[0]]}),
        "line 2: Message 1 has the role 'user'; roles alternate, and 'model' is next",
    ),
    "a late system": (
        json.dumps({"messages": [*CHAT, {"role": "system", "content": "a"}]}),
        "line 1: Message 2 has the role 'system'",
    ),
    "a role of another kind": ('{"messages": [{"role": {"a": 1}, "content": "a"}]}', "line 1: Message 0 has the role"),
    "Latin-1": (GOOD.encode() + '{"text": "café"}'.encode("latin-1"), "line 2: not UTF-8, byte 0xe9 at 13. Save"),
    "UTF-16": (GOOD.encode("utf-16"), "line 1: not UTF-8, byte 0xff at 0"),
    "half a character": ('{"text": "\\ud800"}', r"line 1: a text holds a lone surrogate, '\\ud800'"),
    "half a character in a message": (
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "line 1: a text holds a lone surrogate",
    ),
    "deep": ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1: JSON nested too deeply"),
    "deep, and read": ('{"text": ' + "[" * 900 + "]" * 900 + "}", r"line 1: (`text` must|JSON nested)"),
    "deep in a message": (
        '{"messages": [{"role": "user", "content": ' + "[" * 800 + "]" * 800 + "}]}",
        "line 1: (Message 0 needs text|JSON nested)",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_said_with_file_and_line(written, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read_jsonl(written(content))
    assert len(str(caught.value)) < 400


def test_a_line_without_end_is_not_read_whole(written, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 1 << 20)
    with pytest.raises(InputError, match="line 2 is longer than 1 MiB"):
        read_jsonl(written(GOOD + " " * (2 << 20)))


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_jsonl(tmp_path / "none.jsonl")


@pytest.mark.parametrize("path", [5, True, None])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(InputError, match="`path` must be that of a file of JSON lines"):
        read_jsonl(path)


def test_a_packed_file_is_told(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 9))
    with pytest.raises(InputError, match="line 1: the file is packed; unpack it first"):
        read_jsonl(path)
