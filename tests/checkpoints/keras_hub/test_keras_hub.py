from __future__ import annotations

import copy
import functools
import json
import shutil
import tracemalloc

import h5py
import keras
import keras_hub
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import ops

from gemma2_keras import Gemma2Backbone
from gemma2_keras.checkpoints.contents import LiveCheckpoint
from gemma2_keras.checkpoints.keras_hub.settings import (
    find_vocabulary,
    is_keras_hub,
    parse_config,
    read_preprocessor,
)
from gemma2_keras.checkpoints.keras_hub.weights import KerasHubCheckpoint
from gemma2_keras.checkpoints.keras_hub.writing import write_keras_hub
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import CheckpointError
from gemma2_keras.layers.initialization import awaiting_weights
from tests.preprocessing import tiny

# Odd on purpose: width ≠ heads · head size, fewer key heads than heads, an odd number of layers, a short window.
THEIRS = {
    "vocabulary_size": 560,
    "num_layers": 3,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 24,
    "intermediate_dim": 80,
    "head_dim": 8,
    "sliding_window_size": 6,
    "attention_logit_soft_cap": 20.0,
    "final_logit_soft_cap": 10.0,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
}
# What they say of it, in our words; KerasHub has no context length.
OURS = Gemma2Config(
    vocabulary_size=560,
    num_layers=3,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=24,
    intermediate_dim=40,
    head_dim=8,
    sliding_window_size=6,
    attention_logit_soft_cap=20.0,
    final_logit_soft_cap=10.0,
)
QUERY = "layers/gemma_decoder_block_1/attention/query_dense/vars/0"
NORM = "layers/rms_normalization/vars/0"
LAST = "layers/gemma_decoder_block_2/post_ffw_norm/vars/0"
# GiB and GB that divide a model into several files, and are enough for its embedding.
SHARD = {"float32": 60e-6, "bfloat16": 30e-6}

# KerasHub leaves the file of the vocabulary open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def numbers(variable) -> bytes:
    return np.ascontiguousarray(ops.convert_to_numpy(variable)).tobytes()


@pytest.fixture(autouse=True)
def _from_zeros(monkeypatch):
    """KerasHub's models start from zeros: JAX compiles a random initializer for each shape."""
    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", lambda _, shape, dtype: ops.zeros(shape, dtype))


@functools.cache
def their_backbone(dtype: str):
    model = keras_hub.models.GemmaBackbone(**THEIRS, dtype=dtype)
    random = np.random.default_rng(0)
    model.set_weights([random.normal(0, 0.5, weight.shape).astype("float32") for weight in model.weights])
    return model


def filled(checkpoint) -> Gemma2Backbone:
    """Our model with the tensors of a checkpoint."""
    with awaiting_weights():
        backbone = Gemma2Backbone(**checkpoint.config.to_dict(), dtype=checkpoint.dtype)
    for name, weight in weight_map(checkpoint.config).items():
        weight.variable_of(backbone).assign(checkpoint.read(name))
    return backbone


# KerasHub's own folders, both ways


@pytest.mark.parametrize(
    ("dtype", "shard"),
    [
        ("bfloat16", SHARD),
        pytest.param("bfloat16", None, marks=pytest.mark.once),
        pytest.param("float32", SHARD, marks=pytest.mark.once),
        pytest.param("float32", None, marks=pytest.mark.once),
    ],
    ids=["bfloat16 sharded", "bfloat16", "float32 sharded", "float32"],
)
def test_from_kerashub_to_us_to_kerashub_no_bit_changes(tmp_path, dtype, shard):
    folders = [tmp_path / name for name in ("theirs", "ours", "theirs again")]
    model, shard = their_backbone(dtype), shard and shard[dtype]
    model.save_to_preset(folders[0], max_shard_size=shard)
    checkpoint = KerasHubCheckpoint(folders[0])
    assert (checkpoint.config, checkpoint.dtype) == (OURS, dtype)
    ours = filled(checkpoint)
    folders[1].mkdir()
    write_keras_hub(folders[1], LiveCheckpoint(ours), max_shard_size=shard)
    again = keras_hub.models.Backbone.from_preset(str(folders[1]), dtype=dtype)
    assert type(again) is keras_hub.models.GemmaBackbone
    for a, b in zip(again.weights, model.weights, strict=True):
        assert keras.backend.standardize_dtype(a.dtype) == dtype
        assert numbers(a) == numbers(b), a.path
    again.save_to_preset(folders[2], max_shard_size=shard)
    last = KerasHubCheckpoint(folders[2])
    for name, weight in weight_map(OURS).items():
        assert last.read(name).shape == weight.shape
        assert last.read(name).tobytes() == numbers(weight.variable_of(ours)), name
    for folder in folders:
        assert (len(list(folder.glob("*.h5"))) > 1) == (shard is not None)
        assert (folder / "model.weights.json").exists() == (shard is not None)


