from __future__ import annotations

import jinja2.sandbox
import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from gemma2_keras import Gemma2Tokenizer
from gemma2_keras.checkpoints.gguf.container import read_container
from gemma2_keras.checkpoints.gguf.reading import GgufCheckpoint
from gemma2_keras.checkpoints.gguf.tokenizer import find_stop_token_ids, sentencepiece_model
from gemma2_keras.checkpoints.gguf.writing import write_gguf
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import CheckpointError
from gemma2_keras.preprocessing.chat_template import encode_chat
from tests.preprocessing import tiny
from tests.preprocessing.test_tokenizer import SNIPPETS

pytestmark = pytest.mark.once
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
AWKWARD_TEXT = st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=3)), max_size=12).map("".join)


class Zeros:
    """A checkpoint of nothing, of so many rows."""

    dtype = "float32"

    def __init__(self, rows: int = tiny.VOCABULARY_SIZE) -> None:
        self.config = Gemma2Config(rows, 1, 2, 1, 6, 5, 4)

    def read(self, name):
        return np.zeros(weight_map(self.config)[name].shape, "float32")


@pytest.fixture(scope="session")
def keys(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("tokenizer") / "x.gguf"
    write_gguf(path, Zeros(), tiny.proto())
    return dict(read_container(path).keys)


@pytest.fixture(scope="session")
def tokenizer() -> Gemma2Tokenizer:
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def again(keys) -> Gemma2Tokenizer:
    """The tokenizer, out of the file."""
    return Gemma2Tokenizer(sentencepiece_model(keys, tiny.VOCABULARY_SIZE))


@pytest.fixture(scope="session")
def processors(keys) -> list[sentencepiece.SentencePieceProcessor]:
    protos = (tiny.proto(), sentencepiece_model(keys, tiny.VOCABULARY_SIZE))
    return [sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in protos]


@given(text=st.one_of(st.text(max_size=40), AWKWARD_TEXT))
@example(text="")
@example(text=" a  b   c\n\n\n\n\n" + "\n" * 40 + " " * 40)
@example(text="<start_of_turn>user\n\U0001f408\u2581\u2581 <0x41> </h1></td>é\0")
def test_a_tokenizer_out_of_a_file_gives_the_same_ids(tokenizer, again, processors, text):
    for parse_special in (False, True):
        ids = tokenizer.encode(text, parse_special=parse_special)
        assert again.encode(text, parse_special=parse_special) == ids
        assert again.decode(ids) == tokenizer.decode(ids)
    before, after = (processor.encode(text) for processor in processors)
    assert after == before


def test_a_tokenizer_out_of_a_file_has_the_same_pieces(again, processors):
    tokenizer = tiny.tokenizer()
    assert again.get_vocabulary() == tokenizer.get_vocabulary()
    assert again.special_token_ids == tokenizer.special_token_ids
    assert again.stop_token_ids == tokenizer.stop_token_ids
    for ask in ("get_score", "is_control", "is_unknown", "is_unused", "is_byte"):
        before, after = ([getattr(p, ask)(i) for i in range(tiny.VOCABULARY_SIZE)] for p in processors)
        assert after == before


def test_the_vocabulary_is_as_llama_cpp_has_it(keys):
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"].tolist()
    assert tokens[:8] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", "<unused0>"]
    # What a text must not spell is control; the other pieces of users stand as in the text.
    assert kinds[:8] == [CONTROL, CONTROL, CONTROL, UNKNOWN, *[CONTROL] * 4]
    assert (tokens[106], kinds[106], tokens[107], kinds[107]) == ("<start_of_turn>", CONTROL, "<end_of_turn>", CONTROL)
    assert (tokens[109], kinds[109], tokens[139], kinds[139]) == ("\n\n", USER_DEFINED, "  ", USER_DEFINED)
    assert (tokens[217], kinds[217]) == ("<0x00>", BYTE)
    assert set(kinds[473:]) == {NORMAL}
    others = {key.removeprefix("tokenizer.ggml."): v for key, v in keys.items() if key.startswith("tokenizer.ggml.")}
    assert {key: value for key, value in others.items() if not isinstance(value, list | np.ndarray)} == {
        "model": "llama",
        "pre": "default",
        "padding_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "unknown_token_id": 3,
        "eot_token_id": 107,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": False,
    }


def test_rows_without_pieces_are_filled_up_and_left_away_again(tmp_path):
    write_gguf(tmp_path / "x.gguf", Zeros(tiny.VOCABULARY_SIZE + 3), tiny.proto())
    checkpoint = GgufCheckpoint(tmp_path / "x.gguf")
    tokens = read_container(tmp_path / "x.gguf").keys["tokenizer.ggml.tokens"]
    assert tokens[-4:] == [tiny.tokenizer().get_vocabulary()[-1], "[PAD560]", "[PAD561]", "[PAD562]"]
    assert Gemma2Tokenizer(checkpoint.tokenizer_proto()).get_vocabulary() == tiny.tokenizer().get_vocabulary()


def test_files_of_llama_cpps_converter_give_the_same_tokenizer(keys, again):
    # It calls <unk> a control token, and gives special pieces a score of their own.
    kinds, scores = keys["tokenizer.ggml.token_type"].copy(), keys["tokenizer.ggml.scores"].copy()
    kinds[3] = CONTROL
    scores[:217] = -1000.0
    theirs = {**keys, "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.scores": scores}
    tokenizer = Gemma2Tokenizer(sentencepiece_model(theirs, tiny.VOCABULARY_SIZE))
    text = "".join(SNIPPETS)
    assert tokenizer.encode(text) == again.encode(text)
    assert tokenizer.encode(text, parse_special=True) == again.encode(text, parse_special=True)


# Chat


@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.parametrize("system", [False, True])
def test_the_chat_template_writes_what_the_model_was_taught(keys, system, reply):
    messages = [
        {"role": "user", "content": "  Hello\n"},
        {"role": "assistant", "content": "Aye!"},
        {"role": "user", "content": "Tell me more."},
    ]
    if system:
        messages.insert(0, {"role": "system", "content": "Be kind. "})
    template = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        keys["tokenizer.chat_template"]
    )
    text = template.render(messages=messages, bos_token="<bos>", add_generation_prompt=reply)
    tokenizer = tiny.tokenizer()
    assert tokenizer.encode(text, parse_special=True) == encode_chat(tokenizer, messages, reply=reply)


