"""Tests of `tools/train_tokenizer.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from tools import train_tokenizer as tool

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "tools" / "train_tokenizer.py"

TEXTS = [
    "The cat sat on the mat.\n\nThe dog sat on the log, and 123 birds sang in the tall trees.",
    "def add(a, b):\n    return a + b\n\n\ndef double(x):\n    return x * 2\n",
    "Question: What colour is the sky?\nAnswer: The sky is blue.",
    "Once there was a kind girl who lived in a small house by the sea with her two brothers.",
] * 3
SIZE = 540


@pytest.fixture(scope="module")
def model() -> bytes:
    return tool.train_tokenizer(TEXTS, SIZE)


@pytest.fixture(scope="module")
def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.mark.parametrize(
    ("index", "piece"),
    [
        (0, "<pad>"),
        (1, "<eos>"),
        (2, "<bos>"),
        (3, "<unk>"),
        (4, "<mask>"),
        (5, "<2mass>"),
        (6, "[@BOS@]"),
        (7, "<unused0>"),
        (105, "<unused98>"),
        (106, "<start_of_turn>"),
        (107, "<end_of_turn>"),
        (108, "\n"),
        (109, "\n\n"),
        (138, "\n" * 31),
        (139, "\u2581" * 2),
        (168, "\u2581" * 31),
        (169, "<table>"),
        (176, "<td>"),
        (177, "</table>"),
        (184, "</td>"),
        (185, "<h1>"),
        (191, "<blockquote>"),
        (192, "</h1>"),
        (198, "</blockquote>"),
        (199, "<strong>"),
        (207, "<code>"),
        (208, "</strong>"),
        (216, "</code>"),
        (217, "<0x00>"),
        (472, "<0xFF>"),
    ],
)
def test_fixed_ids(processor: sentencepiece.SentencePieceProcessor, index: int, piece: str) -> None:
    assert processor.id_to_piece(index) == piece
    assert processor.piece_to_id(piece) == index


def test_types_and_size(processor: sentencepiece.SentencePieceProcessor) -> None:
    assert processor.vocab_size() == SIZE
    assert (processor.pad_id(), processor.eos_id(), processor.bos_id(), processor.unk_id()) == (0, 1, 2, 3)
    assert all(processor.is_control(index) for index in (0, 1, 2))
    assert processor.is_unknown(3)
    assert [index for index in range(SIZE) if processor.is_byte(index)] == list(range(217, 473))
    assert not any(processor.is_control(index) for index in range(3, SIZE))


def test_special_pieces_are_matched_in_text(processor: sentencepiece.SentencePieceProcessor) -> None:
    assert processor.encode("a\n\nb")[1:-1] == [109]
    assert processor.encode("a\nb")[1:-1] == [108]
    assert processor.encode("a" + "\n" * 31 + "b")[1:-1] == [138]
    assert processor.encode("<start_of_turn>user\n")[0] == 106
    assert processor.encode("x    " * 2)[-1] == 141
    # No dummy prefix: a word at the very start carries no space.
    assert not processor.id_to_piece(processor.encode("the")[0]).startswith("\u2581")
    # Digits stay apart.
    assert len([index for index in processor.encode("2024")]) == 4


@pytest.mark.parametrize(
    "text",
    [
        *TEXTS[:4],
        "",
        "a\n\nb\n",
        "\n\n leading and trailing \n",
        "tab\there\t\tand  two   three    four spaces ",
        "smile \U0001f600 caf\u00e9 \u65e5\u672c\u8a9e \r\n",
        "\n" * 40 + "x" + " " * 70,
        "<table><tr><td>1</td></tr></table> <start_of_turn>user\nHi<end_of_turn>",
    ],
)
def test_round_trip(processor: sentencepiece.SentencePieceProcessor, text: str) -> None:
    assert processor.decode(processor.encode(text)) == text


def test_deterministic(model: bytes) -> None:
    assert tool.train_tokenizer(iter(TEXTS), SIZE) == model


def test_long_texts_are_not_dropped() -> None:
    # SentencePiece's default drops texts of more than 4,192 bytes without a word.
    model = tool.train_tokenizer(["zebra " * 2000], 482)
    assert sentencepiece.SentencePieceProcessor(model_proto=model).piece_to_id("z") >= 473


@pytest.mark.parametrize("size", [-1, 0, 100, 473, 480])
def test_too_small(size: int) -> None:
    with pytest.raises(ValueError, match=r"smallest possible is (\d+)") as caught:
        tool.train_tokenizer(TEXTS, size)
    smallest = int(str(caught.value).split("smallest possible is ")[1].split()[0].rstrip("."))
    assert smallest > 473
    assert tool.train_tokenizer(TEXTS, smallest)
    with pytest.raises(ValueError, match="smallest"):
        tool.train_tokenizer(TEXTS, smallest - 1)


def test_too_large() -> None:
    with pytest.raises(ValueError, match=r"largest possible is (\d+)") as caught:
        tool.train_tokenizer(TEXTS, 100_000)
    largest = int(str(caught.value).split("largest possible is ")[1].rstrip("."))
    assert tool.train_tokenizer(TEXTS, largest)
    with pytest.raises(ValueError, match="largest"):
        tool.train_tokenizer(TEXTS, largest + 1)


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_no_text(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="no text"):
        tool.train_tokenizer(texts, SIZE)


def test_wrong_ids_are_refused(model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = list(tool.FIXED_PIECES)
    pieces[139], pieces[140] = pieces[140], pieces[139]
    monkeypatch.setattr(tool, "FIXED_PIECES", tuple(pieces))
    with pytest.raises(RuntimeError, match="Id 139"):
        tool._check_ids(model, SIZE)
    with pytest.raises(RuntimeError, match="pieces"):
        tool._check_ids(model, SIZE + 1)


def test_command_line_writes_the_model(tmp_path: Path, model: bytes) -> None:
    source, out = tmp_path / "texts.jsonl", tmp_path / "tokenizer.model"
    source.write_text("".join(json.dumps({"kind": "x", "text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    assert tool.main(["--input", str(source), "--vocabulary-size", str(SIZE), "--out", str(out)]) == 0
    assert out.read_bytes() == model
    assert sorted(tmp_path.iterdir()) == [source, out]


def test_plain_text_input(tmp_path: Path) -> None:
    source, out = tmp_path / "texts.txt", tmp_path / "tokenizer.model"
    source.write_text("\n".join(TEXTS), encoding="utf-8")
    assert tool.main(["--input", str(source), "--vocabulary-size", str(SIZE), "--out", str(out)]) == 0
    assert out.stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "content", "size", "message"),
    [
        ("missing.jsonl", None, 540, "missing.jsonl"),
        ("bad.jsonl", '{"text": "a"}\n{"words": 1}\n', 540, "line 2"),
        ("bad.jsonl", "not json\n", 540, "line 1"),
        ("small.txt", "hello\n", 473, "smallest possible"),
        ("large.txt", "hello\n", 3072, "largest possible"),
        ("empty.txt", "\n", 540, "no text"),
    ],
)
def test_command_line_errors_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: str | None, size: int, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    out = tmp_path / "tokenizer.model"
    status = tool.main(["--input", str(tmp_path / name), "--vocabulary-size", str(size), "--out", str(out)])
    errors = capfd.readouterr().err
    assert status == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert not out.exists()


def test_runs_as_a_script() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "--vocabulary-size" in result.stdout
