"""Files of ours in llama.cpp itself: the same ids for text, the same logits, the same greedy tokens."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gemma2_keras import Gemma2CausalLM
from gemma2_keras.checkpoints.contents import LiveCheckpoint
from gemma2_keras.checkpoints.gguf.writing import write_gguf
from gemma2_keras.checkpoints.names import weight_map
from tests.preprocessing import tiny
from tests.preprocessing.test_tokenizer import SNIPPETS

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow
STEPS = 40
# None of them leads to two tokens that are nearly as likely. The last two are longer than the window.
PROMPTS = ["The baker", "A farmer grows", "The doctor helps", "The sky is", "A teacher", "The moon", "A dentist works"]
PROMPTS += [
    "Question: What colour is the sky?\nAnswer:",
    "The cat sat on the mat. " * 9,
    "There was a boy who had a red ball. " * 8,
]
# llama.cpp looks GELU up in a table of float16: its logits, between -30 and 30, are off by so much at the most.
ROUNDING = 0.015
FACTOR = "gemma2.rope.scaling.attn_factor"


def write(path, model, proto, **options) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`query_pre_attention_scalar` is")
        write_gguf(path, LiveCheckpoint(model.backbone), proto, **options)


@contextlib.contextmanager
def opened(path, **options):
    """llama.cpp with a file, on one thread, its cache as exact as ours."""
    model = llama_cpp.Llama(
        str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1, n_gpu_layers=0,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, **options,
    )  # fmt: skip
    try:
        yield model
    finally:
        model.close()


def their_logits(theirs, ids) -> np.ndarray:
    theirs.reset()
    theirs.eval(ids)
    return theirs.scores[: len(ids)].copy()


@pytest.fixture(scope="module")
def shipped() -> Gemma2CausalLM:
    return Gemma2CausalLM.from_preset("gemma2_tiny_en")


@pytest.fixture(scope="module")
def file(shipped, tmp_path_factory):
    path = tmp_path_factory.mktemp("shipped") / "f32.gguf"
    write(path, shipped, shipped.preprocessor.tokenizer.proto)
    return path


@pytest.fixture(scope="module")
def theirs(file):
    with opened(file) as model:
        yield model


AWKWARD_TEXT = st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=3)), max_size=12).map("".join)


@pytest.mark.once
@given(text=st.one_of(st.text(max_size=40), AWKWARD_TEXT))
@example(text=" a  b   c\n\n\n\n\n" + "\n" * 40 + " " * 40)
@example(text="<start_of_turn>user\n\U0001f408 <0x41> </h1></td>é")
def test_ids_of_text_are_the_same(shipped, theirs, text):
    # llama.cpp takes the mark that SentencePiece writes for a space to be one; we do not.
    assume("\u2581" not in text)
    tokenizer = shipped.preprocessor.tokenizer
    assert theirs.tokenize(text.encode(), add_bos=True, special=False) == [2, *tokenizer.encode(text)]
    parsed = [2, *tokenizer.encode(text, parse_special=True)]
    assert theirs.tokenize(text.encode(), add_bos=True, special=True) == parsed


@pytest.fixture(scope="module")
def greedy(shipped, logits_of):
    """Prompts as ids, our continuations of them, and our logits on the way."""
    bare = Gemma2CausalLM(shipped.backbone)
    rows = [[2, *shipped.preprocessor.tokenizer.encode(prompt)] for prompt in PROMPTS]
    token_ids, mask = np.zeros((2, len(rows), 128), "int32")
    for i, row in enumerate(rows):
        token_ids[i, : len(row)], mask[i, : len(row)] = row, 1
    made = bare.generate({"token_ids": token_ids, "padding_mask": mask}, stop_token_ids=None, max_new_tokens=STEPS)
    logits = logits_of(shipped, made["token_ids"])
    ends = [(len(row), len(row) + STEPS) for row in rows]
    return [
        (row, made["token_ids"][i, start:end].tolist(), logits[i, :end])
        for i, (row, (start, end)) in enumerate(zip(rows, ends, strict=True))
    ]


def test_greedy_tokens_are_the_same(theirs, greedy):
    assert max(len(ids) for ids, _, _ in greedy) > 64
    for ids, tokens, logits in greedy:
        first, second = np.sort(logits[len(ids) - 1 : -1])[:, :-3:-1].T
        # So that there is one right answer.
        assert (first - second).min() > 2 * ROUNDING
        assert len(set(tokens)) > 20
        theirs.reset()
        found = [token for token, _ in zip(theirs.generate(ids, temp=0.0), range(STEPS), strict=False)]
        assert found == tokens


def test_logits_are_the_same_and_would_not_be_without_our_key(file, theirs, greedy):
    with opened(file, kv_overrides={FACTOR: 1.0}) as unscaled:
        for ids, tokens, logits in greedy:
            np.testing.assert_allclose(their_logits(theirs, ids + tokens), logits, rtol=0, atol=ROUNDING)
            assert np.abs(their_logits(unscaled, ids + tokens) - logits).max() > 20 * ROUNDING


@pytest.mark.parametrize(
    ("dtype", "largest", "typical"), [("bfloat16", 0.2, 0.02), ("float16", 0.02, 0.003), ("q8_0", 0.9, 0.1)]
)
def test_narrower_files_are_as_close_as_their_numbers(shipped, greedy, tmp_path, dtype, largest, typical):
    write(tmp_path / "x.gguf", shipped, shipped.preprocessor.tokenizer.proto, dtype=dtype)
    with opened(tmp_path / "x.gguf") as narrow:
        same = total = 0
        for ids, tokens, logits in greedy:
            error = their_logits(narrow, ids + tokens) - logits
            assert np.abs(error).max() < largest
            assert np.sqrt((error**2).mean()) < typical
            narrow.reset()
            found = [token for token, _ in zip(narrow.generate(ids, temp=0.0), range(STEPS), strict=False)]
            same += next((i for i in range(STEPS) if found[i] != tokens[i]), STEPS)
            total += STEPS
        assert same > 0.9 * total


ARCHITECTURES = {
    "odd": {
        "query_pre_attention_scalar": 3,
        "attention_logit_soft_cap": None,
        "final_logit_soft_cap": 3.0,
        "rope_max_wavelength": 50.0,
    },
    # As many layers as the 27B model: llama.cpp takes width / heads for the scalar, here 6 and not the head size 8.
    "27B": {
        "num_layers": 46,
        "intermediate_dim": 8,
        "query_pre_attention_scalar": 30,
        "attention_logit_soft_cap": 2.0,
        "final_logit_soft_cap": None,
    },
}
# What llama.cpp takes where a file does not say.
DEFAULTS = {
    FACTOR: 1.0,
    "gemma2.attn_logit_softcapping": 50.0,
    "gemma2.final_logit_softcapping": 30.0,
    "gemma2.rope.freq_base": 10_000.0,
}


@pytest.mark.once
@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_any_architecture_gives_the_same_logits(tmp_path, logits_of, changes):
    model = tiny.causal_lm(**changes)
    draw = np.random.default_rng(0)
    for name, weight in weight_map(model.backbone.config).items():
        # Branches of many layers must weigh little, or the last bit of the first layer decides the logits.
        mean = -0.8 if "post_" in name and "num_layers" in changes else 0.0
        # The table of GELU aside: what is asked is attention.
        deviation = 0.0 if "down_proj" in name else 0.4
        weight.variable_of(model.backbone).assign(draw.normal(mean, deviation, weight.shape).astype("float32"))
    ids = draw.integers(3, 560, 40).tolist()
    ours = logits_of(model, np.array([ids]))[0]
    write(tmp_path / "x.gguf", model, tiny.proto())
    with opened(tmp_path / "x.gguf") as theirs:
        np.testing.assert_allclose(their_logits(theirs, ids), ours, rtol=0, atol=2e-4)
    # And what the keys say shows in the logits.
    with opened(tmp_path / "x.gguf", kv_overrides=DEFAULTS) as theirs:
        assert np.abs(their_logits(theirs, ids) - ours).max() > 0.2 * ours.std()
