from __future__ import annotations

import keras_hub
import numpy as np
import pytest
from keras import ops

from gemma2_keras import Gemma2CausalLM
from gemma2_keras.errors import InputError
from gemma2_keras.generation.streaming import GenerationStats
from gemma2_keras.tasks import generating
from tests.tasks.sharp import continued, saying, sharpened, spelling

EOS, END_OF_TURN = 1, 107
CAT, ONCE = "The cat", "Once upon a"
SEEDED = {"temperature": 1.5, "max_new_tokens": 8, "strip_prompt": True}


@pytest.fixture(scope="module")
def cat(sharp) -> list[int]:
    """The tokens of a prompt."""
    return [2, *sharp.preprocessor.tokenizer.encode(CAT)]


@pytest.fixture(scope="module")
def likely(bare, cat) -> list[int]:
    """What greedy decoding makes of it."""
    made = continued(bare, [cat], 24)[0]
    # Some tokens come again, so that penalties have something to do.
    assert len(set(made)) < len(made)
    return made


def with_sampler(model, sampler) -> Gemma2CausalLM:
    again = Gemma2CausalLM(model.backbone, model.preprocessor)
    again.compile(sampler=sampler)
    return again


# Stopping


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        ("cat", "The "),
        (["cat"], "The "),
        (("zebra", "t on the l"), "The cat sa"),
        (["the", "sat", "log"], "The cat "),
        ("The", ""),
        ("log.", "The cat sat on the "),
        ("log. ", "The cat sat on the log."),
        ("zebra", "The cat sat on the log."),
        ([], "The cat sat on the log."),
        # A beginning that comes to nothing, and one that begins within another.
        ("sat on a", "The cat sat on the log."),
        ("tt", "The cat sat on the log."),
        ("at sat on the log", "The c"),
    ],
)
def test_a_stop_string_ends_the_text_wherever_token_borders_lie(sharp, stop, kept):
    text = "The cat sat on the log."
    for says in (saying, spelling):
        options = {"max_length": 60, "stop": stop, "return_stats": True, **says(sharp, text, EOS)}
        found, stats = sharp.generate(ONCE, **options)
        assert found == ONCE + kept
        assert stats.finish_reasons == ("stop_token" if kept == text else "stop_string",)


def test_rows_end_at_their_own_stop_strings(sharp):
    free = sharp.generate([CAT, ONCE], max_new_tokens=24, strip_prompt=True)
    # In the first row across a border of tokens or not, in the other maybe never.
    stop = free[0][5:9]
    expected = [text.split(stop)[0] for text in free]
    assert expected[0] != free[0]
    for options in ({}, {"temperature": 1e-4}):
        found, stats = sharp.generate(
            [CAT, ONCE], max_new_tokens=24, strip_prompt=True, stop=stop, return_stats=True, **options
        )
        assert found == expected
        reasons = ["length" if a == b else "stop_string" for a, b in zip(free, found, strict=True)]
        assert list(stats.finish_reasons) == reasons


@pytest.mark.parametrize("token", [EOS, END_OF_TURN])
def test_both_ends_end_by_default_and_give_no_text(sharp, token):
    text = sharp.generate(CAT, max_length=40, **saying(sharp, " sat.", token))
    assert text == "The cat sat."
    more = sharp.generate(CAT, max_new_tokens=4, stop_token_ids=None, **saying(sharp, " sat.", token, 537))
    assert more == "The cat sat.."


# Chance


def test_a_seed_gives_the_same_text_again_and_another_seed_another(sharp):
    texts = [sharp.generate(CAT, seed=seed, **SEEDED) for seed in (1, 1, 2, np.int64(1), 2**70)]
    assert texts[0] == texts[1] == texts[3]
    assert len({texts[0], texts[2], texts[4]}) == 3


def test_without_a_seed_each_call_draws_anew(sharp):
    assert len({sharp.generate(CAT, **SEEDED) for _ in range(3)}) == 3


def test_what_is_drawn_for_a_row_does_not_depend_on_the_batch(sharp):
    alone = [sharp.generate(prompt, seed=5, **SEEDED) for prompt in (CAT, ONCE)]
    assert sharp.generate([CAT, ONCE], seed=5, **SEEDED) == alone
    assert sharp.generate([ONCE, "7 +", CAT], seed=5, **SEEDED)[::2] == alone[::-1]


def test_equal_prompts_of_a_call_differ(sharp):
    texts = sharp.generate([CAT, ONCE, CAT, CAT], seed=5, **SEEDED)
    assert len(set(texts)) == 4
    assert texts[0] == sharp.generate(CAT, seed=5, **SEEDED)


