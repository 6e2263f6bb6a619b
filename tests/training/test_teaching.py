"""What a teacher expects, kept for its student."""

from __future__ import annotations

import os
import signal

import keras
import numpy as np
import pytest
from keras import ops

from gemma2_keras import DistillationLoss, Gemma2CausalLM, TokenDataset, fine_tune, prepare, teach
from gemma2_keras.errors import InputError
from gemma2_keras.generation import engine
from gemma2_keras.training import teaching
from tests.preprocessing import tiny
from tests.tasks.sharp import sharpened
from tests.training import small
from tests.training.test_fine_tuning import At

RECORDS = [
    {"prompt": "The cat", "response": " sat on the mat."},
    {"prompt": "The dog", "response": " sat on the log."},
    {"prompt": "7 +", "response": " 5 = 12"},
    {"prompt": "Once upon a", "response": " time there was a dog."},
]


@pytest.fixture(scope="module")
def teacher():
    return sharpened(num_layers=1)


@pytest.fixture(scope="module")
def student():
    return tiny.causal_lm(num_layers=1)


@pytest.fixture(scope="module")
def packed(student):
    return prepare(RECORDS, student, sequence_length=24, batch_size=2, packing=True)


def shares_of(model, x) -> np.ndarray:
    """(N, T, V) float64 probabilities from all logits."""
    logits = ops.convert_to_numpy(ops.stop_gradient(model(x))).astype("float64")
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


