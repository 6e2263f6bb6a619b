"""Adapters in PEFT's format: what is written, and what is refused. `tests/parity/test_lora.py` has PEFT itself."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import load_file, save_file

from gemma2_keras.checkpoints.adapters import describe_config, parse_config
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.errors import CheckpointError
from gemma2_keras.layers.low_rank import LowRank
from tests.preprocessing import tiny

# As a tool for fine-tuning writes it.
LONG_PATTERN = (
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj).*?)"
    r"|(?:model\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:up_proj)))"
)
MODULES = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def model():
    """Has no adapters, and shall have none after a test."""
    return tiny.causal_lm(num_layers=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A DoRA adapter of another model of that architecture; not to be changed."""
    model = tiny.causal_lm(num_layers=2)
    model.enable_lora(2, alpha=3, use_dora=True, dropout=0.1)
    folder = tmp_path_factory.mktemp("adapters") / "saved"
    model.save_adapter(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """The same, to break."""
    copy = tmp_path / "adapter"
    copy.mkdir()
    for path in saved.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.mark.once
def test_an_adapter_that_a_killed_save_has_moved_away_is_found_again(folder):
    folder.rename(folder.with_name(".adapter.0123abcd.old"))
    model = tiny.causal_lm(num_layers=2)
    model.load_adapter(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(model, folder, message):
    count, trainable = len(model.variables), len(model.trainable_variables)
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(folder)
    assert (len(model.variables), len(model.trainable_variables)) == (count, trainable)
    assert model.adapters == []


@pytest.mark.once
def test_modules_are_named_as_in_checkpoints(model):
    config, layers = model.backbone.config, model.backbone.linear_layers()
    projections = {name for name, weight in weight_map(config).items() if name.endswith("_proj.weight")}
    assert {f"{module}.weight" for module in layers} == projections
    for module, layer in layers.items():
        assert layer is weight_map(config)[f"{module}.weight"].layer_of(model.backbone)


def test_what_is_saved_loads_again(model, saved):
    tensors = load_file(saved / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 3
    assert {str(value.dtype) for value in tensors.values()} == {"float32"}
    assert tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"].shape == (32,)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["use_dora"], config["use_rslora"]) == (2, 3, True, False)
    model.load_adapter(saved, "one", trainable=True)
    assert model.active_adapter == "one"
    assert len(model.trainable_variables) == 12
    for module, layer in model.backbone.linear_layers().items():
        assert ("one" in layer.adapters) == module.endswith(("q_proj", "v_proj"))
        if layer.adapter is not None:
            assert layer.adapter.spec == LowRank(2, 3, 0.1, use_dora=True)
            found = tensors[f"base_model.model.{module}.lora_A.weight"]
            np.testing.assert_array_equal(ops.convert_to_numpy(layer.lora_a), found)
    model.load_adapter(saved, "two")
    assert not model.trainable_variables
    with pytest.raises(ValueError, match="trainable=True"):
        model.fit(["The cat sat."], verbose=0)
    with pytest.raises(ValueError, match="already has an adapter 'two'"):
        model.load_adapter(saved, "two")
    model.unload_adapter()


@pytest.mark.once
def test_tensors_of_low_precision_are_read(model, folder):
    def narrow(tensors):
        for i, (name, value) in enumerate(tensors.items()):
            tensors[name] = value.astype((ml_dtypes.bfloat16, "float16")[i % 2])

    change_tensors(folder, narrow)
    model.load_adapter(folder)
    layer = next(iter(model.backbone.linear_layers().values()))
    assert layer.lora_a.dtype == layer.lora_b.dtype == "float32"
    assert ops.convert_to_numpy(layer.lora_a).any()
    model.unload_adapter()


@pytest.mark.once
def test_an_adapter_of_many_kinds_of_module_says_which():
    specs = {module: LowRank(2, 4.0) for module in MODULES}
    assert describe_config(specs, MODULES)["target_modules"] == ["q_proj", "up_proj", "v_proj"]
    del specs[MODULES[0]]
    specs[MODULES[1]] = LowRank(3, 4.5)
    config = describe_config(specs, MODULES)
    assert config["target_modules"] == sorted(specs)
    assert (config["r"], config["rank_pattern"]) == (2, {MODULES[1]: 3})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (4, {MODULES[1]: 4.5})
    assert parse_config(config, MODULES) == specs


@pytest.mark.once
def test_saving_replaces_an_adapter_and_nothing_else(model, saved, folder, tmp_path, monkeypatch):
    model.load_adapter(saved)
    (folder / "notes.txt").write_text("mine")
    (folder / "adapter_model.bin").write_bytes(b"old")
    model.save_adapter(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
    ]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*arguments, **options):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("gemma2_keras.checkpoints.adapters.write_tensors", fail)
        with pytest.raises(OSError, match="no space left"):
            model.save_adapter(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no saved adapter"):
        model.save_adapter(tmp_path / "other")
    with pytest.raises(ValueError, match="no adapter 'absent'"):
        model.save_adapter(tmp_path / "new", "absent")
    model.unload_adapter()
    with pytest.raises(ValueError, match="no adapter None; the model has none"):
        model.save_adapter(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.once
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file(file, model, folder):
    (folder / file).unlink()
    refused(model, folder, file)
    refused(model, folder / "absent", "no folder")


@pytest.mark.once
def test_a_pickle_is_not_opened(model, folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(model, folder, "is a pickle")


@pytest.mark.once
@pytest.mark.parametrize("length", [0, 7, 200, -1])
def test_truncated_tensors(length, model, folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    refused(model, folder, "truncated or broken")


@pytest.mark.once
@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 1, "r": 2}', '{"r": NaN}'])
def test_a_broken_configuration(text, model, folder):
    (folder / "adapter_config.json").write_text(text)
    refused(model, folder, "adapter_config.json")


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "missing.*q_proj.lora_B"),
        (lambda t: t.pop(f"{Q}.lora_magnitude_vector"), "missing.*lora_magnitude_vector"),
        (lambda t: t.update({f"{Q}.lora_C.weight": t[f"{Q}.lora_A.weight"]}), "not accounted for.*lora_C"),
        (lambda t: t.update({"base_model.model.lm_head.weight": np.ones(3)}), "not accounted for.*lm_head"),
        (lambda t: t.update({f"{Q}.lora_A.weight": np.ones((3, 24), "float32")}), r"shape \(3, 24\).*ask \(2, 24\)"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": np.ones((32, 1), "float32")}), r"ask \(32,\)"),
        (lambda t: t.update({f"{Q}.lora_B.weight": np.ones((32, 2), "int8")}), "dtype I8"),
        (lambda t: t.update({f"{Q}.lora_B.weight": np.ones((32, 2), "float64")}), "dtype F64"),
    ],
)
def test_tensors_that_do_not_fit(change, message, model, folder):
    change_tensors(folder, change)
    refused(model, folder, message)


@pytest.mark.once
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", ...),
        ("task_type", "SEQ_CLS"),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["x"]),
        ("layer_replication", [[0, 1]]),
        ("lora_bias", True),
        ("use_qalora", True),
        ("alora_invocation_tokens", [5]),
        ("kasa_config", {}),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", 1),
        ("something_new", None),
        ("r", 0),
        ("r", "8"),
        ("r", 2.0),
        ("r", ...),
        ("lora_alpha", -1),
        ("lora_alpha", None),
        ("lora_alpha", ...),
        ("lora_dropout", 1.5),
        ("use_dora", "yes"),
        ("use_rslora", 1),
        ("target_modules", ...),
        ("target_modules", None),
        ("target_modules", [1]),
        ("target_modules", []),
        ("target_modules", ["query"]),
        ("target_modules", ["q_proj", "embed_tokens"]),
        ("target_modules", "lm_head"),
        ("target_modules", "(unclosed"),
        ("target_modules", "(" * 1500 + ")" * 1500),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 1}),
        ("alpha_pattern", {"q_proj": None}),
        ("layers_to_transform", ["0"]),
        ("layers_to_transform", [7]),
        ("layers_pattern", ["blocks"]),
        ("layers_pattern", 5),
        ("lora_alpha", 10**400),
        ("alpha_pattern", {"q_proj": 10**400}),
        ("target_modules", "|".join(f"(?:a{i}|b)" for i in range(20_000))),
        ("exclude_modules", ["q_proj", "v_proj"]),
        ("exclude_modules", 3),
    ],
)
def test_configurations_that_are_not_read(key, value, model, folder):
    if key == "layers_pattern":
        change_config(folder, layers_to_transform=[0])
    change_config(folder, **{key: value})
    names = {
        "r": r"`rank`|`r`",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "layers_to_transform": "layers_to_transform|target_modules",
        "exclude_modules": "exclude_modules|target_modules",
        "rank_pattern": "rank",
    }
    refused(model, folder, names.get(key, key))


