from __future__ import annotations

import codecs
import re

import keras
import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from keras import ops

from gemma2_keras import Gemma2Tokenizer, IncrementalDecoder
from gemma2_keras.errors import InputError
from tests.preprocessing import tiny

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<unused98>"]
CONTROL += ["<start_of_turn>", "<end_of_turn>"]
SNIPPETS = [*CONTROL, *(piece[:-1] for piece in CONTROL), *(piece[1:] for piece in CONTROL)]
SNIPPETS += ["\u2581", "\u2581\u2581", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\0", "\u00a0", "\u200d", "\ufffd"]
SNIPPETS += ["<table>", "</td>", "<h1>", "<code>", "<0x41>", "<0xFF>", "\U0001f408", "\U0001f468\u200d\U0001f469"]
SNIPPETS += ["e\u0301", "日本語", "The cat", "7", "12", "#", "##", "\\", "<", ">", "[@", "@]", "fin. ﬁ"]

# Any Unicode text at all, and text made of what a tokenizer may stumble over.
ANY_TEXT = st.text(max_size=40)
AWKWARD_TEXT = st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=3)), max_size=12).map("".join)
TEXT = st.one_of(ANY_TEXT, AWKWARD_TEXT)
# The pieces with an empty text, or with U+FFFD for one.
SILENT = re.compile("<pad>|<eos>|<bos>")


@pytest.fixture(scope="session")
def processor() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=tiny.proto())


@pytest.mark.once
@given(text=TEXT)
@example(text="")
@example(text="<start_of_turn<start_of_turn>>")
@example(text="<start_of_turn><start_of_turn>")
@example(text="<unused1<unused10>0>")
@example(text="[@BOS@][@BOS@]")
@example(text="<\u2581bos>\u2581<bos>")
def test_decoding_gives_back_any_text_and_no_control_token_occurs(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_token_ids)


@pytest.mark.once
@given(text=TEXT)
@example(text="<start_of_turn<start_of_turn>>")
@example(text="<bos>a<unk>\u2581<end_of_turn>")
def test_decoding_parsed_text_gives_it_back_without_the_tokens_that_have_no_text(tokenizer, text):
    ids = tokenizer.encode(text, parse_special=True)
    # `<unk>` reads U+FFFD. Left to right, what is found first is a token, as the reader of a text would see it.
    expected = re.sub(
        "|".join(re.escape(piece) for piece in [*CONTROL, *(f"<unused{i}>" for i in range(99))]),
        lambda match: "" if SILENT.fullmatch(match[0]) else match[0].replace("<unk>", "\ufffd"),
        text,
    )
    assert tokenizer.decode(ids) == expected


@pytest.mark.once
@given(text=ANY_TEXT)
def test_plain_text_encodes_as_sentencepiece_does(tokenizer, processor, text):
    if "\u2581" not in text and not any(piece in text for piece in CONTROL):
        assert tokenizer.encode(text) == processor.encode(text)


@pytest.mark.once
@pytest.mark.parametrize("text", [*tiny.TEXTS, "a\n\n\nb   c <table> 123", "\U0001f408 日本語 \0\t\r\n"])
def test_these_texts_encode_as_sentencepiece_does(tokenizer, processor, text):
    assert tokenizer.encode(text) == processor.encode(text)
    assert tokenizer.decode(processor.encode(text)) == text


@pytest.mark.once
@pytest.mark.parametrize("piece", [*CONTROL, "<unused57>"])
def test_a_spelled_control_token_is_one_only_when_asked(tokenizer, processor, piece):
    token_id = processor.piece_to_id(piece)
    assert tokenizer.token_to_id(piece) == token_id
    assert tokenizer.id_to_token(token_id) == piece
    assert token_id in tokenizer.special_token_ids
    assert tokenizer.encode(f"a{piece}b", parse_special=True)[1:-1] == [token_id]
    assert token_id not in tokenizer.encode(f"a{piece}b")


@pytest.mark.once
def test_the_longer_of_two_control_tokens_is_parsed(tokenizer):
    assert tokenizer.encode("<unused1><unused10>", parse_special=True) == [8, 17]


@pytest.mark.once
def test_special_ids_are_those_of_gemma(tokenizer):
    names = ("pad", "end", "start", "unk")
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == [0, 1, 2, 3]
    assert (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) == (106, 107)
    assert tokenizer.stop_token_ids == (1, 107)
    assert tokenizer.special_token_ids == list(range(108))
    assert tokenizer.vocabulary_size() == len(tokenizer.get_vocabulary()) == tiny.VOCABULARY_SIZE


