"""The Gemma 2 decoder without its output projection."""

from __future__ import annotations

import keras
import keras_hub

from gemma2_keras.config import Gemma2Config
from gemma2_keras.layers.context import SequenceContext
from gemma2_keras.layers.decoder_block import DecoderBlock
from gemma2_keras.layers.embedding import TokenEmbedding
from gemma2_keras.layers.norm import RMSNorm
from gemma2_keras.models.adapters import Adaptable
from gemma2_keras.models.inputs import check_token_inputs
from gemma2_keras.models.known_presets import KnownPresets


def _check_dtype(dtype) -> None:
    """Refuse dtype policies that the model does not compute in."""
    floats = ("float32", "bfloat16", "float16")
    if dtype == "":
        raise ValueError(f"`dtype` is empty; give {', '.join(floats)}, a mixed policy, or None.")
    policy = keras.dtype_policies.get(keras.config.dtype_policy() if dtype is None else dtype)
    if policy.quantization_mode or not {policy.compute_dtype, policy.variable_dtype} <= set(floats):
        raise ValueError(
            f"`dtype` must be {', '.join(floats)}, or a mixed policy such as mixed_bfloat16; given {policy.name}."
        )


@keras.saving.register_keras_serializable(package="gemma2_keras")
class Gemma2Backbone(Adaptable, keras_hub.models.Backbone):
    """Gemma 2 as a Keras functional model: token ids to hidden states.

    Called on `{"token_ids": (B, T) int32, "padding_mask": (B, T)}`, with 1 or true at real tokens and padding anywhere,
    it returns the (B, T, D) hidden states after the last norm, in the compute dtype. A row can hold several examples:
    tokens with 1, 2, 3, … in the mask see those of their own number alone, and the positions of each begin at 0.

    Args:
        vocabulary_size: rows of the embedding table.
        num_layers: decoder blocks.
        num_query_heads: query heads.
        num_key_value_heads: key and value heads, a divisor of `num_query_heads`.
        hidden_dim: width of the residual stream.
        intermediate_dim: width of the gate and of the up projection, each (KerasHub counts both together).
        head_dim: size of one head.
        query_pre_attention_scalar: scores are multiplied by its power of -1/2; `None` is `head_dim`.
        attention_logit_soft_cap: soft cap of the attention scores, or `None`.
        final_logit_soft_cap: soft cap of the output logits, or `None`.
        sliding_window_size: positions seen by layers 0, 2, 4, …, the current one included.
        layer_norm_epsilon: of every norm.
        rope_max_wavelength: base of the rotary wavelengths.
        dropout: rate on each branch, in training.
        context_length: longest sequence the model is made for, in tokens.
        dtype: a Keras dtype policy or its name: `"float32"`, `"bfloat16"`, `"float16"`, `"mixed_bfloat16"`, ….
        **kwargs: `name` and `trainable`, as `keras.Model` takes them.

    Raises:
        ValueError: if a hyperparameter is outside what is allowed.
        InputError: when called on ids outside the vocabulary, or on a wrong dtype or shape.

    Example:

    >>> import numpy as np
    >>> backbone = Gemma2Backbone(
    ...     vocabulary_size=64, num_layers=3, num_query_heads=4, num_key_value_heads=2, hidden_dim=24,
    ...     intermediate_dim=40, head_dim=8, sliding_window_size=4)
    >>> tuple(backbone({"token_ids": np.array([[2, 5, 9]]), "padding_mask": np.array([[1, 1, 1]])}).shape)
    (1, 3, 24)

    Source: Gemma 2 (https://arxiv.org/abs/2408.00118).
    """

    presets = KnownPresets()

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        num_query_heads,
        num_key_value_heads,
        hidden_dim,
        intermediate_dim,
        head_dim,
        query_pre_attention_scalar=None,
        attention_logit_soft_cap=50.0,
        final_logit_soft_cap=30.0,
        sliding_window_size=4096,
        layer_norm_epsilon=1e-6,
        rope_max_wavelength=10_000.0,
        dropout=0.0,
        context_length=8192,
        dtype=None,
        **kwargs,
    ) -> None:
        config = Gemma2Config(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            num_key_value_heads=num_key_value_heads,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            head_dim=head_dim,
            query_pre_attention_scalar=query_pre_attention_scalar,
            attention_logit_soft_cap=attention_logit_soft_cap,
            final_logit_soft_cap=final_logit_soft_cap,
            sliding_window_size=sliding_window_size,
            layer_norm_epsilon=layer_norm_epsilon,
            rope_max_wavelength=rope_max_wavelength,
            dropout=dropout,
            context_length=context_length,
        )
        _check_dtype(dtype)
        token_embedding = TokenEmbedding(
            config.vocabulary_size, config.hidden_dim, config.final_logit_soft_cap, dtype=dtype, name="token_embedding"
        )
        sequence_context = SequenceContext(
            config.head_dim, config.rope_max_wavelength, config.sliding_window_size, dtype=dtype, name="context"
        )
        transformer_layers = [
            DecoderBlock(
                num_query_heads=config.num_query_heads,
                num_key_value_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                intermediate_dim=config.intermediate_dim,
                attention_scale=config.attention_scale,
                attention_logit_soft_cap=config.attention_logit_soft_cap,
                local=config.is_local(index),
                layer_norm_epsilon=config.layer_norm_epsilon,
                dropout=config.dropout,
                dtype=dtype,
                name=f"decoder_block_{index}",
            )
            for index in range(config.num_layers)
        ]
        layer_norm = RMSNorm(config.layer_norm_epsilon, dtype=dtype, name="final_norm")

        token_ids = keras.Input(shape=(None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input(shape=(None,), dtype="int32", name="padding_mask")
        x = token_embedding(token_ids)
        context = sequence_context(padding_mask)
        for layer in transformer_layers:
            x = layer(x, context=context)
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=layer_norm(x),
            dtype=dtype,
            **kwargs,
        )
        self.config = config
        self.token_embedding = token_embedding
        self.sequence_context = sequence_context
        self.transformer_layers = transformer_layers
        self.layer_norm = layer_norm

    def __call__(self, inputs, *args, **kwargs):
        """Check the inputs, then run the model."""
        check_token_inputs(inputs, self.config.vocabulary_size)
        return super().__call__(inputs, *args, **kwargs)

    def get_config(self) -> dict:
        """Constructor arguments, and what adapters there are."""
        config = {**super().get_config(), **self.config.to_dict()}
        return {**config, "adapters": self.adapter_config()} if self.adapters else config

    @classmethod
    def from_config(cls, config):
        """A backbone of this configuration, with new adapters where it had adapters."""
        config = dict(config)
        adapters = config.pop("adapters", None)
        backbone = super().from_config(config)
        if adapters is not None:
            backbone.restore_adapters(adapters)
        return backbone

    @staticmethod
    def get_layout_map(device_mesh, model_parallel_dim_name="model"):
        """How `keras.distribution.ModelParallel` may spread the weights over devices, on JAX.

        The table and the projections out of the model's width are cut by rows, those back into it by columns, so that
        each device has some heads and some of the feed-forward's units; norms are on every device.

        Args:
            device_mesh: a `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: its axis to cut along.

        Returns:
            `keras.distribution.LayoutMap`.

        Raises:
            ValueError: if the mesh has no such axis.

        Example:

        >>> mesh = keras.distribution.DeviceMesh((1, 1), ["batch", "model"], ["cpu:0"])
        >>> layout = Gemma2Backbone.get_layout_map(mesh)
        >>> tuple(layout["decoder_block_0/attention/q_proj/weight"].axes)
        ('model', None)
        """
        if model_parallel_dim_name not in device_mesh.axis_names:
            raise ValueError(
                f"`model_parallel_dim_name` must be an axis of the mesh, one of {', '.join(device_mesh.axis_names)}; "
                f"given {model_parallel_dim_name!r}."
            )
        layout_map = keras.distribution.LayoutMap(device_mesh)
        layout_map["token_embedding/embeddings"] = (model_parallel_dim_name, None)
        layout_map[r"decoder_block_\d+/.*/(q|k|v|gate|up)_proj/weight"] = (model_parallel_dim_name, None)
        layout_map[r"decoder_block_\d+/.*/(o|down)_proj/weight"] = (None, model_parallel_dim_name)
        return layout_map

    @classmethod
    def from_preset(cls, preset, load_weights=True, *, dtype=None, check_finite=True):
        """Load a backbone by preset name, handle or folder.

        Args:
            preset: a name of `gemma2_keras.list_presets()`, a handle `hf://owner/name`, or a folder.
            load_weights: `False` builds the architecture with random weights.
            dtype: a Keras dtype policy; `None` keeps the one of the checkpoint.
            check_finite: whether weights that are NaN or infinite are refused.

        Raises:
            PresetError: if the name leads nowhere.
            CheckpointError: if the files are not a whole Gemma 2 checkpoint.
        """
        from gemma2_keras.checkpoints.presets import load_backbone

        return load_backbone(cls, preset, load_weights=load_weights, dtype=dtype, check_finite=check_finite)

    def save_to_preset(self, preset_dir, max_shard_size=10) -> None:
        """Write the backbone alone, as `Gemma2CausalLM.save_to_preset` writes the whole model.

        Args:
            preset_dir: where. A preset saved there before is replaced; its tokenizer and preprocessor stay.
            max_shard_size: most GB in one file of weights; `None` for a single file.

        Raises:
            FileExistsError: if something else than a saved preset stands there.
        """
        from gemma2_keras.checkpoints.presets import save_preset

        save_preset(preset_dir, backbone=self, max_shard_size=max_shard_size, keep=True)