@pytest.mark.parametrize("chunk", [8, 512])
def test_likeliest_words_of_all_logits_are_kept(teacher, student, packed, monkeypatch, chunk):
    monkeypatch.setattr(engine, "CHUNK", chunk)
    assert packed.x["padding_mask"].max() > 1
    taught = teach(teacher, packed, student, top_k=5, verbose=0)
    expected = shares_of(teacher, packed.x)
    counted = packed.sample_weight != 0
    ids, shares = taught.y["teacher_ids"], taught.y["teacher_shares"]
    assert (ids.dtype, shares.dtype) == ("int32", "float32")
    kept = np.take_along_axis(expected, ids, -1)
    np.testing.assert_allclose(shares[counted], kept[counted], rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(kept[counted], -np.sort(-expected, -1)[counted][:, :5], rtol=1e-4)
    assert not shares[~counted].any()
    assert taught.coverage == pytest.approx(kept[counted].sum(-1).mean(), rel=1e-4)
    assert taught.y["labels"] is packed.y
    for index in range(packed.num_batches):
        found, given = taught[index], packed[index]
        np.testing.assert_array_equal(found[0]["token_ids"], given[0]["token_ids"])
        np.testing.assert_array_equal(found[1]["labels"], given[1])
        np.testing.assert_array_equal(found[2], given[2])
    assert taught.digest != packed.digest


def test_all_words_are_the_whole_distribution(teacher, student, packed):
    taught = teach(teacher, packed, student, top_k=tiny.VOCABULARY_SIZE, verbose=0)
    counted = packed.sample_weight != 0
    assert taught.coverage == pytest.approx(1.0, abs=1e-5)
    found = np.zeros((*packed.y.shape, tiny.VOCABULARY_SIZE))
    np.put_along_axis(found, taught.y["teacher_ids"], taught.y["teacher_shares"].astype("float64"), -1)
    np.testing.assert_allclose(found[counted], shares_of(teacher, packed.x)[counted], atol=5e-4)


def divergence(teacher, student, data) -> float:
    """Mean KL(teacher || student) of the tokens that count, in nats."""
    theirs, ours = (shares_of(model, data.x)[data.sample_weight != 0] for model in (teacher, student))
    return float((theirs * (np.log(theirs + 1e-30) - np.log(ours + 1e-30))).sum(-1).mean())


def test_student_comes_nearer_to_its_teacher():
    teacher, student = small.model(lora=False, dropout=0.0, seed=1), small.model(lora=False, dropout=0.0, seed=2)
    numbers = np.random.default_rng(3)
    for variable in teacher.weights:
        variable.assign(numbers.normal(0, 0.4, variable.shape))
    # What adapters cannot change is the teacher's already.
    table = ops.convert_to_numpy(teacher.backbone.token_embedding.embeddings)
    student.backbone.token_embedding.embeddings.assign(table)
    student.enable_lora(8, targets="all-linear")
    small.compile_small(student, keras.optimizers.Adam(0.04), eager=True, loss=DistillationLoss())
    data = small.data(8, 8)
    taught = teach(teacher, data, student, top_k=small.VOCABULARY, verbose=0)
    before, kept = divergence(teacher, student, data), [ops.convert_to_numpy(v).copy() for v in teacher.weights]
    history = fine_tune(student, taught, epochs=15, verbose=0)
    after = divergence(teacher, student, data)
    assert after < 0.3 * before
    # All that is left of the loss is the entropy of the teacher.
    theirs = shares_of(teacher, data.x)[data.sample_weight != 0]
    entropy = -(theirs * np.log(theirs)).sum(-1).mean()
    results = student.evaluate(taught, verbose=0, return_dict=True)
    assert results["loss"] == pytest.approx(after + entropy, rel=0.02)
    assert len(history.losses) == 15
    for value, variable in zip(kept, teacher.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


def test_interrupted_distillation_goes_on(tmp_path):
    data, model = small.data(), small.model(dropout=0.0)
    taught = teach(small.model(lora=False, seed=2), data, model, top_k=4, verbose=0)
    small.compile_small(model, keras.optimizers.Adam(0.02), eager=True, loss=DistillationLoss(0.5, 2.0))
    model.optimizer.build(model.trainable_variables)
    first = [(v, ops.convert_to_numpy(v).copy()) for v in [*model.variables, *model.optimizer.variables]]

    def run(folder=None, **options):
        # As it was, so that it is compiled once.
        for variable, value in first:
            variable.assign(value)
        return fine_tune(model, taught, epochs=2, folder=folder, verbose=0, **options)

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[At(lambda: os.kill(os.getpid(), signal.SIGINT), 3)])
    assert run(tmp_path, resume=True) == whole
    other = small.model(dropout=0.0)
    small.compile_small(other, keras.optimizers.Adam(0.02), loss=DistillationLoss(0.6, 2.0))
    with pytest.raises(InputError, match="loss"):
        fine_tune(other, taught, epochs=2, folder=tmp_path, resume=True, verbose=0)


def test_progress_is_shown(teacher, student, packed, capsys):
    teach(teacher, packed, student, top_k=2, verbose=0)
    assert capsys.readouterr().out == ""
    teach(teacher, packed, student, top_k=2)
    assert "token" in capsys.readouterr().out


def test_other_vocabularies_are_refused(teacher, student, packed):
    other = small.model(lora=False)
    with pytest.raises(InputError, match="must share the vocabulary; the teacher has 31 words, the student 560"):
        teach(other, packed, student)
    with pytest.raises(InputError, match="must share the vocabulary; the teacher has 560 words, the student 31"):
        teach(teacher, packed, other)
    with pytest.raises(InputError, match="`token_ids` must lie between 0 and 30"):
        teach(other, packed, other, top_k=2)
    from tools.train_tokenizer import train_tokenizer

    spoken = Gemma2CausalLM(student.backbone, tiny.preprocessor())
    spoken.preprocessor.tokenizer.set_proto(train_tokenizer([text[::-1] for text in tiny.TEXTS], tiny.VOCABULARY_SIZE))
    with pytest.raises(InputError, match="their tokenizers are different ones"):
        teach(teacher, packed, spoken)


@pytest.mark.once
@pytest.mark.parametrize("top_k", [0, -1, 561, 2.0, True, "3"])
def test_bad_number_of_words_is_refused(teacher, student, packed, top_k):
    with pytest.raises(InputError, match="`top_k` must be a whole number from 1 to 560"):
        teach(teacher, packed, student, top_k)


@pytest.mark.once
def test_what_is_no_data_or_no_model_is_refused(teacher, student, packed):
    with pytest.raises(InputError, match=r"`data` must be a TokenDataset with labels.* given list"):
        teach(teacher, RECORDS, student)
    taught = teach(teacher, packed, student, top_k=2, verbose=0)
    with pytest.raises(InputError, match="given TaughtDataset with a teacher already"):
        teach(teacher, taught, student)
    with pytest.raises(InputError, match="`prepare` first, then `teach`"):
        prepare(taught, student)
    with pytest.raises(InputError, match="`teacher` must be a Gemma2CausalLM; given Gemma2Backbone"):
        teach(teacher.backbone, packed, student)
    with pytest.raises(InputError, match="`student` must be a Gemma2CausalLM; given str"):
        teach(teacher, packed, "student")


@pytest.mark.once
def test_what_finds_no_room_is_refused(teacher, student, packed, monkeypatch):
    short = sharpened(num_layers=1, context_length=8)
    with pytest.raises(InputError, match="more than the teacher's context of 8"):
        teach(short, packed, student)
    monkeypatch.setattr(teaching, "available_bytes", lambda: 1000)
    with pytest.raises(InputError, match="lower `top_k`"):
        teach(teacher, packed, student)


@pytest.mark.once
def test_labels_at_padding_are_refused():
    data = small.data(4)
    data = TokenDataset(data.x, data.y, np.array([0.0, 0.0, 1.0, 1.0], "float32"), batch_size=2)
    model = small.model()
    with pytest.raises(InputError, match=r"counts the label at \(2, \d\), which is padding"):
        teach(model, data, model, top_k=3, verbose=0)


def test_a_teacher_without_numbers_is_refused():
    model = small.model()
    model.backbone.layer_norm.weight.assign(np.full(24, np.nan))
    with pytest.raises(InputError, match="probabilities are no numbers"):
        teach(model, small.data(2), model, top_k=3, verbose=0)