@pytest.mark.once
def test_parse_special_of_the_constructor_is_the_default_of_the_call():
    parsing = tiny.tokenizer(parse_special=True)
    assert parsing.encode("<end_of_turn>") == [107]
    assert 107 not in parsing.encode("<end_of_turn>", parse_special=False)
    assert parsing.tokenize(["<end_of_turn>"]) == parsing(["<end_of_turn>"]) == [[107]]


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        (lambda a, b: a, lambda a, b: a),
        (lambda a, b: [a, b], lambda a, b: [a, b]),
        (lambda a, b: (a, b), lambda a, b: [a, b]),
        (lambda a, b: [[a], [b, a]], lambda a, b: [[a], [b, a]]),
        (lambda a, b: np.array([a, b]), lambda a, b: [a, b]),
        (lambda a, b: np.array([[a, b], [b, a]], dtype=object), lambda a, b: [[a, b], [b, a]]),
        (lambda a, b: np.array(a), lambda a, b: a),
        (lambda a, b: a.encode(), lambda a, b: a),
        (lambda a, b: [np.str_(a), b.encode()], lambda a, b: [a, b]),
        (lambda a, b: [], lambda a, b: []),
    ],
)
def test_texts_in_any_container_encode_and_decode_alike_nested(tokenizer, container, expected):
    a, b = "The cat sat.", "日本 <b>"
    found = tokenizer.encode(container(a, b))
    assert found == expected(tokenizer.encode(a), tokenizer.encode(b))
    assert tokenizer.decode(found) == (expected(a, b) or "")


def test_ids_decode_from_arrays_and_tensors(tokenizer):
    row = tokenizer.encode("The cat")
    batch = np.array([row, row[::-1]], "int32")
    expected = [tokenizer.decode(row), tokenizer.decode(row[::-1])]
    for ids in (batch, ops.convert_to_tensor(batch), [ops.convert_to_tensor(r) for r in batch], batch.astype("int64")):
        assert tokenizer.decode(ids) == tokenizer.detokenize(ids) == expected
    assert tokenizer.decode(ops.convert_to_tensor(batch[0])) == "The cat"
    assert tokenizer.decode(row[0]) == tokenizer.decode(np.int32(row[0])) == tokenizer.id_to_token(row[0])
    assert tokenizer.decode([[], row]) == ["", "The cat"]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tensors of strings are TensorFlow's")
def test_tensorflow_strings_encode(tokenizer):
    import tensorflow

    a, b = "The cat sat.", "日本"
    ids = [tokenizer.encode(a), tokenizer.encode(b)]
    assert tokenizer.encode(tensorflow.constant(a)) == ids[0]
    assert tokenizer.encode(tensorflow.constant([a, b])) == ids
    assert tokenizer.encode(tensorflow.ragged.constant([[a], [b, a]])) == [ids[:1], [ids[1], ids[0]]]
    assert tokenizer.decode(tensorflow.ragged.constant(ids)) == [a, b]


@pytest.mark.once
@given(ids=st.lists(st.one_of(st.integers(0, tiny.VOCABULARY_SIZE - 1), st.integers(217, 472)), max_size=40))
@example(ids=[217 + 0xF0, 217 + 0x9F, 217 + 0x90])
@example(ids=[217 + 0xF0, 217 + 0x9F, 480])
@example(ids=[217 + 0xE2, 217 + 0x96, 217 + 0x81, 217 + 0x80])
def test_pushing_ids_one_by_one_gives_what_decoding_at_once_gives(tokenizer, ids):
    decoder = IncrementalDecoder(tokenizer)
    pushed = [decoder.push(i) for i in ids]
    # What is out is out: it is never half a character, so never a U+FFFD that more bytes would have mended.
    for end in range(len(ids) + 1):
        so_far = b"".join(tokenizer.token_bytes(i) for i in ids[:end])
        whole, _ = codecs.utf_8_decode(so_far, "replace", False)
        assert "".join(pushed[:end]) == whole
    assert "".join(pushed) + decoder.finish() == tokenizer.decode(ids)


@pytest.mark.once
def test_a_character_of_several_tokens_comes_with_the_last(tokenizer):
    ids = tokenizer.encode("\U0001f408!")
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.push(i) for i in ids] + [decoder.finish()] == ["", "", "", "\U0001f408", "!", ""]
    for i in ids[:2]:
        assert decoder.push(i) == ""
    assert decoder.finish() == "\ufffd"