@pytest.mark.once
def test_our_folder_says_what_theirs_says(tmp_path):
    tokenizer = keras_hub.models.GemmaTokenizer(tiny.proto())
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=16, add_end_token=False)
    keras_hub.models.GemmaCausalLM(their_backbone("bfloat16"), preprocessor).save_to_preset(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    write_keras_hub(
        tmp_path / "ours",
        KerasHubCheckpoint(tmp_path / "theirs"),
        tiny.proto(),
        sequence_length=16,
        add_end_token=False,
    )
    files = [sorted(p.relative_to(f) for p in f.rglob("*")) for f in (tmp_path / "theirs", tmp_path / "ours")]
    assert files[0] == files[1]

    def settings_of(side, file):
        text = (tmp_path / side / file).read_text()
        # Names of layers are counted up in one session.
        return json.loads(
            text, object_hook=lambda value: {k: v for k, v in value.items() if k not in ("name", "date_saved")}
        )

    for file in ("config.json", "task.json", "tokenizer.json", "preprocessor.json", "metadata.json"):
        assert settings_of("ours", file) == settings_of("theirs", file), file
    assert find_vocabulary(tmp_path / "theirs").read_bytes() == tiny.proto()
    expected = {"sequence_length": 16, "add_start_token": True, "add_end_token": False}
    for side in ("theirs", "ours"):
        assert read_preprocessor(tmp_path / side) == expected


@pytest.mark.once
@pytest.mark.parametrize("shard", [None, SHARD], ids=["single", "sharded"])
def test_kerashub_loads_the_whole_task(tmp_path, shard):
    ours = tiny.backbone(num_layers=2, query_pre_attention_scalar=8, context_length=8192)
    write_keras_hub(
        tmp_path, LiveCheckpoint(ours), tiny.proto(), sequence_length=16, max_shard_size=shard and shard["float32"]
    )
    model = keras_hub.models.CausalLM.from_preset(str(tmp_path))
    assert type(model) is keras_hub.models.GemmaCausalLM
    assert type(model.preprocessor) is keras_hub.models.GemmaCausalLMPreprocessor
    text = "The cat sat on the log."
    theirs = model.preprocessor([text])[0]
    expected = tiny.preprocessor()([text])[0]
    for key in ("token_ids", "padding_mask"):
        np.testing.assert_array_equal(ops.convert_to_numpy(theirs[key]), ops.convert_to_numpy(expected[key]))
    assert type(keras_hub.models.Tokenizer.from_preset(str(tmp_path))) is keras_hub.models.GemmaTokenizer


@pytest.mark.once
def test_without_a_tokenizer_kerashub_loads_the_task_as_well(tmp_path):
    write_keras_hub(
        tmp_path, LiveCheckpoint(tiny.backbone(num_layers=1, query_pre_attention_scalar=8, context_length=8192))
    )
    assert keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path)).preprocessor is None
    assert find_vocabulary(tmp_path) is None
    assert read_preprocessor(tmp_path) == {}


# A folder to break, as we write it: the tests above show that KerasHub's is the same.


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folders = {}
    for shard in (None, SHARD["float32"]):
        folders[shard] = tmp_path_factory.mktemp("written")
        live = LiveCheckpoint(Gemma2Backbone(**OURS.to_dict()))
        write_keras_hub(folders[shard], live, tiny.proto(), max_shard_size=shard)
    return folders


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written[None], tmp_path / "preset")


@pytest.fixture
def sharded(written, tmp_path):
    return shutil.copytree(written[SHARD["float32"]], tmp_path / "preset")


