from __future__ import annotations

import copy
import json

import pytest
import sentencepiece
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gemma2_keras import Gemma2CausalLM, Gemma2Tokenizer
from gemma2_keras.checkpoints.tokenizer_json import describe_tokenizer, sentencepiece_model
from gemma2_keras.checkpoints.vocabulary import parse_model
from gemma2_keras.errors import CheckpointError
from tests.checkpoints.test_tokenizer_files import HARD
from tests.preprocessing import tiny

pytestmark = pytest.mark.once

_PIECES = st.sampled_from([*HARD, "the ", "ing", "  ", "<eos>"])


@pytest.fixture(scope="module", params=["tiny", "shipped"])
def pair(request):
    """A tokenizer, and what comes back from its `tokenizer.json`."""
    ours = tiny.tokenizer() if request.param == "tiny" else Gemma2Tokenizer.from_preset("gemma2_tiny_en")
    return ours, Gemma2Tokenizer(sentencepiece_model(describe_tokenizer(ours)))


@pytest.fixture
def described():
    return describe_tokenizer(Gemma2Tokenizer.from_preset("gemma2_tiny_en"))


@pytest.mark.parametrize("text", HARD)
def test_hard_strings_keep_their_ids(pair, text):
    ours, again = pair
    for special in (False, True):
        ids = ours.encode(text, parse_special=special)
        assert again.encode(text, parse_special=special) == ids
        assert again.decode(ids) == ours.decode(ids)


@settings(max_examples=400)
@given(text=st.text() | st.lists(_PIECES | st.text(max_size=4)).map("".join))
def test_any_text_keeps_its_ids(pair, text):
    ours, again = pair
    assert again.encode(text) == ours.encode(text)


def test_pieces_kinds_and_roles_are_kept(pair):
    ours, again = pair
    kinds = [[(piece.piece, piece.type) for piece in parse_model(t.proto).pieces] for t in pair]
    assert kinds[0] == kinds[1]
    assert again.special_token_ids == ours.special_token_ids
    assert again.stop_token_ids == ours.stop_token_ids
    assert describe_tokenizer(again) == describe_tokenizer(ours)


def test_a_folder_that_transformers_wrote_has_a_tokenizer(tmp_path):
    model = tiny.causal_lm()
    model.export_to_transformers(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    transformers.Gemma2ForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "tokenizer.model").exists()
    tokenizer = Gemma2CausalLM.from_preset(tmp_path / "theirs").preprocessor.tokenizer
    for text in HARD:
        assert [2, *tokenizer.encode(text, parse_special=True)] == theirs(text)["input_ids"]


def test_a_token_that_was_added_is_whole(described):
    rows = len(described["model"]["vocab"])
    described["added_tokens"].append({"id": rows, "content": "<call tool>", "special": True, "normalized": False})
    tokenizer = Gemma2Tokenizer(sentencepiece_model(described))
    ids = tokenizer.encode("a<call tool>b", parse_special=True)
    assert rows in ids
    assert tokenizer.decode(ids) == "a<call tool>b"


