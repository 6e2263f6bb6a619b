from __future__ import annotations

import pytest
import torch
import transformers

SIZES = {
    "vocab_size": 560,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "head_dim": 8,
    "query_pre_attn_scalar": 10,
    "sliding_window": 6,
    "max_position_embeddings": 96,
    "attn_logit_softcapping": 20.0,
    "final_logit_softcapping": 10.0,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
}


@pytest.fixture(scope="session")
def their_model() -> transformers.Gemma2ForCausalLM:
    """A random model of transformers', norms included, whose logits are far from zero."""
    generator = torch.Generator().manual_seed(0)
    model = transformers.Gemma2ForCausalLM._from_config(
        transformers.Gemma2Config(**SIZES), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def their_folder(their_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    their_model.save_pretrained(folder)
    return folder