@pytest.fixture
def change(folder):
    """Changes settings in a file of the folder; `...` removes one."""

    def apply(file: str = "config.json", top: bool = False, **changes):
        content = json.loads((folder / file).read_text())
        inner = content if top else content["config"]
        inner |= changes
        for key in [key for key, value in inner.items() if value is ...]:
            del inner[key]
        (folder / file).write_text(json.dumps(content))

    return apply


def assert_refused(folder, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        KerasHubCheckpoint(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.once
def test_a_tensor_is_written_while_few_others_are_in_memory(tmp_path):
    config = Gemma2Config(1000, 12, 4, 2, 128, 2048, 64)
    largest = 2048 * 128 * 4

    class Made:
        dtype = "float32"

        def __init__(self):
            self.config = config

        def read(self, name):
            return np.ones(weight_map(config)[name].shape, "float32")

    tracemalloc.start()
    try:
        write_keras_hub(tmp_path, Made())
        assert tracemalloc.get_traced_memory()[1] < 4 * largest
    finally:
        tracemalloc.stop()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 36 * largest


# Older folders


def keras_nlp(class_name: str, module: str, config: dict) -> dict:
    return {
        "module": f"keras_nlp.src.models.gemma.{module}",
        "class_name": class_name,
        "config": config,
        "registered_name": f"keras_nlp>{class_name}",
    }


@pytest.mark.once
@pytest.mark.parametrize(
    "dtype",
    [
        ...,
        None,
        "bfloat16",
        {"module": "keras", "class_name": "FloatDTypePolicy", "config": {"name": "bfloat16"}, "registered_name": None},
        {
            "module": "keras.dtype_policies",
            "class_name": "DTypePolicy",
            "config": {"name": "mixed_bfloat16"},
            "registered_name": None,
        },
    ],
    ids=str,
)
def test_folders_of_kerasnlp(folder, dtype):
    settings = json.loads((folder / "config.json").read_text())["config"]
    del settings["dtype"]
    settings |= {} if dtype is ... else {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(keras_nlp("GemmaBackbone", "gemma_backbone", settings)))
    layer = {"name": "gemma_tokenizer", "trainable": True, "dtype": "int32"}
    tokenizer = keras_nlp("GemmaTokenizer", "gemma_tokenizer", {**layer, "proto": None, "sequence_length": None})
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "assets": ["assets/tokenizer/vocabulary.spm"]}))
    for file in ("preprocessor.json", "task.json"):
        (folder / file).unlink()
    assert KerasHubCheckpoint(folder).config == OURS
    assert find_vocabulary(folder).read_bytes() == tiny.proto()
    assert read_preprocessor(folder) == {}


# Configurations


@pytest.mark.once
def test_the_scale_is_that_of_the_head_size_or_of_the_width(folder, change):
    assert parse_config(json.loads((folder / "config.json").read_text())).query_pre_attention_scalar == 8
    change(query_head_dim_normalize=False)
    assert parse_config(json.loads((folder / "config.json").read_text())).query_pre_attention_scalar == 6
    change(num_query_heads=5, num_key_value_heads=1)
    assert_refused(folder, "`hidden_dim` 24 is no multiple of `num_query_heads` 5")


@pytest.mark.once
def test_caps_may_be_absent(folder, change):
    change(attention_logit_soft_cap=None, final_logit_soft_cap=None, dropout=0.25, layer_norm_epsilon=1e-5)
    config = KerasHubCheckpoint(folder).config
    assert (config.attention_logit_soft_cap, config.final_logit_soft_cap) == (None, None)
    assert (config.dropout, config.layer_norm_epsilon) == (0.25, 1e-5)


@pytest.mark.once
@pytest.mark.parametrize("key", ["use_post_ffw_norm", "use_post_attention_norm", "use_sliding_window_attention"])
@pytest.mark.parametrize("value", [False, None, 1, "true", ...])
def test_gemma_1_is_named(folder, change, key, value):
    change(**{key: value})
    assert_refused(folder, f"`{key}` is .*: this is Gemma 1, or no Gemma; only Gemma 2, where it is true, is read")