def test_a_seed_goes_before_that_of_the_sampler(sharp):
    model = with_sampler(sharp, keras_hub.samplers.RandomSampler(seed=3, temperature=1.5))
    options = {"max_new_tokens": 8, "strip_prompt": True}
    free = model.generate(CAT, **options)
    seeded = [model.generate(CAT, seed=1, **options) for _ in range(2)]
    assert seeded[0] == seeded[1] == sharp.generate(CAT, seed=1, **SEEDED)
    assert free != seeded[0]


# Options of a call


@pytest.fixture(scope="module")
def random_bare(sharp) -> Gemma2CausalLM:
    model = Gemma2CausalLM(sharp.backbone)
    model.compile(sampler=keras_hub.samplers.RandomSampler(temperature=2.0))
    return model


GREEDY = [{"temperature": 0}, {"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]


@pytest.mark.parametrize("options", GREEDY, ids=lambda options: next(iter(options)))
def test_options_that_leave_the_likeliest_token_alone(random_bare, cat, likely, options):
    sampler = random_bare.sampler
    assert continued(random_bare, [cat], 24, **options) == [likely]
    assert random_bare.sampler is sampler
    # Of the next call nothing is left.
    assert continued(random_bare, [cat], 24) != [likely]


def test_typical_sampling_of_one_token_leaves_nothing_to_chance(random_bare, cat):
    made = [continued(random_bare, [cat], 8, typical_p=1e-6, seed=seed)[0] for seed in range(3)]
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 1e-3}])
def test_a_greedy_model_samples_when_a_call_asks_for_it(bare, cat, likely, options):
    made = [continued(bare, [cat], 24, seed=seed, **options)[0] for seed in (1, 2)]
    assert made[0] != made[1]
    assert continued(bare, [cat], 24) == [likely]


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_a_great_penalty_lets_no_token_come_again(bare, cat, likely, name):
    # Logits that were divided by it are all about zero, and those of tokens that were not seen are higher.
    made = continued(bare, [cat], 24, **{name: 1e6})[0]
    assert len(set(made)) == 24
    # The first token is penalized by what the prompt holds alone.
    assert name == "repetition_penalty" or made[0] == likely[0]
    assert continued(bare, [cat], 24) == [likely]


def test_a_bias_and_forbidden_tokens_decide(bare, cat, likely):
    assert continued(bare, [cat], 5, logit_bias={500: 1000.0}) == [[500] * 5]
    assert continued(bare, [cat], 1, logit_bias={likely[0]: -1000}) != [likely[:1]]
    made = continued(bare, [cat], 24, forbidden_tokens=likely)[0]
    assert not set(made) & set(likely)
    assert continued(bare, [cat], 5, logit_bias={500: 1000.0, 501: 999.0}, forbidden_tokens=(500,)) == [[501] * 5]
    assert continued(bare, [cat], 24) == [likely]


def test_forbidden_tokens_may_be_an_array(bare, cat, likely):
    made = continued(bare, [cat], 8, forbidden_tokens=np.array(likely))[0]
    assert not set(made) & set(likely)


def test_processors_see_the_rows_and_run_in_their_order(bare, cat):
    seen = []

    def only_500(ids, logits):
        seen.append([list(row) for row in ids])
        return np.where(np.arange(logits.shape[1]) == 500, 1.0, np.minimum(logits, 0.0))

    def one_more(ids, logits):
        assert (logits.argmax(-1) == 500).all()
        return np.roll(logits, 1, axis=1)

    assert continued(bare, [cat, cat[:2]], 3, logits_processors=[only_500, one_more]) == [[501] * 3] * 2
    assert seen == [[cat + [501] * i, cat[:2] + [501] * i] for i in range(3)]


def test_an_option_of_none_is_that_of_the_sampler(sharp):
    options = dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "typical_p", "logit_bias", "logits_processors"))
    assert sharp.generate(CAT, max_new_tokens=6, **options) == sharp.generate(CAT, max_new_tokens=6)


class Fixed(keras_hub.samplers.Sampler):
    """Chooses one token, and keeps the probabilities that it was given."""

    def get_next_token(self, probabilities):
        self.given = ops.convert_to_numpy(probabilities)
        return ops.full(probabilities.shape[:1], 500, "int32")


def test_a_sampler_of_ones_own_chooses_by_its_temperature(sharp, bare, cat):
    model = Gemma2CausalLM(sharp.backbone)
    model.compile(sampler=Fixed(temperature=2.0))
    assert continued(model, [cat], 1) == [[500]]
    logits = ops.convert_to_numpy(ops.stop_gradient(bare.score(np.array([cat]))))[0, -1].astype("float64") / 2
    expected = np.exp(logits - logits.max())
    np.testing.assert_allclose(model.sampler.given[0], expected / expected.sum(), rtol=1e-3, atol=1e-7)
    # A filter leaves it less to choose from.
    continued(model, [cat], 1, top_k=3)
    assert (model.sampler.given > 0).sum() == 3


