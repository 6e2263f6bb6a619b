from __future__ import annotations

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from gemma2_keras import Gemma2CausalLM, Gemma2CausalLMPreprocessor
from tests.preprocessing import tiny
from tests.tasks.sharp import sharpened

BACKEND = keras.backend.backend()
TEXTS = ["The cat sat.", "The dog sat on the log.", "7 + 5 = 12", "The sky is blue."]
PAIRS = {"prompts": ["The cat", "The dog", "7 + 5", "The sky"], "responses": [" sat.", " sat.", " = 12", " is blue."]}


def values(tensor) -> np.ndarray:
    return ops.convert_to_numpy(ops.stop_gradient(tensor))


def logits_of(model, inputs) -> np.ndarray:
    return values(model({key: ops.convert_to_tensor(value) for key, value in inputs.items()}))


def ids_of(model, texts=TEXTS) -> dict[str, np.ndarray]:
    return model.preprocessor(texts)[0]


def most_likely(model, prompt: str, count: int) -> str:
    """The greedy continuation, a whole forward pass for each token."""
    tokenizer = model.preprocessor.tokenizer
    ids = [2, *tokenizer.encode(prompt)]
    for _ in range(count):
        # One length for all, so that each shape is met once.
        row = np.array([ids + [0] * (24 - len(ids))], "int32")
        logits = logits_of(model, {"token_ids": row, "padding_mask": (np.arange(24) < len(ids))[None].astype("int32")})
        ids.append(int(logits[0, len(ids) - 1].argmax()))
        if ids[-1] in (1, 107):
            break
    return tokenizer.decode([i for i in ids if i > 107])


# The class


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16", "float16"])
def test_logits_are_float32_in_every_dtype(dtype):
    model = tiny.causal_lm(num_layers=1, dtype=dtype)
    # Keras derives these from the computation itself.
    assert (model.output.dtype, model.output.shape) == ("float32", (None, None, tiny.VOCABULARY_SIZE))
    assert model.backbone.output.dtype == keras.DTypePolicy(dtype).compute_dtype
    assert model.dtype_policy.name == dtype


def test_a_saved_file_restores_the_model_with_its_preprocessor(sharp, tmp_path):
    sharp.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again) is Gemma2CausalLM
    assert again.preprocessor.tokenizer.proto == tiny.proto()
    assert again.preprocessor.sequence_length == sharp.preprocessor.sequence_length
    np.testing.assert_array_equal(logits_of(again, ids_of(again)), logits_of(sharp, ids_of(sharp)))


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_a_saved_file_keeps_dtype_and_weights(tmp_path, dtype):
    model = tiny.causal_lm(num_layers=1, dtype=dtype)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.dtype_policy.name == dtype
    for a, b in zip(again.weights, model.weights, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(values(a).astype("float32"), values(b).astype("float32"))


def test_weights_alone_are_saved_and_loaded(sharp, tmp_path):
    sharp.save_weights(tmp_path / "model.weights.h5")
    again = tiny.causal_lm(num_layers=2)
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(logits_of(again, ids_of(again)), logits_of(sharp, ids_of(sharp)))


def test_the_config_makes_the_model_again(sharp):
    again = Gemma2CausalLM.from_config(sharp.get_config())
    assert again.backbone.config == sharp.backbone.config
    assert isinstance(again.preprocessor, Gemma2CausalLMPreprocessor)
    assert again.name == sharp.name
    assert [v.shape for v in again.weights] == [v.shape for v in sharp.weights]


def test_a_saved_file_restores_what_the_model_was_compiled_with(tmp_path):
    model = tiny.causal_lm(num_layers=1)
    model.compile(keras.optimizers.SGD(0.25), sampler=keras_hub.samplers.TopKSampler(k=7, temperature=0.5))
    model.train_on_batch(TEXTS[:2])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(again.optimizer, keras.optimizers.SGD)
    assert float(values(again.optimizer.learning_rate)) == 0.25
    assert int(values(again.optimizer.iterations)) == 1
    assert (again.sampler.k, again.sampler.temperature) == (7, 0.5)
    for a, b in zip(again.weights, model.weights, strict=True):
        np.testing.assert_array_equal(values(a), values(b))


@pytest.mark.parametrize("trained", [True, False])
def test_a_saved_file_has_the_adapters(sharp, tmp_path, trained):
    model = tiny.causal_lm(num_layers=2)
    model.enable_lora(2)
    random = np.random.default_rng(4)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0, 0.3, variable.shape))
    if trained:
        model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert len([v for v in again.variables if "lora" in v.path]) == 8
    np.testing.assert_allclose(logits_of(again, ids_of(again)), logits_of(model, ids_of(model)), rtol=1e-4, atol=1e-5)