@pytest.mark.once
@pytest.mark.parametrize("key", sorted({*THEIRS, "layer_norm_epsilon", "dropout", "query_head_dim_normalize"}))
def test_a_missing_setting(folder, change, key):
    change(**{key: ...})
    assert_refused(folder, f"`{key}`")


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_wavelength": 1e6}, "config.json has 'rope_wavelength', unknown here: it could change what the model"),
        ({"a" * 10_000: 1}, "has 'a{80}', unknown here"),
        ({"query_head_dim_normalize": None}, "must be true or false; it is None"),
        ({"query_head_dim_normalize": 1}, "must be true or false; it is 1"),
        ({"intermediate_dim": 81}, "`intermediate_dim` must be even in config.json, gate and up together; it is 81"),
        ({"intermediate_dim": 80.0}, "`intermediate_dim` must be even"),
        ({"intermediate_dim": 0}, "describes no Gemma 2 model: `intermediate_dim` must be"),
        ({"intermediate_dim": -2}, "describes no Gemma 2 model: `intermediate_dim` must be"),
        (
            {"vocabulary_size": "x" * 10_000},
            "`vocabulary_size` must be a number of at most .* in config.json; it is 'xxx",
        ),
        ({"num_layers": [3]}, r"`num_layers` must be a number of at most .* it is an array of 1"),
        ({"num_layers": 3.0}, "`num_layers` must be a whole number"),
        ({"num_layers": True}, "`num_layers` must be a whole number"),
        ({"num_layers": 0}, "`num_layers` must be a whole number of at least 1"),
        ({"num_layers": None}, "`num_layers` must be a whole number"),
        ({"num_layers": 10**9}, "`num_layers` must be at most 10000; given 1000000000"),
        ({"num_layers": 10**12}, "`num_layers` must be a number of at most 2147483647"),
        ({"num_key_value_heads": 3}, "`num_query_heads` must be a multiple"),
        ({"head_dim": 7}, "`head_dim` must be even"),
        ({"head_dim": 10**4000}, "`head_dim` must be a number of at most 2147483647"),
        ({"hidden_dim": -(10**300)}, "`hidden_dim` must be a number of at most"),
        ({"hidden_dim": 10**9}, "has shape .*; the configuration asks"),
        ({"vocabulary_size": 10**9}, r"has shape \(560, 24\); the configuration asks \(1000000000, 24\)"),
        ({"sliding_window_size": 0}, "`sliding_window_size` must be"),
        ({"attention_logit_soft_cap": 0}, "`attention_logit_soft_cap` must be a number above 0, or None"),
        ({"final_logit_soft_cap": -30.0}, "`final_logit_soft_cap` must be a number above 0, or None"),
        ({"layer_norm_epsilon": 0}, "`layer_norm_epsilon` must be"),
        ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1"),
        ({"dtype": "int8"}, "`dtype` in config.json is 'int8'; allowed: float32, .*Quantized models"),
        ({"dtype": "float64"}, "`dtype` in config.json is 'float64'"),
        ({"dtype": {"class_name": "QuantizedDTypePolicy", "config": {"name": "int8_from_float32"}}}, "`dtype` in"),
        ({"dtype": {"class_name": "DTypePolicyMap", "config": {"policy_map": {}}}}, "`dtype` in config.json is"),
        ({"dtype": {"class_name": "DTypePolicy", "config": {"name": ["float32"]}}}, "`dtype` in config.json is"),
        ({"dtype": {"class_name": ["DTypePolicy"], "config": {}}}, "`dtype` in config.json is"),
        ({"dtype": ["float32"]}, "`dtype` in config.json is"),
        ({"dtype": {"a" * 100: {"b" * 100: ["c" * 100] * 9}}}, "`dtype` in config.json is"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_setting_that_is_not_implemented(folder, change, changes, message):
    change(**changes)
    assert_refused(folder, message)


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_name": "Gemma3Backbone"}, "config.json names the class 'Gemma3Backbone', registered as"),
        ({"class_name": "GemmaBackboneX"}, "names the class"),
        ({"class_name": ["GemmaBackbone"]}, "names the class"),
        ({"class_name": ...}, "names the class None"),
        ({"registered_name": "my_package>GemmaBackbone"}, "registered as 'my_package>GemmaBackbone'"),
        ({"registered_name": "keras_hub>PaliGemmaBackbone"}, "registered as"),
        ({"registered_name": ...}, "registered as None"),
        ({"registered_name": {}}, "registered as {}"),
        ({"module": "os"}, "of 'os'; only KerasHub's GemmaBackbone is read here"),
        ({"module": "keras_hub; import os"}, "of 'keras_hub; import os'"),
        ({"module": "keras_hub_evil"}, "of 'keras_hub_evil'"),
        ({"module": "keras_hub." + "a" * 10_000}, "names the class"),
        ({"module": ...}, "of None"),
        ({"config": ...}, "`config` in config.json must be an object; it is None"),
        ({"config": [1]}, "`config` in config.json must be an object"),
        ({"fn": "x"}, "config.json has 'fn', unknown here"),
    ],
    ids=str,
)
def test_a_class_of_another_name_is_neither_read_nor_looked_up(folder, change, changes, message, monkeypatch):
    def look_up(*args, **kwargs):
        raise AssertionError("A name out of a file was looked up.")

    for name in ("deserialize_keras_object", "get_registered_object"):
        monkeypatch.setattr(keras.saving, name, look_up)
    monkeypatch.setattr("importlib.import_module", look_up)
    change(top=True, **changes)
    assert_refused(folder, message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.once
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_configuration_is_read_or_refused(written, data):
    config = json.loads((written[None] / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from([config, config.get("config"), config.get("config", {})]))
        if isinstance(place, dict) and place:
            key = data.draw(st.sampled_from(sorted(place)) | st.text(max_size=8))
            place[key] = data.draw(JSON)
    try:
        parsed = parse_config(copy.deepcopy(config))
    except CheckpointError:
        return
    assert isinstance(parsed, Gemma2Config)


@pytest.mark.once
def test_whose_configuration_it_is(folder):
    assert is_keras_hub(json.loads((folder / "config.json").read_text()))
    assert not is_keras_hub({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]})


# Tokenizers and preprocessors


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": True, "class_name": "PaliGemmaTokenizer"}, "tokenizer.json names the class 'PaliGemmaTokenizer'"),
        ({"add_bos": True}, "`add_bos` of the tokenizer in tokenizer.json is True, which is not implemented"),
        ({"add_eos": 0}, "`add_eos` of the tokenizer in tokenizer.json is 0"),
        ({"sequence_length": 5}, "`sequence_length` of the tokenizer in tokenizer.json is 5"),
        ({"proto": "/etc/passwd"}, "`proto` of the tokenizer in tokenizer.json is '/etc/passwd'"),
        ({"standardize": True}, "tokenizer.json has 'standardize', unknown here"),
    ],
    ids=str,
)
def test_a_tokenizer_that_is_not_implemented(folder, change, changes, message):
    change("tokenizer.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        find_vocabulary(folder)


@pytest.mark.once
def test_a_vocabulary_that_is_missing_or_alone(folder):
    (folder / "tokenizer.json").rename(folder / "kept.json")
    assert find_vocabulary(folder) == folder / "assets" / "tokenizer" / "vocabulary.spm"
    (folder / "kept.json").rename(folder / "tokenizer.json")
    shutil.rmtree(folder / "assets")
    with pytest.raises(CheckpointError, match=r"has a tokenizer\.json and no assets/tokenizer/vocabulary\.spm"):
        find_vocabulary(folder)


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": True, "class_name": "GemmaPreprocessor"}, "names the class 'GemmaPreprocessor'"),
        (
            {"sequence_length": "x"},
            "`sequence_length` in preprocessor.json must be a whole number of at least 2; it is",
        ),
        ({"sequence_length": 1}, "`sequence_length` in preprocessor.json must be"),
        ({"sequence_length": True}, "`sequence_length` in preprocessor.json must be"),
        ({"add_start_token": 1}, "`add_start_token` in preprocessor.json must be true or false; it is 1"),
        ({"tokenizer": {"class_name": "os.system"}}, "preprocessor.json names the class 'os.system'"),
        ({"tokenizer": "x"}, "preprocessor.json holds 'x' where a GemmaTokenizer belongs"),
        ({"image_size": 5}, "preprocessor.json has 'image_size', unknown here"),
    ],
    ids=str,
)
def test_a_preprocessor_that_is_not_implemented(folder, change, changes, message):
    change("preprocessor.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        read_preprocessor(folder)


# Files of weights


@pytest.fixture
def rewrite(folder):
    """Changes arrays of the file; `...` removes one."""

    def apply(**changes):
        with h5py.File(folder / "model.weights.h5", "r+") as file:
            for name, value in changes.items():
                if name in file:
                    del file[name]
                if value is not ...:
                    file[name] = value

    return apply


@pytest.mark.once
@pytest.mark.parametrize("name", [NORM, QUERY])
def test_a_missing_tensor(folder, rewrite, name):
    rewrite(**{name: ...})
    assert_refused(folder, f"lacks 1 tensors: '{name}'")


@pytest.mark.once
@pytest.mark.parametrize(
    "name",
    [
        "layers/gemma_decoder_block_3/ffw_linear/vars/0",
        "layers/gemma_decoder_block/ffw_linear/vars/1",
        "layers/dense/vars/0",
        "x",
    ],
)
def test_an_extra_tensor(folder, rewrite, name):
    rewrite(**{name: np.ones(3, "float32")})
    assert_refused(folder, f"has 1 tensors that no Gemma 2 has: '{name}'")


@pytest.mark.once
@pytest.mark.parametrize("shape", [(4, 8, 24), (2, 24, 16), (32, 24), (24, 32), (768,), (4, 24, 8, 1), ()])
def test_a_misshapen_tensor(folder, rewrite, shape):
    rewrite(**{QUERY: np.ones(shape, "float32")})
    assert_refused(
        folder, rf"{QUERY}' has shape \({shape[0] if shape else ''}.*\); the configuration asks \(4, 24, 8\)"
    )


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["float64", "int8", ">f4"])
def test_a_dtype_that_is_not_taken(folder, rewrite, dtype):
    rewrite(**{NORM: np.ones(24, dtype)})
    assert_refused(folder, rf"holds .*\('{NORM}'\), which is not implemented")