@pytest.mark.once
@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "z" * 10**6},
        {"modules_to_save": ["z" * 10**6]},
        {"target_modules": [f"name{i}" for i in range(10**5)]},
        {f"key{i}": 1 for i in range(10**5)},
    ],
)
def test_messages_are_short_whatever_the_file_holds(changes, model, folder):
    change_config(folder, **changes)
    with pytest.raises(CheckpointError) as error:
        model.load_adapter(folder)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(number, model, folder):
    def change(tensors):
        next(iter(tensors.values()))[0, 0] = number

    change_tensors(folder, change)
    refused(model, folder, "holds numbers that are not finite")


@pytest.mark.once
@pytest.mark.parametrize("text", ["(.*)*b", ".*?" * 30 + "b", r"(.|\S)" * 25 + "b", r"(\w|.)+\d+b"])
def test_expressions_that_would_take_for_ever(text, monkeypatch):
    monkeypatch.setattr("gemma2_keras.checkpoints.adapters._SECONDS", 0.5)
    with pytest.raises(CheckpointError, match=r"`alpha_pattern`.*in 0.5 seconds \(TimeoutExpired\)"):
        parse_config({**CONFIG, "alpha_pattern": {text: 1}}, MODULES)


@pytest.mark.once
def test_the_first_pattern_that_matches_counts():
    patterns = {"layers.0.*_proj": 5, "q_proj": 6, "proj": 7, "model.layers.1.self_attn.v_proj": 8}
    specs = parse_config({**CONFIG, "rank_pattern": patterns}, MODULES)
    assert [spec.rank for spec in specs.values()] == [5, 5, 6, 8]


