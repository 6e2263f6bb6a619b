from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gemma2_keras.generation.streaming import GenerationStats, TextAssembler, TextStream
from tests.preprocessing import tiny

pytestmark = pytest.mark.once

EOS, END_OF_TURN = 1, 107
FIRST_BYTE = 217
TOKENIZER = tiny.tokenizer()


def spelled(text: str) -> list[int]:
    """A token for each byte."""
    return [FIRST_BYTE + byte for byte in text.encode()]


def ended(text: str, stop: list[str]) -> tuple[str, int | None]:
    """The text before the stop string that is complete first, and where it is; read character by character."""
    for end in range(1, len(text) + 1):
        if found := [string for string in stop if text[:end].endswith(string)]:
            return text[: end - max(map(len, found))], end
    return text, None


# Few letters, so that stop strings occur, overlap and begin within one another.
LETTERS = st.sampled_from("abé🐈 ")
SOME_TEXT = st.text(LETTERS, max_size=25)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=3)


@st.composite
def token_splits(draw) -> tuple[str, list[int]]:
    """A text and tokens of it: whole words where the vocabulary has them, bytes, and control tokens in between."""
    text, ids = "", []
    for part in draw(st.lists(st.one_of(SOME_TEXT, st.sampled_from(["The cat", "on the log", "\n\n"])), max_size=4)):
        text += part
        ids += draw(st.sampled_from([TOKENIZER.encode, spelled]))(part)
        ids += draw(st.sampled_from([[], [0], [106, 2]]))
    return text, ids


@given(
    split=token_splits(),
    stop=st.lists(st.text(st.sampled_from("abé🐈 Thecaton\n"), min_size=1, max_size=5), max_size=3),
)
@example(split=("abc", [217 + 97, 217 + 98, 217 + 99]), stop=["abd", "bc"])
@example(split=("aab", spelled("aab")), stop=["ab"])
@example(split=("The cat", TOKENIZER.encode("The cat")), stop=["The ", "he"])
@example(split=("The cat", TOKENIZER.encode("The cat")), stop=["The", "h"])
def test_the_text_ends_before_the_first_stop_string_whatever_the_tokens(split, stop):
    text, ids = split
    expected, end = ended(text, stop)
    assembler = TextAssembler(TOKENIZER, (), stop)
    made = ""
    for token in ids:
        made += assembler.push(token)
        # What was given is never taken back, and holds nothing of the stop string.
        assert expected.startswith(made)
    made += assembler.finish()
    assert made == expected
    assert assembler.reason == ("length" if end is None else "stop_string")
    assert assembler.push(TOKENIZER.encode("a")[0]) == assembler.finish() == ""


@given(text=SOME_TEXT, stop=STOPS)
def test_no_more_is_held_back_than_may_become_a_stop_string(text, stop):
    assembler = TextAssembler(TOKENIZER, (), stop)
    made = ""
    for i, character in enumerate(text):
        made += "".join(map(assembler.push, spelled(character)))
        if assembler.reason is not None:
            break
        held = text[len(made) : i + 1]
        assert held == "" or any(string.startswith(held) and string != held for string in stop)


@given(text=st.text(max_size=20), split=token_splits())
def test_without_stop_strings_every_character_comes_once_it_is_whole(text, split):
    for whole, ids in ((text, spelled(text)), split):
        assembler = TextAssembler(TOKENIZER, ())
        pieces = [assembler.push(token) for token in ids]
        assert "".join(pieces) == whole
        assert assembler.finish() == ""
        assert TOKENIZER.decode([i for i in ids if i not in TOKENIZER.special_token_ids]) == whole


@given(text=SOME_TEXT, stop=STOPS, token=st.sampled_from([EOS, END_OF_TURN]))
def test_a_stop_token_gives_what_was_held_back(text, stop, token):
    expected, end = ended(text, stop)
    assembler = TextAssembler(TOKENIZER, (EOS, END_OF_TURN), stop)
    made = "".join(map(assembler.push, [*spelled(text), token, *spelled("and more")]))
    assert made == expected
    assert assembler.reason == ("stop_token" if end is None else "stop_string")


def test_half_a_character_is_marked_where_the_row_ends():
    for last, reason in (([EOS], "stop_token"), ([], "length")):
        assembler = TextAssembler(TOKENIZER, (EOS,), ["\ufffdx"])
        made = "".join(map(assembler.push, [*spelled("a🐈")[:-1], *last])) + assembler.finish()
        assert (made, assembler.reason) == ("a\ufffd", reason)


def test_a_mark_that_ends_the_row_may_be_the_stop_string():
    assembler = TextAssembler(TOKENIZER, (), ["\ufffd"])
    assert [*map(assembler.push, spelled("a🐈")[:-1]), assembler.finish()] == ["a", "", "", "", ""]
    assert assembler.reason == "stop_string"


# Streams


STATS = GenerationStats(10, 5, 0.5, 2.0, ("length", "stop_token", "length"), 2_500_000_000)


def test_a_stream_gives_strings_and_keeps_the_rest():
    stream = TextStream(iter(["The", " cat", STATS]))
    assert iter(stream) is stream
    assert (next(stream), stream.text, stream.stats) == ("The", "The", None)
    assert list(stream) == [" cat"]
    assert (stream.text, stream.stats) == ("The cat", STATS)
    with pytest.raises(StopIteration):
        next(stream)


def test_threads_that_read_one_stream_share_its_pieces():
    def pieces():
        for i in range(50):
            time.sleep(0.001)
            yield f"{i} "
        yield STATS

    stream = TextStream(pieces())
    with ThreadPoolExecutor(4) as pool:
        shares = list(pool.map(lambda _: list(stream), range(4)))
    assert sorted(map(int, itertools.chain(*shares))) == list(range(50))
    assert stream.text.split() == [str(i) for i in range(50)]
    assert stream.stats is STATS


def test_closing_waits_for_the_piece_that_is_made():
    making, made = threading.Event(), threading.Event()

    def pieces():
        yield "first"
        making.set()
        assert made.wait(30)
        yield "second"
        yield "third"

    stream = TextStream(pieces())
    assert next(stream) == "first"
    with ThreadPoolExecutor(2) as pool:
        reader = pool.submit(next, stream)
        assert making.wait(30)
        closing = pool.submit(stream.close)
        made.set()
        assert reader.result(30) == "second"
        closing.result(30)
    assert list(stream) == []
    assert stream.text == "firstsecond"


def test_a_stream_prints_what_it_has_and_what_comes(capsys):
    stream = TextStream(iter(["The", " cat", STATS]))
    next(stream)
    assert stream.show() == "The cat"
    assert capsys.readouterr().out == f"The cat\n\n[{STATS}]\n"
    assert TextStream(iter([])).show() == ""
    assert capsys.readouterr().out == "\n"


def test_statistics_are_readable():
    assert STATS.prompt_tokens_per_second == 20
    # The first token of each row came with the prompt.
    assert STATS.tokens_per_second == 1
    assert str(STATS) == (
        "10 prompt tokens (20.0/s), 5 new tokens (1.0/s), finished by length, stop_token, peak memory 2.50 GB"
    )
    unknown = GenerationStats(1, 1, 0.0, 0.0, ("length",), None)
    assert str(unknown) == "1 prompt tokens (0.0/s), 1 new tokens (0.0/s), finished by length"
    assert GenerationStats(1, 1, 0.0, 0.0, ("length",)).peak_memory_bytes > 1e7
