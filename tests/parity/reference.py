"""Hugging Face transformers as the reference: models with weights that make every part of the mathematics count."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from transformers.models.gemma2 import modeling_gemma2

transformers.utils.logging.disable_progress_bar()

# Width ≠ heads · head size, scalar ≠ head size, key heads ≠ heads, an odd number of layers, a short window.
BASE = {
    "vocab_size": 97,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 48,
    "intermediate_size": 40,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "max_position_embeddings": 128,
    "final_logit_softcapping": 8.0,
    "attn_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


def make(changes=None, seed=0, matrix_std=0.5, embedding_std=None, norm_mean=0.0, dtype=torch.float32):
    """A `Gemma2ForCausalLM` with normal weights, rounded to `dtype` and kept in it."""
    config = transformers.Gemma2Config(
        **{**BASE, **(changes or {})}, pad_token_id=None, bos_token_id=None, eos_token_id=None
    )
    config._attn_implementation = "eager"
    model = transformers.Gemma2ForCausalLM(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            mean, std = (norm_mean, 0.3) if "norm" in name else (0.0, matrix_std)
            std = embedding_std if embedding_std and "embed" in name else std
            weight.copy_(torch.randn(weight.shape, generator=generator) * std + mean)
    return model.to(dtype)


def ids(rows, length, vocabulary_size=97, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary_size, (rows, length), dtype="int32")


def logits(model, token_ids, padding_mask=None):
    """(B, T, V) float32 logits; positions are counted from each row's first real token."""
    token_ids = torch.tensor(np.asarray(token_ids), dtype=torch.long)
    inputs = {}
    if padding_mask is not None:
        mask = torch.tensor(np.asarray(padding_mask), dtype=torch.long)
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        return model(token_ids, **inputs, use_cache=False).logits.float().numpy()


def largest_score(model, token_ids, monkeypatch):
    """The largest |attention score| before the cap, over all layers."""
    seen = []
    attend = modeling_gemma2.eager_attention_forward

    def attend_and_note(module, query, key, value, attention_mask, **kwargs):
        keys = modeling_gemma2.repeat_kv(key, module.num_key_value_groups)
        seen.append((query @ keys.transpose(2, 3) * module.scaling).abs().max().item())
        return attend(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", attend_and_note)
    logits(model, token_ids)
    assert len(seen) == model.config.num_hidden_layers
    return max(seen)


def greedy(model, prompt, steps):
    """`generate`'s greedy continuation of one prompt, and the smallest gap between the two best logits on the way."""
    made = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        min_new_tokens=steps,
        max_new_tokens=steps,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(made.logits).topk(2).values
    return made.sequences[0, len(prompt) :].tolist(), (best[..., 0] - best[..., 1]).min().item()
