"""Settings from flags and files: what is taken, and what is refused with its name."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2_keras import Gemma2CausalLM, adamw, fine_tune, prepare
from gemma2_keras.errors import InputError
from gemma2_keras.training import recipe as recipes
from gemma2_keras.training.recipe import Recipe, read_settings, settings, to_yaml

pytestmark = pytest.mark.once


@pytest.fixture
def written(tmp_path):
    def write(content: str | bytes):
        path = tmp_path / "finetune.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_defaults_are_those_of_python():
    calls = {
        prepare: ("sequence_length", "batch_size", "packing", "truncation", "seed"),
        fine_tune: ("epochs", "resume", "every_minutes"),
        adamw: ("epochs", "learning_rate", "warmup"),
        Gemma2CausalLM.enable_lora: ("alpha", "dropout", "use_rslora", "use_dora"),
        Gemma2CausalLM.from_preset: ("dtype",),
        Gemma2CausalLM.compile: ("remat",),
    }
    for function, names in calls.items():
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in names} == {name: getattr(Recipe, name) for name in names}


def test_every_setting_says_what_it_is():
    for name, setting in settings().items():
        assert setting.help, name
        assert setting.optional or recipes.checked(name, getattr(Recipe, name), setting) == getattr(Recipe, name)


TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)


def values(setting):
    kinds = {
        bool: st.booleans(),
        str: st.sampled_from(setting.choices) if setting.choices else TEXTS,
        list: st.one_of(TEXTS, st.lists(TEXTS, min_size=1).map(tuple)),
        int: st.integers(1, 2**32 - 1),
        float: st.floats(0, 1, exclude_min=True, exclude_max=True),
    }
    return kinds[setting.kind]


@given(st.data())
def test_what_is_written_is_read(tmp_path_factory, data):
    chosen = data.draw(st.sets(st.sampled_from(list(settings()))))
    given = {name: data.draw(values(settings()[name]), name) for name in chosen}
    # What does not go together is another test's.
    recipe = Recipe()
    for name, value in given.items():
        object.__setattr__(recipe, name, value)
    path = tmp_path_factory.mktemp("yaml") / "finetune.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8", newline="")
    assert read_settings(path) == dataclasses.asdict(recipe)


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", "\u2029"])
def test_rare_line_breaks_are_kept_in_lists_and_texts(tmp_path, text):
    recipe = Recipe()
    object.__setattr__(recipe, "targets", (text,))
    object.__setattr__(recipe, "preset", text)
    (tmp_path / "finetune.yaml").write_text(to_yaml(recipe), encoding="utf-8", newline="")
    assert read_settings(tmp_path / "finetune.yaml") == dataclasses.asdict(recipe)


def test_what_is_left_out_stays_open(written):
    assert read_settings(written("")) == {}
    assert read_settings(written("# nothing\n")) == {}
    assert read_settings(written("\ufeffrank: 4\ntargets: [q_proj, v_proj]\n")) == {
        "rank": 4,
        "targets": ("q_proj", "v_proj"),
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("1.5E3", 1500.0), (".5e-3", 5e-4), ("'2e-5'", 2e-5), ("1", 1)],
)
def test_numbers_are_read_as_people_write_them(written, text, value):
    assert read_settings(written(f"learning_rate: {text}"))["learning_rate"] == value


BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = {
    "unknown": ("epochs: 2\nlerning_rate: 1\n", r"line 2: there is no setting 'lerning_rate'. Did you mean learning_"),
    "unlike": ("zzz: 2\n", "line 1: there is no setting 'zzz'. No name is like it"),
    "twice": ("rank: 2\nseed: 1\nrank: 3\n", "line 3: `rank` stands twice"),
    "text for a number": ("rank: eight\n", "line 1: `rank` must be a whole number, at least 1; given 'eight'"),
    "a fraction": ("rank: 2.5\n", "`rank` must be a whole number"),
    "true for a number": ("rank: true\n", "`rank` must be a whole number"),
    "a number for true": ("packing: 1\n", "`packing` must be true or false; given 1"),
    "a number for a name": ("output: 1\n", "`output` must be a string, or null; given 1"),
    "an empty name": ("output: ''\n", "`output` must be a string, or null; given ''"),
    "a NUL": ('output: "a\\0b"\n', "`output` must be a string"),
    "no null": ("batch_size: null\n", "`batch_size` must be a whole number, at least 1; given None"),
    "nothing": ("batch_size:\n", "`batch_size` must be a whole number"),
    "below": ("epochs: 0\n", "`epochs` must be a whole number, at least 1; given 0"),
    "no rate": ("learning_rate: 0\n", "`learning_rate` must be a number, above 0; given 0"),
    "no number": ("learning_rate: .nan\n", "`learning_rate` must be a number, above 0"),
    "infinite": ("learning_rate: .inf\n", "`learning_rate` must be a number, above 0"),
    "infinite as text": ("learning_rate: 1e999\n", "`learning_rate` must be a number, above 0"),
    "too much": ("dropout: 1.0\n", "`dropout` must be a number, at least 0 and below 1"),
    "another choice": ("truncation: middle\n", "`truncation` must be one of end, start, drop, error; given 'middle'"),
    "a date": ("output: 2026-01-01\n", "`output` must be a string"),
    "no date": ("output: 2026-99-99\n", "no YAML that can be read"),
    "many digits": (f"rank: {'9' * 5000}\n", "no YAML that can be read"),
    "no targets": ("targets: []\n", "`targets` must be a string or a list of strings"),
    "numbers as targets": ("targets: [1]\n", "`targets` must be a string or a list of strings"),
    "a list for a number": ("rank: [8]\n", r"`rank` must be a whole number, at least 1; given \[8\]"),
    "a list": ("- rank\n", "line 1: settings such as `rank: 8` must stand there"),
    "a word": ("rank\n", "line 1: settings such as `rank: 8` must stand there"),
    "nested": ("seed: 1\nlora:\n  rank: 8\n", "line 3: settings are not nested"),
    "an odd key": ("? [rank]\n: 8\n", r"line 1: there is no setting \["),
    "a key of another kind": ("!!null rank: 8\nranks: 8\n", "line 2: there is no setting 'ranks'"),
    "two documents": ("rank: 8\n---\nrank: 8\n", "no YAML that can be read"),
    "a tab": ("rank:\t8\n\tseed: 1\n", "no YAML that can be read"),
    "unfinished": ("targets: [q_proj\n", "no YAML that can be read"),
    "an object": ("output: !!python/object:os.system []\n", "no YAML that can be read"),
    "not UTF-8": (b"output: caf\xe9\n", "no YAML that can be read"),
    "a control character": ("output: a\x01b\n", "no YAML that can be read"),
    "a bomb": (BOMB, "line 1: anchors and aliases are not taken"),
    "a merge": ("<<: {rank: 8}\n", "settings are not nested"),
    "deep": ("targets: " + "[" * 20000 + "\n", "settings are not nested"),
    "deep as blocks": ("targets:\n" + "- " * 20000 + "\n", "settings are not nested"),
    "long": ("# " + "x" * recipes.LARGEST_FILE, "longer than 64 KiB"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_name(written, case):
    content, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        read_settings(written(content))
    assert "finetune.yaml" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        read_settings(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"validation": "a.jsonl", "validation_split": 0.1}, "`validation` and `validation_split`"),
        ({"train": "all", "use_dora": True}, "`use_dora` is of adapters"),
        ({"train": "all", "rank": 16}, "`rank` is of adapters"),
        ({"remat": True, "dropout": 0.1}, "`remat` and `dropout`"),
        ({"resume": True}, "`resume` needs the `run_folder`"),
        ({"plot": "loss.txt"}, r"`plot` must end in \.png"),
        ({"learning_rate": math.nan}, "`learning_rate` must be a number, above 0"),
        ({"seed": 2**32}, "`seed` must be a whole number, at least 0 and below 4294967296"),
    ],
)
def test_what_does_not_go_together_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Recipe(**given)