@pytest.mark.once
def test_tensors_of_several_dtypes_make_a_float32_model(folder, rewrite):
    rewrite(**{NORM: np.ones(24, "float16")})
    checkpoint = KerasHubCheckpoint(folder)
    assert checkpoint.dtype == "float32"
    assert checkpoint.read("model.norm.weight").dtype == "float16"


@pytest.mark.once
def test_no_weights_at_all(folder):
    (folder / "model.weights.h5").unlink()
    assert_refused(folder, r"has neither model\.weights\.h5 nor model\.weights\.json")


@pytest.fixture
def index(sharded):
    """Changes the index."""

    def apply(edit):
        path = sharded / "model.weights.json"
        content = json.loads(path.read_text())
        edit(content["weight_map"])
        path.write_text(json.dumps(content))

    return apply


@pytest.mark.once
def test_a_missing_or_truncated_shard(sharded):
    path = sharded / "model_00001.weights.h5"
    path.write_bytes(path.read_bytes()[:-10])
    assert_refused(sharded, r"model_00001\.weights\.h5 is truncated or broken")
    path.unlink()
    assert_refused(sharded, r"lacks the file model_00001\.weights\.h5")


@pytest.mark.once
@pytest.mark.parametrize(
    "name",
    [
        "../model_00000.weights.h5",
        "/etc/passwd",
        "sub/x",
        "..",
        "",
        "x" * 10_000,
        "\ud800",
        "model_0\n",
        None,
        5,
        ["a"],
        {},
    ],
    ids=lambda name: ascii(name)[:30],
)
def test_an_index_that_names_no_shard(sharded, index, name):
    index(lambda names: names.update({f"/{NORM.removesuffix('/0')}": name}))
    assert_refused(sharded, r"model\.weights\.json names .* as a file of weights; only model_\*\.weights\.h5 are read")