SEARCHES = {"beam": lambda: keras_hub.samplers.BeamSampler(num_beams=2), "contrastive": lambda: "contrastive"}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"top_k": 3},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0},
        {"logit_bias": {500: 1.0}},
        {"forbidden_tokens": [500]},
        {"logits_processors": [lambda ids, logits: logits]},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("name", SEARCHES)
def test_samplers_that_search_refuse_options_they_cannot_follow(sharp, name, options):
    model = with_sampler(sharp, SEARCHES[name]())
    with pytest.raises(InputError, match=r"Sampler chooses by itself.*another sampler in `compile`"):
        model.generate(CAT, max_new_tokens=2, **options)


def test_samplers_that_search_stop_at_strings_and_count(sharp):
    model = with_sampler(sharp, keras_hub.samplers.BeamSampler(num_beams=2))
    free, stats = model.generate(CAT, max_new_tokens=8, strip_prompt=True, return_stats=True)
    assert (stats.new_tokens, stats.finish_reasons) == (8, ("length",))
    text, stats = model.generate(CAT, max_new_tokens=8, strip_prompt=True, return_stats=True, stop=free[4:6])
    assert text == free.split(free[4:6])[0]
    assert stats.finish_reasons == ("stop_string",)


# Statistics


def test_statistics_count_tokens_and_say_why_rows_ended(sharp):
    tokenizer = sharp.preprocessor.tokenizer
    prompts = [CAT, ONCE]
    given = sum(len(tokenizer.encode(prompt)) + 1 for prompt in prompts)
    texts, stats = sharp.generate(prompts, max_new_tokens=5, return_stats=True)
    assert texts == sharp.generate(prompts, max_new_tokens=5)
    assert isinstance(stats, GenerationStats)
    assert (stats.prompt_tokens, stats.new_tokens) == (given, 10)
    assert stats.finish_reasons == ("length", "length")
    assert min(stats.prefill_seconds, stats.decode_seconds) > 0
    assert min(stats.prompt_tokens_per_second, stats.tokens_per_second) > 0
    assert stats.peak_memory_bytes > 1e7
    text, stats = sharp.generate(CAT, max_length=40, return_stats=True, **saying(sharp, " sat.", EOS))
    # The token that ended the row was made, too.
    assert (text, stats.new_tokens) == ("The cat sat.", len(tokenizer.encode(" sat.")) + 1)
    assert stats.finish_reasons == ("stop_token",)


def test_statistics_of_arrays(bare, cat):
    ids = np.array([cat + [0] * 6])
    made, stats = bare.generate(
        {"token_ids": ids, "padding_mask": ids > 0}, stop_token_ids=None, max_new_tokens=4, return_stats=True
    )
    assert made["padding_mask"].sum() == len(cat) + 4
    assert (stats.prompt_tokens, stats.new_tokens, stats.finish_reasons) == (len(cat), 4, ("length",))


def test_limits_make_room_for_bare_token_ids(bare, cat, likely):
    ids = np.array([cat, [*cat[:2], *[0] * (len(cat) - 2)]])
    given = {"token_ids": ids, "padding_mask": ids > 0}
    with pytest.raises(InputError, match="leaves no room within"):
        bare.generate(given, stop_token_ids=None)
    made = bare.generate(given, stop_token_ids=None, max_new_tokens=4)
    assert made["token_ids"][0].tolist() == [*cat, *likely[:4]]
    assert made["padding_mask"].sum(axis=1).tolist() == [len(cat) + 4, 6]
    made = bare.generate(given, stop_token_ids=None, max_length=len(cat) + 3)
    assert made["token_ids"].shape == (2, len(cat) + 3)
    assert made["token_ids"][0].tolist() == [*cat, *likely[:3]]
    assert made["padding_mask"].all()


# Many prompts