@pytest.mark.once
@given(ids=st.lists(st.integers(0, tiny.VOCABULARY_SIZE - 1), max_size=20))
def test_tokens_decode_as_sentencepiece_decodes_them(tokenizer, processor, ids):
    # SentencePiece replaces each broken byte by itself, Python each broken character: compared where none is broken.
    # Its unknown piece has a text of its own.
    ids = [i for i in ids if i != 3]
    expected = processor.decode(ids)
    if "\ufffd" not in expected and "\ufffd" not in tokenizer.decode(ids):
        assert tokenizer.decode(ids) == expected


@pytest.mark.once
def test_assets_are_the_vocabulary_and_the_config_is_the_rest(tmp_path):
    made = tiny.tokenizer(parse_special=True, name="mine")
    made.save_assets(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["vocabulary.spm"]
    restored = Gemma2Tokenizer.from_config(made.get_config())
    assert restored.name == "mine"
    with pytest.raises(ValueError, match="no vocabulary yet"):
        restored.encode("The cat")
    restored.load_assets(str(tmp_path))
    assert restored.proto == tiny.proto()
    assert restored.encode("<end_of_turn>") == [107]


@pytest.mark.once
def test_a_path_and_bytes_are_the_same_vocabulary(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tiny.proto())
    for proto in (path, str(path)):
        assert Gemma2Tokenizer(proto).encode("The cat") == tokenizer.encode("The cat")


@pytest.mark.once
@pytest.mark.parametrize("proto", [b"", b"nonsense", tiny.proto()[:1000], b"\0" * 100])
def test_a_bad_vocabulary_is_refused(proto):
    with pytest.raises(ValueError, match=r"`proto` is (not a SentencePiece model|no Gemma vocabulary)"):
        Gemma2Tokenizer(proto)


@pytest.mark.once
def test_another_models_vocabulary_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.TEXTS * 5), model_prefix=str(tmp_path / "other"), vocab_size=60, minloglevel=2
    )
    with pytest.raises(ValueError, match="no Gemma vocabulary: it lacks <pad>, <eos>, <bos>"):
        Gemma2Tokenizer(tmp_path / "other.model")


@pytest.mark.once
def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        Gemma2Tokenizer(tmp_path / "absent.model")


@pytest.mark.once
@pytest.mark.parametrize("x", [None, 5, 1.5, True, [1], ["a", None], {"a": "b"}, np.array([1, 2]), object()])
def test_what_is_no_text_is_refused(tokenizer, x):
    with pytest.raises(InputError, match="takes strings and lists of them"):
        tokenizer.encode(x)


@pytest.mark.once
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([tiny.VOCABULARY_SIZE], "between 0 and 559; given 560"),
        ([-1], "between 0 and 559; given -1"),
        ([[1, 2], [10**20]], "between 0 and 559"),
        (np.array([2**40]), "between 0 and 559"),
        ([1.5], "whole number; given 1.5"),
        (1.5, "whole number; given 1.5"),
        (np.array([1.0, 2.0]), "whole number; given 1.0"),
        ([True], "whole number; given True"),
        ([None], "whole number; given None"),
        (None, "given NoneType: None"),
        ("The cat", "given str: 'The cat'"),
        ([[1], "cat"], "given str: 'cat'"),
        (object(), "given object"),
        ({"token_ids": [1]}, "given dict"),
    ],
)
def test_ids_that_are_none_are_refused(tokenizer, ids, message):
    with pytest.raises(InputError, match=message):
        tokenizer.decode(ids)


@pytest.mark.once
@pytest.mark.parametrize("token_id", [-1, tiny.VOCABULARY_SIZE, 1.5, None, "a"])
def test_id_to_token_and_push_refuse_what_is_no_id(tokenizer, token_id):
    with pytest.raises(InputError, match="token id"):
        tokenizer.id_to_token(token_id)
    with pytest.raises(InputError, match="token id"):
        IncrementalDecoder(tokenizer).push(token_id)


@pytest.mark.once
def test_an_unknown_piece_is_refused(tokenizer):
    with pytest.raises(InputError, match="no piece 'zebra'"):
        tokenizer.token_to_id("zebra")


@pytest.mark.once
def test_lone_surrogates_are_refused_with_their_place(tokenizer):
    with pytest.raises(InputError, match=r"lone surrogate, '\\udc80' at 4"):
        tokenizer.encode(["fine", "bad \udc80"])


@pytest.mark.once
def test_bytes_that_are_no_utf8_are_refused_with_their_place(tokenizer):
    with pytest.raises(InputError, match="not UTF-8: byte 0xff at 3"):
        tokenizer.encode(b"abc\xff")