@pytest.mark.once
def test_keys_that_change_nothing_are_passed_over():
    harmless = {
        "base_model_name_or_path": "google/gemma-2-2b",
        "revision": "main",
        "inference_mode": False,
        "peft_version": "9.9",
        "auto_mapping": {"parent_library": "x"},
        "megatron_core": "megatron.core",
        "loftq_config": {},
        "eva_config": None,
        "modules_to_save": [],
        "task_type": "CAUSAL_LM",
    }
    targets = [module for module in MODULES if module.endswith(("q_proj", "v_proj"))]
    assert parse_config({**CONFIG, **harmless}, MODULES) == dict.fromkeys(targets, LowRank(2, 4))


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_modules": "all-linear"}, MODULES),
        ({"target_modules": ["layers.1.self_attn.q_proj"]}, [MODULES[3]]),
        (
            {"target_modules": LONG_PATTERN},
            [MODULES[2], MODULES[5]],
        ),
        ({"layers_to_transform": 1}, MODULES[3:5]),
        ({"layers_to_transform": []}, [*MODULES[:2], *MODULES[3:5]]),
        ({"exclude_modules": r".*\.0\..*"}, MODULES[3:5]),
    ],
)
def test_targets_by_the_rules_of_peft(changes, expected):
    assert list(parse_config({**CONFIG, **changes}, MODULES)) == expected


@pytest.mark.once
def test_a_folder_that_is_no_path(model):
    for folder in (None, 3, b"x"):
        with pytest.raises(TypeError, match="must be a path"):
            model.load_adapter(folder)