@pytest.mark.once
@pytest.mark.parametrize(
    "edit",
    [
        lambda names: names.update({f"/{LAST.removesuffix('/0')}": "model_00000.weights.h5"}),
        lambda names: names.pop(f"/{NORM.removesuffix('/0')}"),
        lambda names: names.update({"/x/vars": "model_00000.weights.h5"}),
        lambda names: names.update({"x" * 10_000: "model_00000.weights.h5"}),
    ],
    ids=["another shard", "left out", "too much", "a long name"],
)
def test_an_index_that_is_wrong(sharded, index, edit):
    index(edit)
    assert_refused(sharded, "does not hold what the index says: '.*' in one of them only")


@pytest.mark.once
@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": "x"}'])
def test_an_index_without_names(sharded, content):
    (sharded / "model.weights.json").write_text(content)
    assert_refused(sharded, "has no `weight_map`")


@pytest.mark.once
def test_a_tensor_in_two_shards(sharded):
    with h5py.File(sharded / "model_00000.weights.h5", "r+") as file:
        file[LAST] = np.ones(24, "float32")
    assert_refused(sharded, f"does not hold what the index says: '{LAST}' in one of them only")


# What KerasHub has no place for


def written_config(tmp_path, **changes) -> None:
    write_keras_hub(tmp_path, LiveCheckpoint(tiny.backbone(**{"num_layers": 1, "context_length": 8192, **changes})))


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query_pre_attention_scalar": 10},
            r"head size, 8, or by width / heads, 6; .*`query_pre_attention_scalar` is 10",
        ),
        (
            {"query_pre_attention_scalar": 8, "rope_max_wavelength": 5000},
            "no other `rope_max_wavelength` than 10000; .* 5000",
        ),
    ],
    ids=str,
)
def test_what_kerashub_cannot_say_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        written_config(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_pre_attention_scalar": 6}, r"KerasHub scales attention by the head size, 8, whatever .*_scalar` is 6"),
        (
            {"query_pre_attention_scalar": 8, "layer_norm_epsilon": 1e-5},
            "uses `layer_norm_epsilon` 1e-05 in the last norm",
        ),
        (
            {"query_pre_attention_scalar": 8, "context_length": 96},
            "keeps no `context_length`: .* beyond this model's 96",
        ),
    ],
    ids=str,
)
def test_what_kerashub_makes_of_it_is_warned_of(tmp_path, changes, message):
    with pytest.warns(UserWarning, match=message) as caught:
        written_config(tmp_path, **changes)
    assert [warning.filename for warning in caught if warning.category is UserWarning] == [__file__]
    config = KerasHubCheckpoint(tmp_path).config
    for key, value in changes.items():
        assert getattr(config, key) == (8192 if key == "context_length" else value)


@pytest.mark.once
@pytest.mark.parametrize("size", [0, -1.0])
def test_a_shard_size_that_is_none_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match="`max_shard_size` must be above 0 GB"):
        write_keras_hub(tmp_path, LiveCheckpoint(tiny.backbone(num_layers=1)), max_shard_size=size)


@pytest.mark.once
def test_adapters_are_merged_on_writing(tmp_path):
    ours = tiny.backbone(num_layers=1, query_pre_attention_scalar=8, context_length=8192)
    ours.enable_lora(2, target_layer_names=["q_proj", "down_proj"])
    random = np.random.default_rng(1)
    for variable in ours.trainable_variables:
        variable.assign(random.normal(0, 0.3, variable.shape))
    write_keras_hub(tmp_path, LiveCheckpoint(ours))
    checkpoint = KerasHubCheckpoint(tmp_path)
    merged = ours.transformer_layers[0].attention.q_proj.merged_weight()
    np.testing.assert_array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.weight"), merged)
    assert not np.array_equal(merged, ops.convert_to_numpy(ours.transformer_layers[0].attention.q_proj.weight))


@pytest.mark.once
def test_bfloat16_is_written_with_kerashubs_note(tmp_path):
    backbone = Gemma2Backbone(**OURS.to_dict(), dtype="bfloat16")
    write_keras_hub(tmp_path, LiveCheckpoint(backbone))
    with h5py.File(tmp_path / "model.weights.h5") as file:
        assert (file[NORM].dtype, file[NORM].attrs["dtype"]) == (np.dtype("V2"), "bfloat16")
    assert KerasHubCheckpoint(tmp_path).read("model.norm.weight").dtype == ml_dtypes.bfloat16