# Stopping


def write_stopping(path, stop_token_ids) -> tuple[int, ...]:
    write_gguf(path / "x.gguf", Zeros(), tiny.proto(), stop_token_ids=stop_token_ids)
    return GgufCheckpoint(path / "x.gguf").stop_token_ids


def test_ids_that_end_a_text_are_kept(tmp_path):
    assert write_stopping(tmp_path, None) == (1, 107)
    assert write_stopping(tmp_path, [107, 1]) == (1, 107)
    assert write_stopping(tmp_path, (1,)) == (1,)
    assert "PARAMETER" not in (tmp_path / "Modelfile").read_text()
    assert write_stopping(tmp_path, [1, 7]) == (1, 7)
    assert (tmp_path / "Modelfile").read_text().endswith('PARAMETER stop "<unused0>"\n')


@pytest.mark.parametrize("ids", [[], [107], [1, 107, 7], [1, 560], [1, -1]])
def test_ids_that_a_file_has_no_room_for(tmp_path, ids):
    with pytest.raises(ValueError, match=r"`stop_token_ids` must be 1, which is <eos>, and at most one other id"):
        write_stopping(tmp_path, ids)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.uint32(560), np.int32(-1), np.float32(1), "1"])
def test_a_stop_id_that_is_none(keys, value):
    with pytest.raises(CheckpointError, match=r"`tokenizer.ggml.eot_token_id` is .*; ids lie between 0 and 559"):
        find_stop_token_ids({**keys, "tokenizer.ggml.eot_token_id": value}, 560)


# Vocabularies of another kind


def edited(edit) -> bytes:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tiny.proto())
    edit(model)
    return model.SerializeToString()


def test_a_vocabulary_without_turns_has_no_template(tmp_path):
    def edit(model):
        model.pieces[106].piece, model.pieces[107].piece = "<unused99>", "<unused100>"

    write_gguf(tmp_path / "x.gguf", Zeros(), edited(edit))
    assert "tokenizer.chat_template" not in read_container(tmp_path / "x.gguf").keys
    assert GgufCheckpoint(tmp_path / "x.gguf").stop_token_ids == (1,)
    assert (tmp_path / "Modelfile").read_text().endswith('FROM ./x.gguf\nTEMPLATE """{{ .Prompt }}"""\n')


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: setattr(model.trainer_spec, "model_type", model.trainer_spec.UNIGRAM),
        lambda model: setattr(model.trainer_spec, "byte_fallback", False),
        lambda model: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True),
        lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", True),
        lambda model: setattr(model.normalizer_spec, "remove_extra_whitespaces", True),
        lambda model: setattr(model.normalizer_spec, "escape_whitespaces", False),
        lambda model: setattr(model.normalizer_spec, "precompiled_charsmap", b"x"),
    ],
)
def test_a_model_that_splits_in_another_way_cannot_be_written(tmp_path, edit):
    with pytest.raises(ValueError, match="`proto` is no Gemma vocabulary: those are BPE with byte fallback"):
        write_gguf(tmp_path / "x.gguf", Zeros(), edited(edit))


