"""Models whose words depend on what they read, and prompts of tokens for them."""

from __future__ import annotations

import numpy as np
from keras import ops

from gemma2_keras import Gemma2CausalLM
from tests.preprocessing import tiny

# Control tokens, and bytes that need not be whole characters: none is to be the likeliest.
SILENT = 473


def sharpened(**kwargs) -> Gemma2CausalLM:
    """A model whose weights are large enough that what it says depends on what it reads."""
    model = tiny.causal_lm(**{"num_layers": 2, **kwargs})
    random = np.random.default_rng(3)
    for variable in model.weights:
        # Branches weigh more than the embedding: otherwise the tied output repeats the token that came in.
        variable.assign(random.normal(4.0 if "norm" in variable.path else 0.0, 0.3, variable.shape))
    heard = (np.arange(tiny.VOCABULARY_SIZE) >= SILENT)[:, None]
    embeddings = model.backbone.token_embedding.embeddings
    embeddings.assign(ops.convert_to_numpy(ops.cast(ops.stop_gradient(embeddings), "float32")) * heard)
    return model


class Says:
    """A logits processor that has the model say these tokens, in every row."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens
        self.calls = 0

    def __call__(self, ids, logits):
        forced = np.full_like(logits, -1e9)
        forced[:, self.tokens[self.calls]] = 0
        self.calls += 1
        return forced


def saying(model: Gemma2CausalLM, text: str, *then: int) -> dict:
    """Options that have the model say a text, and then some tokens."""
    return {"logits_processors": [Says(*model.preprocessor.tokenizer.encode(text), *then)]}


def spelling(model: Gemma2CausalLM, text: str, *then: int) -> dict:
    """The same, with a token for each byte."""
    ids = [model.preprocessor.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    return {"logits_processors": [Says(*ids, *then)]}


def continued(bare: Gemma2CausalLM, prompts: list[list[int]], count: int, **options) -> list[list[int]]:
    """The tokens that a model without a preprocessor makes behind prompts of tokens."""
    token_ids, mask = np.zeros((2, len(prompts), max(map(len, prompts)) + count), "int32")
    for i, prompt in enumerate(prompts):
        token_ids[i, : len(prompt)] = prompt
        mask[i, : len(prompt)] = 1
    options = {"stop_token_ids": None, "max_new_tokens": count, "strip_prompt": True, **options}
    made = bare.generate({"token_ids": token_ids, "padding_mask": mask}, **options)
    return [row[kept].tolist() for row, kept in zip(made["token_ids"], made["padding_mask"], strict=True)]