PROMPTS = [CAT, ONCE, "7 +", "The sky is", "Question: What", CAT, "The dog"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_list_longer_than_a_batch_gives_what_single_prompts_give(sharp, monkeypatch, size):
    expected = [sharp.generate(prompt, max_new_tokens=4) for prompt in PROMPTS]
    monkeypatch.setattr(generating, "rows_at_once", lambda backbone, length: size)
    found, stats = sharp.generate(PROMPTS, max_new_tokens=4, return_stats=True)
    assert found == expected
    assert (stats.new_tokens, len(stats.finish_reasons)) == (4 * len(PROMPTS), len(PROMPTS))


def test_chance_does_not_see_where_a_list_is_cut(sharp, monkeypatch):
    whole = sharp.generate(PROMPTS, seed=4, **SEEDED)
    monkeypatch.setattr(generating, "_MOST_ROWS", 2)
    assert sharp.generate(PROMPTS, seed=4, **SEEDED) == whole


@pytest.mark.parametrize(
    ("verbose", "prompts", "shown"),
    [("auto", 3, True), ("auto", 2, False), ("auto", 1, False), (1, 1, True), (1, 3, True), (0, 3, False)],
)
def test_a_progress_bar_shows_where_it_is_asked_for(sharp, monkeypatch, capsys, verbose, prompts, shown):
    monkeypatch.setattr(generating, "_MOST_ROWS", 2)
    sharp.generate(PROMPTS[:prompts], max_new_tokens=2, verbose=verbose)
    assert (f"{prompts}/{prompts}" in capsys.readouterr().out) is shown


def test_as_many_rows_are_run_as_memory_holds(sharp, monkeypatch):
    found = []
    for available in (None, 10**12, 10**7, 10**6, 0):
        monkeypatch.setattr(generating, "available_bytes", lambda available=available: available)
        found.append(generating.rows_at_once(sharp.backbone, 64))
    assert found[0] == found[1] == generating._MOST_ROWS
    assert found[1:] == sorted(found[1:], reverse=True)
    assert found[-1] == 1


@pytest.mark.parametrize("batched", [True, False])
def test_a_dataset_takes_the_same_options(sharp, batched):
    tensorflow = pytest.importorskip("tensorflow")
    dataset = tensorflow.data.Dataset.from_tensor_slices([CAT, ONCE, CAT])
    dataset = dataset.batch(2) if batched else dataset
    expected = sharp.generate([CAT, ONCE, CAT], seed=4, **SEEDED)
    assert expected[0] != expected[2]
    assert sharp.generate(dataset, seed=4, **SEEDED) == expected
    free = sharp.generate([CAT, ONCE], max_new_tokens=4, strip_prompt=True)
    assert sharp.generate(dataset, max_new_tokens=4, strip_prompt=True) == [*free, free[0]]
    stopped = [text.split(free[0][1])[0] for text in free]
    assert sharp.generate(dataset, stop=free[0][1], max_new_tokens=4, strip_prompt=True)[:2] == stopped


# Calls as KerasHub's tasks take them


def test_calls_of_kerashub_work(sharp):
    expected = sharp.generate(CAT, max_length=12, stop_token_ids=[END_OF_TURN])
    assert sharp.generate(CAT, 12) == expected
    assert sharp.generate([CAT], 12, [END_OF_TURN]) == [expected]
    assert sharp.generate({"prompts": [CAT]}, 12, "auto", True) == [expected.removeprefix(CAT)]
    assert sharp.generate(CAT, max_length=12, stop_token_ids=None, strip_prompt=False) == expected


def test_a_generate_function_continues_what_was_preprocessed(sharp):
    function = sharp.make_generate_function()
    given = sharp.preprocessor.generate_preprocess([CAT, ONCE], sequence_length=12)
    made = function(given, stop_token_ids=[EOS])
    expected = sharp.generate([CAT, ONCE], max_length=12)
    assert sharp.preprocessor.generate_postprocess(made) == expected
    assert sharp.preprocessor.generate_postprocess(sharp.generate_step(given)) == expected


def test_a_generate_function_uses_the_sampler(sharp):
    model = with_sampler(sharp, Fixed())
    given = model.preprocessor.generate_preprocess([CAT], sequence_length=12)
    made = model.generate_step(given)["token_ids"][0]
    assert set(made[given["padding_mask"][0] == 0].tolist()) == {500}


# Weights and dtypes


def test_generation_sees_weights_that_changed(sharp):
    model, other = sharpened(), sharpened()
    before = model.generate(CAT, max_new_tokens=6)
    assert before == sharp.generate(CAT, max_new_tokens=6)
    random = np.random.default_rng(8)
    for variable in model.weights:
        variable.assign(random.normal(1, 0.3, variable.shape))
    other.set_weights(model.get_weights())
    after = model.generate(CAT, max_new_tokens=6)
    assert after == other.generate(CAT, max_new_tokens=6)
    assert after != before


def test_adapters_are_heard_and_sampling_with_them_works():
    model = sharpened()
    before = model.generate(CAT, max_new_tokens=6)
    model.enable_lora(2)
    assert model.generate(CAT, max_new_tokens=6) == before
    random = np.random.default_rng(5)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0, 1, variable.shape))
    after = model.generate([CAT, ONCE], max_new_tokens=6)
    assert after[0] != before
    assert after[0] == model.generate(CAT, max_new_tokens=6, temperature=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_of_low_precision_generates(dtype):
    model = sharpened(num_layers=1, dtype=dtype)
    texts, stats = model.generate([CAT, ONCE], max_new_tokens=5, return_stats=True)
    assert stats.new_tokens == 10
    assert texts[0].startswith(CAT)
    assert "".join(model.stream(CAT, max_new_tokens=5, strip_prompt=False)) == texts[0]