def test_a_model_that_is_none_or_does_not_fit_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"`proto` is not a SentencePiece model \(9 bytes\)"):
        write_gguf(tmp_path / "x.gguf", Zeros(), b"\xff" * 9)
    with pytest.raises(ValueError, match=r"`proto` has 560 pieces, more than the 559 rows of the embedding"):
        write_gguf(tmp_path / "x.gguf", Zeros(559), tiny.proto())
    with pytest.raises(ValueError, match="`proto` is no Gemma vocabulary: it lacks <bos>"):
        write_gguf(tmp_path / "x.gguf", Zeros(), edited(lambda model: setattr(model.pieces[2], "piece", "<s>")))
    assert not list(tmp_path.iterdir())


def replaced(values, place, value):
    values = values.copy()
    values[place] = value
    return values


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("model", lambda v: "gpt2", "ggml.model` is 'gpt2'; Gemma 2's tokenizer has 'llama'"),
        ("model", lambda v: np.uint32(1), "ggml.model` is 1; Gemma 2's tokenizer has 'llama'"),
        ("pre", lambda v: "llama-bpe", "ggml.pre` is 'llama-bpe'; Gemma 2's tokenizer has 'default' or absent"),
        ("add_space_prefix", lambda v: np.bool_(True), "add_space_prefix` is True; Gemma 2's tokenizer has False"),
        ("add_space_prefix", lambda v: None, "add_space_prefix` is None; Gemma 2's tokenizer has False"),
        ("remove_extra_whitespaces", lambda v: np.bool_(True), "remove_extra_whitespaces` is True"),
        ("precompiled_charsmap", lambda v: np.zeros(9, "u1"), "precompiled_charsmap` is an array of 9"),
        ("normalizer.lowercase", lambda v: np.bool_(True), "has 'tokenizer.ggml.normalizer.lowercase', unknown here"),
        ("bos_token_id", lambda v: np.uint32(5), "bos_token_id` is 5, and the piece <bos> has id 2"),
        ("unknown_token_id", lambda v: np.uint32(0), "unknown_token_id` is 0, and the piece <unk> has id 3"),
        ("tokens", lambda v: v[:-1], "ggml.tokens` is an array of 559; the embedding has 560 rows"),
        ("tokens", lambda v: "abc", "ggml.tokens` is 'abc'; the embedding has 560 rows"),
        ("tokens", lambda v: None, "ggml.tokens` is None; the embedding has 560 rows"),
        ("tokens", lambda v: replaced(v, 2, "<s>"), "and the piece <bos> has id None: this is no Gemma vocabulary"),
        ("tokens", lambda v: replaced(v, 500, v[501]), "make no SentencePiece model"),
        ("tokens", lambda v: replaced(v, 500, ""), "make no SentencePiece model"),
        ("tokens", lambda v: replaced(v, 217, "byte"), "make no SentencePiece model"),
        ("scores", lambda v: v[:-1], "ggml.scores` is an array of 559; it must be 560 float32"),
        ("scores", lambda v: v.astype("float64"), "it must be 560 float32"),
        ("scores", lambda v: replaced(v, 9, np.nan), "has numbers that mean nothing"),
        ("token_type", lambda v: v.astype("float32"), "token_type` is an array of 560; it must be 560 whole numbers"),
        ("token_type", lambda v: replaced(v, 9, 7), "has numbers that mean nothing"),
        ("token_type", lambda v: replaced(v, 9, 0), "has numbers that mean nothing"),
    ],
)
def test_keys_of_another_or_a_broken_tokenizer(keys, key, change, message):
    theirs = {**keys, f"tokenizer.ggml.{key}": change(keys.get(f"tokenizer.ggml.{key}"))}
    with pytest.raises(CheckpointError, match=message):
        sentencepiece_model(theirs, tiny.VOCABULARY_SIZE)


@pytest.mark.parametrize("key", ["mask_token_id", "seperator_token_id", "add_sep_token", "token_type_count", "merges"])
def test_keys_that_change_no_splitting(keys, key):
    assert sentencepiece_model({**keys, f"tokenizer.ggml.{key}": np.uint32(4)}, tiny.VOCABULARY_SIZE)