def test_a_summary_names_the_preprocessor_and_the_parameters(sharp, capsys):
    lines = []
    sharp.summary(print_fn=lines.append)
    text = "\n".join(lines)
    assert "gemma2_tokenizer" in text
    assert f"{sharp.backbone.config.parameter_count:,}" in text


# Training


@pytest.fixture(scope="module")
def still():
    """A model that training does not change, so that all data of one content gives one loss."""
    model = sharpened(num_layers=2)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    return model


def expected_results(model, x, y, weight) -> tuple[float, float, float]:
    """Cross-entropy, the mean over batches of two of the mean over their tokens; accuracy and surprise of all."""
    logits = logits_of(model, x).astype("float64")
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_probabilities, y[..., None], -1)[..., 0]
    right = logits.argmax(-1) == y
    pairs = [slice(i, i + 2) for i in range(0, len(y), 2)]
    loss = np.mean([(losses[pair] * weight[pair]).sum() / weight[pair].sum() for pair in pairs])
    accuracy, surprise = ((each * weight).sum() / weight.sum() for each in (right, losses))
    return float(loss), float(accuracy), float(surprise)


class Texts(keras.utils.PyDataset):
    def __init__(self, batches, **kwargs):
        super().__init__(**kwargs)
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def batches(data):
    if isinstance(data, dict):
        return [{key: value[i : i + 2] for key, value in data.items()} for i in (0, 2)]
    return [data[i : i + 2] for i in (0, 2)]


def tf_dataset(data):
    tensorflow = pytest.importorskip("tensorflow")
    return tensorflow.data.Dataset.from_tensor_slices(data).batch(2)


KINDS = {
    "whole": lambda data: data,
    "PyDataset": lambda data: Texts(batches(data)),
    "generator": lambda data: iter(batches(data)),
    "tf.data": tf_dataset,
}


