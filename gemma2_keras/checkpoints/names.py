"""The one table that ties names in checkpoints to weights of the backbone."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

from gemma2_keras.config import Gemma2Config

# Name in a transformers checkpoint -> (attribute of the backbone, shape in hyperparameters of the configuration).
_TOP = {
    "model.embed_tokens.weight": ("token_embedding", "embeddings", ("V", "D")),
    "model.norm.weight": ("layer_norm", "weight", ("D",)),
}
# The same for each layer: within `model.layers.{i}.` and within `transformer_layers[i]`.
_LAYER = {
    "input_layernorm.weight": ("input_layernorm", "weight", ("D",)),
    "self_attn.q_proj.weight": ("attention.q_proj", "weight", ("NH", "D")),
    "self_attn.k_proj.weight": ("attention.k_proj", "weight", ("KH", "D")),
    "self_attn.v_proj.weight": ("attention.v_proj", "weight", ("KH", "D")),
    "self_attn.o_proj.weight": ("attention.o_proj", "weight", ("D", "NH")),
    "post_attention_layernorm.weight": ("post_attention_layernorm", "weight", ("D",)),
    "pre_feedforward_layernorm.weight": ("pre_feedforward_layernorm", "weight", ("D",)),
    "mlp.gate_proj.weight": ("feed_forward.gate_proj", "weight", ("F", "D")),
    "mlp.up_proj.weight": ("feed_forward.up_proj", "weight", ("F", "D")),
    "mlp.down_proj.weight": ("feed_forward.down_proj", "weight", ("D", "F")),
    "post_feedforward_layernorm.weight": ("post_feedforward_layernorm", "weight", ("D",)),
}


class Weight(NamedTuple):
    """Where one tensor of a checkpoint lives in a backbone.

    Attributes:
        layer: index of the decoder block, or `None` outside the blocks.
        owner: path of the Keras layer, from the backbone or from the block.
        attribute: name of the variable on that layer.
        shape: its shape.
    """

    layer: int | None
    owner: str
    attribute: str
    shape: tuple[int, ...]

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
    >>> weight_map(config)["model.layers.0.mlp.down_proj.weight"].shape
    (24, 40)
    """
    sizes = {
        "V": config.vocabulary_size,
        "D": config.hidden_dim,
        "F": config.intermediate_dim,
        "NH": config.num_query_heads * config.head_dim,
        "KH": config.num_key_value_heads * config.head_dim,
    }
    table = [(name, None, entry) for name, entry in _TOP.items()]
    for i in range(config.num_layers):
        table += [(f"model.layers.{i}.{name}", i, entry) for name, entry in _LAYER.items()]
    return {
        name: Weight(layer, owner, attribute, tuple(sizes[letter] for letter in letters))
        for name, layer, (owner, attribute, letters) in table
    }
