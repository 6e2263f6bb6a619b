"""A recipe carried out, from a file of examples to what loads."""

from __future__ import annotations

import errno
import json
import os
import re
import signal

import keras
import numpy as np
import pytest

from gemma2_keras import Gemma2CausalLM, TrainingHistory, prepare
from gemma2_keras.errors import InputError, PresetError
from gemma2_keras.training import job
from gemma2_keras.training.recipe import Recipe
from tests.preprocessing import tiny

ANIMALS = ("cat", "dog", "girl", "house", "mat", "log")
LENGTH = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small preset, and examples to learn from and to measure on."""
    folder = tmp_path_factory.mktemp("job")
    keras.utils.set_random_seed(5)
    tiny.causal_lm(num_layers=1, sequence_length=LENGTH).save_to_preset(folder / "preset")
    for name, animals in (("train", ANIMALS[:4]), ("validation", ANIMALS[4:])):
        lines = [{"prompt": f"The {animal}", "response": " sat by the sea."} for animal in animals]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def recipe(place, output, **given) -> Recipe:
    given = {"preset": str(place / "preset"), "data": str(place / "train.jsonl"), "batch_size": 2, **given}
    return Recipe(
        **{
            "output": None if output is None else str(output),
            "targets": "all-linear",
            "learning_rate": 0.05,
            "epochs": 10,
            **given,
        }
    )


def perplexity(place, model) -> float:
    """Of the validation, as a user measures it."""
    data = prepare(str(place / "validation.jsonl"), model, LENGTH, 2)
    model.compile()
    return model.evaluate(data, verbose=0, return_dict=True)["perplexity"]


def loaded(line):
    names: dict = {}
    exec(line, names)
    return names["model"]


def test_adapter_is_trained_and_loads(place, tmp_path, capsys):
    run, plot, output = tmp_path / "run", tmp_path / "pictures" / "loss.png", tmp_path / "adapter"
    validation = str(place / "validation.jsonl")
    asked = recipe(place, output, validation=validation, run_folder=str(run), plot=str(plot), rank=4, use_rslora=True)
    line = job.run_recipe(asked, verbose=0)
    said = capsys.readouterr().out
    assert said.startswith("Training: 4 examples\n    ")
    assert line in said
    assert str(output) in said
    before, after = map(float, re.search(r"perplexity ([\d.]+) -> ([\d.]+)", said).groups())
    assert after < 0.8 * before
    model = loaded(line)
    assert model.adapters == ["default"]
    assert next(iter(model.backbone.adapter_specs("default").values())).use_rslora
    np.testing.assert_allclose(perplexity(place, model), after, rtol=1e-3)
    with model.disable_adapter():
        np.testing.assert_allclose(perplexity(place, model), before, rtol=1e-3)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(TrainingHistory.read(run / "history.jsonl").history["val_perplexity"]) == 10
    # A finished run that is resumed has nothing to do, and saves again.
    kept = (output / "adapter_model.safetensors").read_bytes()
    again = recipe(
        place, output, validation=validation, run_folder=str(run), plot=str(plot), rank=4, use_rslora=True, resume=True
    )
    assert job.run_recipe(again, verbose=0) == line
    assert (output / "adapter_model.safetensors").read_bytes() == kept
    assert f"perplexity {before:.4g} -> {after:.4g}" in capsys.readouterr().out


@pytest.mark.once
def test_all_weights_are_trained_and_load(place, tmp_path, capsys):
    given = {
        "train": "all",
        "targets": Recipe.targets,
        "dtype": "mixed_bfloat16",
        "packing": True,
        "sequence_length": 20,
    }
    options = {"weight_decay": 0.1, "global_clipnorm": 1.0, "gradient_accumulation_steps": 2, "remat": True}
    asked = recipe(place, tmp_path / "model", validation_split=0.25, epochs=8, learning_rate=0.01, **given, **options)
    model = loaded(job.run_recipe(asked, verbose=0))
    said = capsys.readouterr().out
    assert "Training: 3 examples" in said
    assert "Validation: 1 example" in said
    before, after = map(float, re.search(r"perplexity ([\d.]+) -> ([\d.]+)", said).groups())
    assert after < before
    assert model.adapters == []
    assert model.backbone.dtype_policy.name == "mixed_bfloat16"
    assert perplexity(place, model) < perplexity(place, Gemma2CausalLM.from_preset(str(place / "preset")))


@pytest.mark.once
def test_without_validation_the_loss_of_training_is_told(place, tmp_path, capsys):
    job.run_recipe(recipe(place, tmp_path / "adapter", epochs=2), verbose=0)
    said = capsys.readouterr().out
    first, last = map(float, re.search(r"Training loss: ([\d.]+) -> ([\d.]+)", said).groups())
    assert last < first
    assert "Validation" not in said


@pytest.mark.once
def test_split_is_of_the_seed_and_leaves_nothing_out(place, tmp_path):
    splits = [job._records(recipe(place, tmp_path, validation_split=0.5, seed=seed)) for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]
    everything = job._records(recipe(place, tmp_path))[0]
    for trained, held_out in splits:
        assert len(trained) == len(held_out) == 2
        assert sorted(map(str, trained + held_out)) == sorted(map(str, everything))


def nothing_is_loaded(*args, **kwargs):
    raise AssertionError("the model was loaded")


@pytest.fixture
def refused(place, tmp_path, monkeypatch):
    """Carries out a recipe that is refused before the model is loaded, and leaves no result."""
    monkeypatch.setattr(Gemma2CausalLM, "from_preset", nothing_is_loaded)

    def refuse(error, message, output=tmp_path / "out", **given):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=message):
            job.run_recipe(recipe(place, output, **given))
        assert sorted(tmp_path.rglob("*")) == before

    return refuse


@pytest.mark.once
def test_what_is_missing_or_broken_is_told_before_the_model_is_loaded(refused, place, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "The cat"}\n{"text": ')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused(InputError, "`data` is missing: name a file of JSON lines", data=None)
    refused(InputError, "`output` is missing: name a folder", output=None)
    refused(FileNotFoundError, r"absent\.jsonl", data="absent.jsonl")
    refused(IsADirectoryError, "preset", data=str(place / "preset"))
    refused(InputError, r"empty\.jsonl is empty", data=str(empty))
    refused(InputError, r"bad\.jsonl, line 2: no JSON", data=str(bad))
    refused(InputError, r"bad\.jsonl, line 2: no JSON", validation=str(bad))
    refused(InputError, "leaves nothing of 4 examples to train on", validation_split=0.95)
    refused(PresetError, "Did you mean gemma2_tiny_en", preset="gemma2_tiny")
    refused(ValueError, "zebra", dtype="zebra")
    refused(InputError, "in bfloat16 its steps are lost", train="all", targets=Recipe.targets, dtype="bfloat16")
    refused(ValueError, "must be among .*given .'q_pro'", targets="q_pro")
    refused(InputError, "Nothing to learn is left of 4 examples", sequence_length=2, truncation="drop")


@pytest.mark.once
def test_results_never_take_the_place_of_something_else(refused, place, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("Dear cat,")
    run, pictures = tmp_path / "run", tmp_path / "pictures.png"
    run.mkdir()
    pictures.mkdir()
    (run / "history.jsonl").write_text("")
    refused(FileExistsError, "other exists and is no saved adapter", output=other)
    refused(FileExistsError, "other exists and is no saved preset", output=other, train="all", targets=Recipe.targets)
    refused(FileExistsError, "preset exists and is no saved adapter", output=place / "preset")
    refused(FileExistsError, "exists", output=other / "letter.txt" / "adapter")
    refused(FileExistsError, "holds a run already", run_folder=str(run))
    refused(FileExistsError, "is no folder", run_folder=str(other / "letter.txt"))
    refused(InputError, "lies in `output`", run_folder=str(tmp_path / "out" / "run"))
    refused(InputError, "lies in `output`", run_folder=str(tmp_path / "out"))
    refused(IsADirectoryError, "`plot` must be a file", plot=str(pictures))


@pytest.mark.once
def test_a_place_that_cannot_be_written_to_is_told_before(refused, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), kwargs["dir"])

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    refused(OSError, "Read-only file system")


@pytest.mark.once
def test_an_interrupted_run_goes_on(place, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    validation = str(place / "validation.jsonl")
    asked = {"validation": validation, "epochs": 2, "dropout": 0.1}
    job.run_recipe(recipe(place, whole, run_folder=str(tmp_path / "run-whole"), **asked), verbose=0)
    run, output = tmp_path / "run", tmp_path / "adapter"
    original = job.fine_tune

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 0:
                signal.raise_signal(signal.SIGINT)

    def interrupted(*args, **kwargs):
        return original(*args, callbacks=[Interrupt()], **kwargs)

    monkeypatch.setattr(job, "fine_tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.run_recipe(recipe(place, output, run_folder=str(run), **asked), verbose=0)
    assert not output.exists()
    assert (run / "checkpoint-00000001").exists()
    monkeypatch.setattr(job, "fine_tune", original)
    job.run_recipe(recipe(place, output, run_folder=str(run), resume=True, **asked), verbose=0)
    assert (run / "history.jsonl").read_text() == (tmp_path / "run-whole" / "history.jsonl").read_text()
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (whole / name).read_bytes()