@pytest.mark.parametrize("data", [TEXTS, PAIRS], ids=["texts", "pairs"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_same_loss(still, kind, data):
    loss, accuracy, surprise = expected_results(still, *still.preprocessor(data))
    # Keras asks how many batches an iterator has.
    steps = 2 if kind == "generator" else None
    history = still.fit(KINDS[kind](data), batch_size=2, shuffle=False, verbose=0, steps_per_epoch=steps).history
    assert history["loss"] == pytest.approx([loss], rel=1e-4)
    assert history["sparse_categorical_accuracy"] == pytest.approx([accuracy], abs=1e-6)
    found = still.evaluate(KINDS[kind](data), batch_size=2, verbose=0, steps=steps, return_dict=True)
    assert np.log(found.pop("perplexity")) == pytest.approx(surprise, rel=1e-4)
    assert found == pytest.approx({"loss": loss, "sparse_categorical_accuracy": accuracy}, rel=1e-4)
    logits = still.predict(KINDS[kind](data), batch_size=2, verbose=0, steps=steps)
    np.testing.assert_allclose(logits, logits_of(still, still.preprocessor(data)[0]), rtol=1e-3, atol=1e-4)


def torch_loader(data):
    loaders = pytest.importorskip("torch.utils.data")
    if isinstance(data, dict):
        data = [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]
    return loaders.DataLoader(data, batch_size=2)


@pytest.mark.parametrize("data", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_a_data_loader_gives_the_same_loss_in_every_epoch(still, data):
    loss, *_ = expected_results(still, *still.preprocessor(data))
    loader = torch_loader(data)
    history = still.fit(loader, validation_data=loader, epochs=2, shuffle=False, verbose=0).history
    assert history["loss"] == pytest.approx([loss, loss], rel=1e-4)
    assert history["val_loss"] == pytest.approx([loss, loss], rel=1e-4)
    assert still.evaluate(loader, verbose=0)[0] == pytest.approx(loss, rel=1e-4)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's own way of doing it")
def test_a_data_loader_may_collate_with_the_preprocessor(still):
    from torch.utils.data import DataLoader

    loss, *_ = expected_results(still, *still.preprocessor(TEXTS))
    loader = DataLoader(TEXTS, batch_size=2, collate_fn=still.preprocessor)
    assert still.fit(loader, shuffle=False, verbose=0).history["loss"] == pytest.approx([loss], rel=1e-4)


def test_tokenized_arrays_are_taken_as_they_are(still):
    x, y, weight = still.preprocessor(TEXTS)
    loss, accuracy, surprise = expected_results(still, x, y, weight)
    found = still.fit(x, y, 2, sample_weight=weight, shuffle=False, verbose=0).history
    assert found["loss"] == pytest.approx([loss], rel=1e-4)
    found = still.evaluate(x, y, 2, sample_weight=weight, verbose=0)
    assert np.log(found.pop()) == pytest.approx(surprise, rel=1e-4)
    assert found == pytest.approx([loss, accuracy], rel=1e-4)
    bare = Gemma2CausalLM(still.backbone, compile=False)
    assert bare.preprocessor is None
    found = bare.preprocess_samples(x, y, weight)
    assert found[0] is x
    assert found[1] is y


def test_validation_takes_the_same_data_and_names_its_metrics(still):
    loss, accuracy, _ = expected_results(still, *still.preprocessor(TEXTS))
    x, y, weight = still.preprocessor(TEXTS)
    for validation in (TEXTS, (x, y, weight), Texts(batches(TEXTS))):
        history = still.fit(TEXTS, batch_size=2, validation_data=validation, shuffle=False, verbose=0).history
        names = {"loss", "perplexity", "sparse_categorical_accuracy"}
        assert {*history} == names | {f"val_{name}" for name in names}
        assert history["val_loss"] == pytest.approx([loss], rel=1e-4)
        assert history["val_sparse_categorical_accuracy"] == pytest.approx([accuracy], abs=1e-6)


def test_a_share_of_the_texts_validates(still):
    history = still.fit(TEXTS, batch_size=2, validation_split=0.5, shuffle=False, verbose=0).history
    halves = [expected_results(still, *still.preprocessor(part))[0] for part in batches(TEXTS)]
    assert [history["loss"][0], history["val_loss"][0]] == pytest.approx(halves, rel=1e-4)


def test_single_batches_of_text_train_evaluate_and_predict(still):
    loss, *_ = expected_results(still, *still.preprocessor(TEXTS[:2]))
    assert still.train_on_batch(TEXTS[:2])[0] == pytest.approx(loss, rel=1e-4)
    assert still.test_on_batch(TEXTS[:2])[0] == pytest.approx(loss, rel=1e-4)
    assert still.predict_on_batch(TEXTS[:2]).shape == (2, 16, tiny.VOCABULARY_SIZE)


def test_training_learns_and_generation_follows():
    model = tiny.causal_lm(num_layers=1)
    model.compile(optimizer=keras.optimizers.Adam(0.03))
    text = "The cat sat."
    before = model.generate("The cat", max_new_tokens=8)
    history = model.fit([text] * 2, epochs=25, batch_size=2, verbose=0).history
    assert history["loss"][-1] < history["loss"][0] / 5
    after = model.generate("The cat", max_new_tokens=8)
    assert after == text != before


# Adapters


def test_adapters_alone_train_again_and_again_and_generation_follows(tmp_path):
    model = sharpened(num_layers=1)
    model.compile(optimizer=keras.optimizers.Adam(0.01))
    model.fit(TEXTS[:2], batch_size=2, verbose=0)
    before = model.evaluate(TEXTS[:2], verbose=0)[0]
    model.generate("The cat", max_new_tokens=3)
    optimizer, steps = model.optimizer, int(values(model.optimizer.iterations))
    assert steps == 1
    model.enable_lora(2)
    assert type(model.optimizer) is type(optimizer)
    assert model.optimizer is not optimizer
    assert float(values(model.optimizer.learning_rate)) == pytest.approx(0.01)
    assert model.evaluate(TEXTS[:2], verbose=0)[0] == pytest.approx(before, rel=1e-5)
    frozen = [values(v) for v in model.non_trainable_variables if "lora" not in v.path]
    for epoch in (1, 2):
        adapters = [values(v).copy() for v in model.trainable_variables]
        assert len(adapters) == 4
        model.fit(TEXTS[:2], batch_size=2, verbose=0)
        assert int(values(model.optimizer.iterations)) == epoch
        # In the first step A has no gradient yet, since B is zero.
        changed = [not np.array_equal(a, values(v)) for a, v in zip(adapters, model.trainable_variables, strict=True)]
        assert sum(changed) == 2 * epoch
    for a, v in zip(frozen, [v for v in model.non_trainable_variables if "lora" not in v.path], strict=True):
        np.testing.assert_array_equal(a, values(v))
    random = np.random.default_rng(5)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0, 1, variable.shape))
    # Neither evaluation nor generation still runs what was compiled without adapters.
    x, y, weight = model.preprocessor(TEXTS[:2])
    loss, *_ = expected_results(model, x, y, weight)
    assert abs(loss - before) > 1e-3
    assert model.evaluate(TEXTS[:2], verbose=0)[0] == pytest.approx(loss, rel=1e-4)
    assert model.generate("The cat", max_new_tokens=3) == most_likely(model, "The cat", 3)


# Generation


def test_a_prompt_gives_a_text_and_a_list_gives_a_list(sharp):
    expected = [most_likely(sharp, text, 3) for text in ("The cat", "Once upon a")]
    assert sharp.generate("The cat", max_new_tokens=3) == expected[0]
    assert sharp.generate(["The cat", "Once upon a"], max_new_tokens=3) == expected
    assert sharp.generate({"prompts": ["The cat", "Once upon a"]}, max_new_tokens=3) == expected
    assert sharp.generate({"prompts": "The cat"}, max_new_tokens=3) == expected[0]
    assert sharp.generate(np.array(["The cat", "Once upon a"]), max_new_tokens=3) == expected
    stripped = sharp.generate(["The cat", "Once upon a"], max_new_tokens=3, strip_prompt=True)
    assert ["The cat" + stripped[0], "Once upon a" + stripped[1]] == expected


def test_a_tf_dataset_gives_a_list_batched_or_not(sharp):
    tensorflow = pytest.importorskip("tensorflow")
    prompts = ["The cat", "Once upon a", "7 +"]
    expected = [sharp.generate(prompt, max_new_tokens=3) for prompt in prompts]
    dataset = tensorflow.data.Dataset.from_tensor_slices(prompts)
    assert sharp.generate(dataset, max_new_tokens=3) == expected
    assert sharp.generate(dataset.batch(2), max_new_tokens=3) == expected


def test_limits_count_tokens(sharp):
    prompt = "The cat"
    start = len(sharp.preprocessor.tokenizer.encode(prompt)) + 1
    expected = continuation_ids(sharp, prompt, 16)
    for limits, count in (({"max_new_tokens": 5}, 5), ({"max_length": start + 4}, 4), ({}, 16 - start)):
        made = sharp.generate(prompt, stop_token_ids=None, strip_prompt=True, **limits)
        assert made == sharp.preprocessor.tokenizer.decode(expected[:count])


def continuation_ids(model, prompt, length) -> list[int]:
    ids = [2, *model.preprocessor.tokenizer.encode(prompt)]
    start = len(ids)
    while len(ids) < length:
        row = np.array([ids + [0] * (24 - len(ids))], "int32")
        logits = logits_of(model, {"token_ids": row, "padding_mask": (np.arange(24) < len(ids))[None].astype("int32")})
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    return ids[start:]


def test_a_stop_id_ends_the_text_and_is_part_of_it(sharp):
    ids = continuation_ids(sharp, "The cat", 12)
    stop = next(token for i, token in enumerate(ids) if i and token not in ids[:i])
    kept = ids[: ids.index(stop) + 1]
    tokenizer = sharp.preprocessor.tokenizer
    for stops in (stop, [stop], (stop, 1), np.array([stop])):
        made = sharp.generate("The cat", max_length=12, stop_token_ids=stops, strip_prompt=True)
        assert made == tokenizer.decode(kept)
    assert len(kept) < len(ids)


def test_arrays_give_arrays(sharp):
    bare = Gemma2CausalLM(sharp.backbone)
    prompts = [[2, *sharp.preprocessor.tokenizer.encode(text)] for text in ("The cat", "Once upon a")]
    token_ids, mask = np.zeros((2, 12), "int32"), np.zeros((2, 12), bool)
    for i, prompt in enumerate(prompts):
        token_ids[i, : len(prompt)] = prompt
        mask[i, : len(prompt)] = True
    inputs = {"token_ids": token_ids, "padding_mask": mask}
    made = bare.generate(inputs, stop_token_ids=None)
    for i, text in enumerate(("The cat", "Once upon a")):
        assert made["token_ids"][i].tolist() == prompts[i] + continuation_ids(sharp, text, 12)
    assert made["padding_mask"].all()
    stripped = bare.generate(inputs, stop_token_ids=None, strip_prompt=True, max_new_tokens=2)
    assert stripped["padding_mask"].sum(axis=1).tolist() == [2, 2]
    assert stripped["token_ids"][0, :2].tolist() == continuation_ids(sharp, "The cat", 12)[:2]
    # The inputs are the caller's own.
    assert token_ids[0, len(prompts[0]) :].sum() == 0
    tensors = {key: ops.convert_to_tensor(value) for key, value in inputs.items()}
    np.testing.assert_array_equal(bare.generate(tensors, stop_token_ids=None)["token_ids"], made["token_ids"])


SAMPLERS = {
    "greedy": "greedy",
    "top_k": "top_k",
    "top_p": "top_p",
    "random": "random",
    "beam": "beam",
    "contrastive": "contrastive",
    "a beam of two": lambda: keras_hub.samplers.BeamSampler(num_beams=2),
    # So cold that the likeliest token has all the probability.
    "a cold one": lambda: keras_hub.samplers.RandomSampler(temperature=1e-4),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_continues_prompts_of_unequal_length(sharp, name):
    model = Gemma2CausalLM(sharp.backbone, sharp.preprocessor)
    sampler = SAMPLERS[name]
    model.compile(sampler=sampler if isinstance(sampler, str) else sampler())
    prompts = ["The cat", "Once upon a"]
    made = model.generate(prompts, max_new_tokens=3)
    for prompt, text in zip(prompts, made, strict=True):
        assert text.startswith(prompt)
    if name in ("greedy", "a cold one"):
        assert made == [most_likely(sharp, prompt, 3) for prompt in prompts]


def test_one_seed_gives_one_text_and_each_call_another(sharp):
    model = Gemma2CausalLM(sharp.backbone, sharp.preprocessor)
    runs = []
    for seed in (1, 1):
        model.compile(sampler=keras_hub.samplers.RandomSampler(seed=seed, temperature=5.0))
        runs.append([model.generate("The cat", max_new_tokens=8) for _ in range(2)])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


@pytest.mark.skipif(BACKEND == "torch", reason="nothing is traced")
def test_prompts_and_limits_of_one_bucket_are_compiled_once(sharp):
    model = Gemma2CausalLM(sharp.backbone, sharp.preprocessor)
    model.generate("The cat", max_new_tokens=2)
    engine, compiled = model._engine, model._engine.compilations
    assert compiled > 0
    for prompt, limit in (("Once upon a time there was a", 2), ("The", 9), ("The cat", 30)):
        model.generate(prompt, max_new_tokens=limit)
    # The values of sampling options are no part of a program, which of them are used is.
    model.generate("The cat", max_new_tokens=2, temperature=0.5, top_k=3)
    sampling = engine.compilations
    for options in ({"temperature": 1.5, "top_k": 7, "seed": 3}, {"temperature": 0.1, "top_k": 1}):
        model.generate("The dog", max_new_tokens=3, **options)
    assert model._engine is engine
    assert compiled < engine.compilations == sampling
    model.generate("The cat", max_new_tokens=2)
    assert engine.compilations == sampling


# Scores


@pytest.fixture(scope="module")
def scored(sharp):
    x, y, _ = sharp.preprocessor(TEXTS[:2])
    return x["token_ids"], x["padding_mask"], y


def test_scores_are_logits_or_losses(sharp, scored):
    token_ids, mask, y = scored
    logits = logits_of(sharp, {"token_ids": token_ids, "padding_mask": mask})
    np.testing.assert_allclose(values(sharp.score(token_ids, mask)), logits, rtol=1e-4, atol=1e-4)
    losses = values(sharp.score(token_ids, mask, scoring_mode="loss", target_ids=y))
    assert losses.shape == y.shape
    shifted = logits.astype("float64") - logits.max(-1, keepdims=True)
    expected = np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, y[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses, expected, rtol=1e-3, atol=1e-4)
    whole = values(sharp.score(token_ids))
    np.testing.assert_allclose(
        whole, logits_of(sharp, {"token_ids": token_ids, "padding_mask": np.ones_like(mask)}), rtol=1e-4, atol=1e-4
    )


def test_scores_of_packed_examples_are_those_apart(sharp, scored):
    token_ids, mask, y = scored
    lengths = mask.sum(1)
    rows = [(token_ids[i, :length], y[i, :length]) for i, length in enumerate(lengths)]
    packed_ids, packed_y = (np.concatenate(parts)[None] for parts in zip(*rows, strict=True))
    packed_mask = np.repeat([1, 2], lengths)[None]
    logits = values(sharp.score(packed_ids, packed_mask))[0]
    losses = values(sharp.score(packed_ids, packed_mask, scoring_mode="loss", target_ids=packed_y))[0]
    real = mask.astype(bool)
    np.testing.assert_allclose(logits, values(sharp.score(token_ids, mask))[real], rtol=1e-4, atol=1e-4)
    apart = values(sharp.score(token_ids, mask, scoring_mode="loss", target_ids=y))
    np.testing.assert_allclose(losses, apart[real], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["logits", "loss"])
@pytest.mark.parametrize("index", [-1, 0, 1])
def test_what_an_intercept_returns_takes_the_place_of_the_layer(sharp, scored, index, mode):
    token_ids, mask, y = scored
    options = {"scoring_mode": mode, "target_ids": y if mode == "loss" else None}
    other = token_ids[::-1].copy()
    kept, seen = {}, []

    def keep(x, i):
        seen.append(i)
        kept[i] = x
        return x

    expected = values(sharp.score(other, mask, layer_intercept_fn=keep, **options))
    assert seen == [-1, 0, 1]
    found = values(
        sharp.score(token_ids, mask, layer_intercept_fn=lambda x, i: kept[i] if i == index else x, **options)
    )
    # The other's state after any layer gives the other's logits.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(values(sharp.score(token_ids, mask, **options)) - expected).max() > 0.1
