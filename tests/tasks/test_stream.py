from __future__ import annotations

import keras_hub
import pytest

from gemma2_keras import Gemma2CausalLM
from gemma2_keras.errors import InputError
from tests.tasks.sharp import saying, spelling

EOS = 1
CAT = "The cat"


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": 20},
        {"max_length": 12},
        {},
        {"max_new_tokens": 20, "temperature": 1.5, "seed": 2},
        {"max_new_tokens": 20, "stop": ["e", "zebra"]},
        {"max_new_tokens": 20, "stop_token_ids": None, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_the_pieces_are_the_text_and_the_statistics_those_of_generate(sharp, options):
    stream = sharp.stream(CAT, **options)
    text, stats = sharp.generate(CAT, strip_prompt=True, return_stats=True, **options)
    pieces = list(stream)
    assert "".join(pieces) == text == stream.text
    assert all(pieces)
    counts = (stream.stats.prompt_tokens, stream.stats.new_tokens, stream.stats.finish_reasons)
    assert counts == (stats.prompt_tokens, stats.new_tokens, stats.finish_reasons)
    assert stream.stats.prefill_seconds > 0
    assert list(stream) == []


def test_text_comes_before_the_end(sharp):
    stream = sharp.stream(CAT, max_new_tokens=60)
    assert next(stream)
    assert stream.stats is None
    assert len(stream.text) < len("".join(stream)) < len(stream.text)
    assert stream.stats.new_tokens == 60


def test_the_prompt_is_the_first_piece_where_it_is_asked_for(sharp):
    pieces = list(sharp.stream(CAT, max_new_tokens=4, strip_prompt=False))
    assert pieces[0] == CAT
    assert "".join(pieces) == sharp.generate(CAT, max_new_tokens=4)


@pytest.mark.parametrize("text", ["🐈", "a🐈‍⬛é", "日本", "👩‍👩‍👧"])
def test_characters_come_whole(sharp, text):
    pieces = list(sharp.stream(CAT, max_length=90, **spelling(sharp, text, EOS)))
    assert pieces == list(text)


def test_bytes_that_become_no_character_are_marked_at_the_end(sharp):
    tokens = spelling(sharp, "a🐈")["logits_processors"][0].tokens[:-1]
    biased = sharp.stream(CAT, max_new_tokens=4, **saying(sharp, "", *tokens))
    assert list(biased) == ["a", "\ufffd"]


@pytest.mark.parametrize("stop", ["🐈", ["sat 🐈", "x"], ["t 🐈 on the", "🐈 off"], "on the log.!"])
def test_no_piece_holds_what_belongs_to_a_stop_string(sharp, stop):
    text = "a cat sat 🐈 on the log."
    expected = sharp.generate(CAT, max_length=90, strip_prompt=True, stop=stop, **saying(sharp, text, EOS))
    seen = ""
    for says in (saying, spelling):
        stream = sharp.stream(CAT, max_length=90, stop=stop, **says(sharp, text, EOS))
        seen = ""
        for piece in stream:
            seen += piece
            assert expected.startswith(seen)
        assert seen == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"max_length": 97}, "`max_length` is 97"),
        ({"temperature": -1}, "`temperature`"),
        ({"stop": ""}, "`stop`"),
        ({"seed": -1}, "`seed`"),
        ({"forbidden_tokens": [10**6]}, "`forbidden_tokens`"),
    ],
)
def test_errors_are_raised_at_once(sharp, options, message):
    with pytest.raises(InputError, match=message):
        sharp.stream(CAT, **options)
    with pytest.raises(TypeError, match="'temprature'"):
        sharp.stream(CAT, temprature=1)


@pytest.mark.parametrize("prompt", [[CAT], {"prompts": CAT}, None, 5])
def test_one_prompt_alone_streams(sharp, prompt):
    with pytest.raises(InputError, match=f"one prompt, a string; given {type(prompt).__name__}"):
        sharp.stream(prompt)
    with pytest.raises(InputError, match="empty"):
        sharp.stream("")


def test_without_a_preprocessor_nothing_streams(bare):
    with pytest.raises(InputError, match="needs a preprocessor"):
        bare.stream(CAT)


@pytest.mark.parametrize("name", ["beam", "contrastive"])
def test_samplers_that_search_do_not_stream(sharp, name):
    model = Gemma2CausalLM(sharp.backbone, sharp.preprocessor)
    model.compile(sampler=name if name == "contrastive" else keras_hub.samplers.BeamSampler(num_beams=2))
    with pytest.raises(InputError, match="cannot stream: choose another sampler"):
        model.stream(CAT)
    with pytest.raises(InputError, match="cannot stream: choose another sampler"):
        model.chat().stream(CAT)


def test_a_stream_prints_itself_and_its_statistics(sharp, capsys):
    stream = sharp.stream(CAT, max_new_tokens=12)
    text = stream.show()
    assert text == sharp.generate(CAT, max_new_tokens=12, strip_prompt=True)
    assert capsys.readouterr().out == f"{text}\n\n[{stream.stats}]\n"
    # Once more, what is known already; and from the middle on, the whole.
    for shown in (stream, sharp.stream(CAT, max_new_tokens=12)):
        shown.text or next(shown)
        shown._ipython_display_()
        assert capsys.readouterr().out == f"{text}\n\n[{shown.stats}]\n"


def test_leaving_early_leaves_the_model_usable(sharp):
    expected = sharp.generate(CAT, max_new_tokens=40, strip_prompt=True)
    for piece in sharp.stream(CAT, max_new_tokens=40):
        assert expected.startswith(piece)
        break
    left = sharp.stream(CAT, max_new_tokens=40)
    beginning = next(left)
    # Two at once do not disturb one another.
    pieces = list(zip(sharp.stream(CAT, max_new_tokens=40), sharp.stream("7 +", max_new_tokens=40), strict=False))
    assert expected.startswith("".join(piece for piece, _ in pieces))
    assert sharp.generate(CAT, max_new_tokens=40, strip_prompt=True) == expected
    assert beginning + "".join(left) == expected


def test_an_error_of_a_processor_comes_through_and_leaves_the_model_usable(sharp):
    expected = sharp.generate(CAT, max_new_tokens=4)

    def breaks(ids, logits):
        if len(ids[0]) > 6:
            raise RuntimeError("broken")
        return logits

    stream = sharp.stream(CAT, max_new_tokens=40, logits_processors=[breaks])
    with pytest.raises(RuntimeError, match="broken"):
        list(stream)
    assert stream.stats is None
    assert sharp.generate(CAT, max_new_tokens=4) == expected
