from __future__ import annotations

import json

import pytest
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gemma2_keras import Gemma2Tokenizer
from gemma2_keras.checkpoints.tokenizer_files import describe_tokenizer, write_tokenizer
from gemma2_keras.preprocessing.chat_template import encode_chat
from tests.preprocessing import tiny
from tests.preprocessing.test_tokenizer import SNIPPETS

pytestmark = pytest.mark.once

HARD = [
    *("", "a", " ", "  ", "   a  b   ", "\n", "\n\n\n x\n\n", "\t\t\t", "\r\n", "e" * 300, " " * 40, "\n" * 40),
    *("<start_of_turn>user\nhi<end_of_turn>\n", "<bos><eos><pad>", "<unused5>x<mask>", "<start_of_turn", "< unused1>"),
    *("<<start_of_turn>>", "<0x41>", "[@BOS@]", "<table><tr>", "</b> <i>", "def f(x):\n    return x+1\n"),
    *("\U0001f408\u200d\u2b1b", "日本語テキスト", "a\u0301", "\x00\x01", "\u200b\u200d", "\u00a0x", "\ufeff"),
    *("\U0010ffff", "\ufb01 \u00bd \u2167", "\u00df \u017f \u0130 \u0131", "0123456789 3.14", "7 + 5 = 12"),
]
_PIECES = st.sampled_from([*SNIPPETS, *HARD])


@pytest.fixture(scope="module", params=["tiny", "shipped"])
def pair(request, tmp_path_factory):
    """A tokenizer of ours, and what transformers makes of its files."""
    ours = tiny.tokenizer() if request.param == "tiny" else Gemma2Tokenizer.from_preset("gemma2_tiny_en")
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, ours)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", HARD)
def test_hard_strings_have_the_same_ids_and_come_back(pair, text):
    ours, theirs = pair
    ids = theirs(text)["input_ids"]
    assert ids == [2, *ours.encode(text, parse_special=True)]
    assert theirs.decode(ids[1:], clean_up_tokenization_spaces=False) == text


@settings(max_examples=400)
@given(text=st.text() | st.lists(_PIECES | st.text(max_size=4)).map("".join))
def test_any_text_has_the_same_ids(pair, text):
    ours, theirs = pair
    # The one character that SentencePiece takes for a space, and we for itself.
    assume("\u2581" not in text)
    assert theirs(text)["input_ids"] == [2, *ours.encode(text, parse_special=True)]


@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": " Be brief.\n"}]])
def test_the_chat_template_gives_the_ids_of_our_conversations(pair, system, reply):
    ours, theirs = pair
    messages = [*system, {"role": "user", "content": "Hi \n"}, {"role": "assistant", "content": " Aye!"}]
    messages += [{"role": "user", "content": "And?"}] * reply
    ids = theirs.apply_chat_template(messages, add_generation_prompt=reply)["input_ids"]
    assert ids == encode_chat(ours, messages, reply=reply)


def test_roles_out_of_order_are_refused(pair):
    _, theirs = pair
    with pytest.raises(Exception, match="must alternate"):
        theirs.apply_chat_template([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_special_tokens_are_known_by_their_roles(pair):
    _, theirs = pair
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id) == (0, 1, 2, 3)
    assert {106, 107} <= set(theirs.all_special_ids) | set(theirs.added_tokens_decoder)


def test_a_vocabulary_of_another_kind_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.proto = b"\x0a\x03abc"
    with pytest.raises(ValueError, match="`proto` is n"):
        describe_tokenizer(tokenizer)