def test_earlier_versions_of_the_file_mean_the_same(described):
    expected = sentencepiece_model(copy.deepcopy(described))
    described["pre_tokenizer"] = None
    described["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    described["model"]["continuing_subword_prefix"] = ""
    del described["model"]["ignore_merges"]
    described["model"]["merges"] = [" ".join(pair) for pair in described["model"]["merges"]]
    # As the library that writes them sorts pairs of equal rank, and with pairs that make an added token.
    described["model"]["merges"].insert(0, "\n \n")
    assert sentencepiece_model(described) == expected


def _set(path, value):
    def change(file):
        *parents, last = path
        for key in parents:
            file = file[key]
        file[last] = value

    return change


def _swap(file):
    merges = file["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    # Between two pairs that make one piece, another.
    i = next(i for i in range(2, len(made)) if made[i] == made[i - 1])
    merges.insert(i - 1, merges.pop(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.pop("model"), "`model` in tokenizer.json is None"),
        (_set(["model"], []), "`model` in tokenizer.json is an array of 0"),
        (_set(["model", "type"], "WordPiece"), "`model.type` in tokenizer.json is 'WordPiece'"),
        (_set(["model", "byte_fallback"], False), "`model.byte_fallback`"),
        (_set(["model", "dropout"], 0.1), "`model.dropout`"),
        (_set(["model", "end_of_word_suffix"], "</w>"), "`model.end_of_word_suffix`"),
        (_set(["model", "what"], 1), "'what', unknown here"),
        (_set(["normalizer"], {"type": "NFC"}), "`normalizer` in tokenizer.json"),
        (_set(["normalizer"], None), "`normalizer` in tokenizer.json is None"),
        (_set(["pre_tokenizer"], {"type": "ByteLevel"}), "`pre_tokenizer`"),
        (_set(["decoder"], None), "`decoder`"),
        (_set(["what"], 1), "'what', unknown here"),
        (_set(["added_tokens"], {}), "`added_tokens` in tokenizer.json is {}; it must be a list"),
        (_set(["added_tokens", 0], 5), "has 5, which is no token"),
        (_set(["added_tokens", 0, "id"], True), "which is no token"),
        (_set(["added_tokens", 0, "content"], ""), "which is no token"),
        (_set(["added_tokens", 0, "lstrip"], True), "has `lstrip`, which is not implemented"),
        (_set(["added_tokens", 0, "id"], 77), "has two ids"),
        (_set(["added_tokens", 0, "content"], "new"), "are not 0 to"),
        (_set(["model", "vocab"], []), "`vocab` in tokenizer.json must be an object of ids"),
        (_set(["model", "vocab", "new"], 1.0), "`vocab` in tokenizer.json must be an object of ids"),
        (_set(["model", "vocab", "new"], 5), "are not 0 to"),
        (_set(["model", "vocab", "new"], -1), "are not 0 to"),
        (_set(["model", "vocab", "new"], 10**30), "are not 0 to"),
        (_set(["model", "merges"], {}), "`merges` in tokenizer.json is {}; it must be a list"),
        (_set(["model", "merges", 0], "a b c"), "which is no pair of pieces"),
        (_set(["model", "merges", 0], [1, 2]), "which is no pair of pieces"),
        (_set(["model", "merges", 0], None), "which is no pair of pieces"),
        (lambda file: file["model"]["vocab"].update({"\ud800": len(file["model"]["vocab"])}), "is no text"),
        (lambda file: file["model"]["vocab"].update({"": len(file["model"]["vocab"])}), "make no SentencePiece model"),
        (lambda file: file["model"]["merges"].pop(), "are not those of a SentencePiece model"),
        (_swap, "are not those of a SentencePiece model"),
    ],
)
def test_what_splits_text_in_another_way_is_refused(described, change, message):
    change(described)
    with pytest.raises(CheckpointError) as error:
        sentencepiece_model(described)
    assert message in str(error.value)


def test_a_vocabulary_without_bytes_or_special_tokens_is_refused(described):
    for piece, message in (("<bos>", "has no <bos>"), ("<0x41>", "make no SentencePiece model")):
        changed = copy.deepcopy(described)
        i = changed["model"]["vocab"].pop(piece)
        changed["model"]["vocab"]["\ua66e"] = i
        changed["added_tokens"] = [token for token in changed["added_tokens"] if token["id"] != i]
        with pytest.raises(CheckpointError, match=message):
            sentencepiece_model(changed)


@given(data=st.data())
@settings(max_examples=200)
def test_a_changed_file_is_refused_or_makes_a_tokenizer(data):
    text = json.dumps(describe_tokenizer(tiny.tokenizer()))
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + data.draw(st.sampled_from('0129"{}[],:ab')) + text[place + 1 :]
    try:
        file = json.loads(changed)
    except ValueError:
        assume(False)
    try:
        proto = sentencepiece_model(file)
    except CheckpointError:
        return
    assert sentencepiece.SentencePieceProcessor(model_proto=proto).vocab_size() > 0
