"""The one table that ties names in checkpoints of every format to weights of the backbone."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

from gemma2_keras.config import Gemma2Config

# Name in a transformers checkpoint -> owner and attribute in the backbone, shape in hyperparameters, name in a GGUF
# file, and group in a KerasHub file.
_TOP = {
    "model.embed_tokens": ("token_embedding", "embeddings", ("V", "D"), "token_embd", "reversible_embedding"),
    "model.norm": ("layer_norm", "weight", ("D",), "output_norm", "rms_normalization"),
}
# The same for each layer: within `model.layers.{i}`, `transformer_layers[i]`, `blk.{i}` and KerasHub's block.
_LAYER = {
    "input_layernorm": ("input_layernorm", "weight", ("D",), "attn_norm", "pre_attention_norm"),
    "self_attn.q_proj": ("attention.q_proj", "weight", ("NH", "D"), "attn_q", "attention/query_dense"),
    "self_attn.k_proj": ("attention.k_proj", "weight", ("KH", "D"), "attn_k", "attention/key_dense"),
    "self_attn.v_proj": ("attention.v_proj", "weight", ("KH", "D"), "attn_v", "attention/value_dense"),
    "self_attn.o_proj": ("attention.o_proj", "weight", ("D", "NH"), "attn_output", "attention/output_dense"),
    "post_attention_layernorm": (
        "post_attention_layernorm",
        "weight",
        ("D",),
        "post_attention_norm",
        "post_attention_norm",
    ),
    "pre_feedforward_layernorm": ("pre_feedforward_layernorm", "weight", ("D",), "ffn_norm", "pre_ffw_norm"),
    "mlp.gate_proj": ("feed_forward.gate_proj", "weight", ("F", "D"), "ffn_gate", "gating_ffw"),
    "mlp.up_proj": ("feed_forward.up_proj", "weight", ("F", "D"), "ffn_up", "gating_ffw_2"),
    "mlp.down_proj": ("feed_forward.down_proj", "weight", ("D", "F"), "ffn_down", "ffw_linear"),
    "post_feedforward_layernorm": ("post_feedforward_layernorm", "weight", ("D",), "post_ffw_norm", "post_ffw_norm"),
}


class Weight(NamedTuple):
    """Where one tensor of a checkpoint lives.

    Attributes:
        layer: index of the decoder block, or `None` outside the blocks.
        owner: path of the Keras layer, from the backbone or from the block.
        attribute: name of the variable on that layer.
        shape: its shape, of a matrix (out, in).
        gguf: its name in a GGUF file.
        keras_hub: its group in a KerasHub file; there its shape is another.
    """

    layer: int | None
    owner: str
    attribute: str
    shape: tuple[int, ...]
    gguf: str
    keras_hub: str

    def layer_of(self, backbone: Any) -> Any:
        """The Keras layer that owns the weight."""
        root = backbone if self.layer is None else backbone.transformer_layers[self.layer]
        return attrgetter(self.owner)(root)

    def variable_of(self, backbone: Any) -> Any:
        """The weight itself, a Keras variable."""
        return getattr(self.layer_of(backbone), self.attribute)


def weight_map(config: Gemma2Config) -> dict[str, Weight]:
    """Every tensor of a transformers checkpoint of this architecture, by name.

    >>> config = Gemma2Config(64, 1, 4, 2, 24, 40, 8)
    >>> down = weight_map(config)["model.layers.0.mlp.down_proj.weight"]
    >>> down.shape, down.gguf, down.keras_hub
    ((24, 40), 'blk.0.ffn_down.weight', 'layers/gemma_decoder_block/ffw_linear')
    """
    sizes = {
        "V": config.vocabulary_size,
        "D": config.hidden_dim,
        "F": config.intermediate_dim,
        "NH": config.num_query_heads * config.head_dim,
        "KH": config.num_key_value_heads * config.head_dim,
    }
    rows = [(f"{name}.weight", None, "", "", entry) for name, entry in _TOP.items()]
    for i in range(config.num_layers):
        # Keras numbers layers of one class, but for the first.
        block = f"gemma_decoder_block_{i}/" if i else "gemma_decoder_block/"
        rows += [(f"model.layers.{i}.{name}.weight", i, f"blk.{i}.", block, entry) for name, entry in _LAYER.items()]
    return {
        name: Weight(
            layer,
            owner,
            attribute,
            tuple(sizes[letter] for letter in letters),
            f"{prefix}{gguf}.weight",
            f"layers/{block}{group}",
        )
        for name, layer, prefix, block, (owner, attribute, letters, gguf, group) in rows
    }


def projections(config: Gemma2Config) -> dict[str, tuple[int, int]]:
    """The (out, in) shape of every projection, by its module.

    >>> projections(Gemma2Config(64, 1, 4, 2, 24, 40, 8))["model.layers.0.mlp.down_proj"]
    (24, 40)
    """
    return {
        name.removesuffix(".weight"): (weight.shape[0], weight.shape[1])
        for name, weight in weight_map(config).items()
        if weight.layer is not None and len(weight.shape) == 2
    }
