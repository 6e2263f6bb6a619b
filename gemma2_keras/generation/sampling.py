"""Loops that choose token after token with a KerasHub sampler."""

from __future__ import annotations

from typing import Any

import keras_hub
from keras import ops

from gemma2_keras.generation.engine import decode_step, prefill

# Samplers that choose a token from one row of probabilities run in our loop; those that search, in their own.
_ONE_TOKEN = keras_hub.samplers.Sampler


def searches(sampler: Any) -> bool:
    """Whether a sampler runs a loop of its own (beam search, contrastive search)."""
    return type(sampler).__call__ is not _ONE_TOKEN.__call__


def sample(model: Any, sampler: Any, prompt_ids: Any, padding_mask: Any, room: int, limit: Any, stop_ids: Any) -> Any:
    """Generate after right-aligned prompts.

    Args:
        model: the task; its `backbone` computes, its variables are what a traced loop carries.
        sampler: a `keras_hub.samplers.Sampler`.
        prompt_ids: (B, T) int32.
        padding_mask: (B, T), true at the prompts' tokens.
        room: tokens that are made room for.
        limit: int scalar, tokens to make at most; at most `room`.
        stop_ids: ids that end a row, or `None`.

    Returns:
        (B, room) int32 tokens. What follows a row's first stop id, or lies past `limit`, means nothing.
    """
    if searches(sampler):
        return _search(model, sampler, prompt_ids, padding_mask, room, stop_ids)
    backbone, length = model.backbone, prompt_ids.shape[1]
    logits, _, cache = prefill(backbone, prompt_ids, padding_mask, length + room)

    def choose(logits):
        token = sampler.get_next_token(sampler.compute_probabilities(logits))
        return ops.cast(token, "int32")

    def stopped(token):
        done = ops.zeros_like(token, dtype="bool")
        for stop in stop_ids or ():
            done = ops.logical_or(done, token == stop)
        return done

    def proceed(count, token, finished, tokens, cache):
        return ops.logical_and(count < limit, ops.logical_not(ops.all(finished)))

    def advance(count, token, finished, tokens, cache):
        logits, _, cache = decode_step(backbone, token, cache, length + count - 1)
        token = choose(logits)
        tokens = ops.slice_update(tokens, (0, count), token[:, None])
        return count + 1, token, ops.logical_or(finished, stopped(token)), tokens, cache

    token = choose(logits)
    rows = ops.shape(prompt_ids)[0]
    tokens = ops.concatenate([token[:, None], ops.zeros((rows, room - 1), "int32")], axis=1)
    state = (ops.convert_to_tensor(1, "int32"), token, stopped(token), tokens, cache)
    return sampler.run_loop(proceed, advance, model=model, loop_vars=state)[3]


def _search(model: Any, sampler: Any, prompt_ids: Any, padding_mask: Any, room: int, stop_ids: Any) -> Any:
    backbone, length = model.backbone, prompt_ids.shape[1]
    _, hidden, cache = prefill(backbone, prompt_ids, padding_mask, length + room)
    real = ops.cast(padding_mask, "bool")
    # A prompt's last state in its empty places: the greatest similarity to earlier states is then that to real ones.
    hidden = ops.where(real[..., None], hidden, hidden[:, -1:])
    rows = ops.shape(prompt_ids)[0]
    hidden = ops.pad(hidden, ((0, 0), (0, room), (0, 0)))
    buffer = ops.concatenate([prompt_ids, ops.zeros((rows, room), "int32")], axis=1)
    # Everything up to the first new token counts as given, the empty places too.
    given = ops.concatenate([ops.ones_like(real), ops.zeros((rows, room), "bool")], axis=1)

    def following(prompt, cache, index):
        token = ops.slice(prompt, (0, index - 1), (prompt.shape[0] or ops.shape(prompt)[0], 1))[:, 0]
        logits, hidden, cache = decode_step(backbone, token, cache, index - 1)
        return logits, hidden[:, -1], cache

    tokens = sampler(
        next=following,
        prompt=buffer,
        cache=cache,
        index=length,
        mask=given,
        stop_token_ids=stop_ids,
        hidden_states=hidden,
        model=model,
    )
    return tokens[:, length:]
