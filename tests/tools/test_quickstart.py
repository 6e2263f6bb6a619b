"""The main job, on a little data, and what it says of data that it cannot use."""

import json

import pytest

from tools import quickstart


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "OUTPUT", tmp_path / "out")
    monkeypatch.setattr(quickstart, "STEPS", 4)
    return tmp_path


def test_prompts_and_responses_are_learnt_and_saved(small, capsys):
    data = small / "data.jsonl"
    lines = [{"prompt": f"Question: What is {i} + 1?\nAnswer:", "response": f" Aye, {i + 1}!"} for i in range(12)]
    data.write_text("\n".join(map(json.dumps, lines)))
    quickstart.run(data)
    said = capsys.readouterr().out
    assert "before:" in said
    assert "the same texts came out" in said
    assert (small / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (small / "out" / "model" / "model.safetensors").exists()


def test_plain_text_is_learnt_and_saved(small):
    data = small / "data.txt"
    data.write_text("\n\n".join(f"The cat number {i} sleeps by the stove." for i in range(8)))
    quickstart.run(data)
    assert (small / "out" / "model" / "model.safetensors").exists()


@pytest.mark.once
def test_the_sample_file_is_read():
    examples = quickstart.read_examples(quickstart.SAMPLE)
    assert len(examples) == 120
    assert all(example.prompt.endswith("Answer:") for example in examples)


GOOD = '{"text": "a b c"}\n'


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b"", "data.jsonl is empty"),
        ("data.txt", b"one\n\ntwo", "2 examples"),
        ("data.jsonl", (GOOD * 4 + "{oops\n").encode(), "line 5: no JSON"),
        ("data.jsonl", (GOOD * 4 + '["a"]\n').encode(), "line 5: a list stands where"),
        ("data.jsonl", (GOOD * 4 + '{"prompt": "a"}\n').encode(), "line 5: .*response"),
        ("data.jsonl", (GOOD + '{"text": ""}\n').encode(), "line 2: `text` must be"),
        (
            "data.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]}',
            "finetune",
        ),
        ("data.txt", b"caf\xe9", "is not UTF-8 text: byte 3"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        quickstart.read_examples(path)


@pytest.mark.once
def test_a_missing_file_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quickstart", "--backend", "jax", "--data", str(tmp_path / "none.txt")])
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert quickstart.main() == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
