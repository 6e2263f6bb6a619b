"""Several decoding steps in one dispatch, on any backend."""

from __future__ import annotations

from typing import Any

from keras import ops

from gemma2_keras.generation.engine import Cache, decode_step
from gemma2_keras.generation.sampling import adjusted, choose

# What is carried from token to token beside the cache, each with the batch as its first axis:
#   "tokens"         (B,) int32, chosen and not yet run
#   "left"           (B,) int32, tokens that each row may still get
#   "finished"       (B,) bool
#   "prompt_counts"  (B, V) int32, how often each token stands in the prompt ┐ only where the choice
#   "made_counts"    (B, V) int32, how often it was made                     ┘ depends on them
State = dict[str, Any]


def counts(state: State) -> tuple[Any, Any]:
    """The counts of a state, `None` where it has none."""
    return state.get("prompt_counts"), state.get("made_counts")


def pick(
    logits: Any, state: State, noise: Any, values: dict[str, Any], stop_ids: Any, *, uses: tuple[str, ...]
) -> State:
    """Choose a token of each row from (B, V) logits; (B,) `noise` decides where chance does."""
    return note(choose(adjusted(logits, values, *counts(state), uses), values, noise, uses), state, stop_ids)


def note(tokens: Any, state: State, stop_ids: Any) -> State:
    """The state once (B,) tokens were chosen; one of `stop_ids` ends its row."""
    going = ops.logical_not(state["finished"])
    left = state["left"] - ops.cast(going, "int32")
    stopped = ops.any(tokens[:, None] == stop_ids[None], axis=1)
    state = {
        **state,
        "tokens": ops.where(going, tokens, state["tokens"]),
        "left": left,
        "finished": ops.logical_or(state["finished"], ops.logical_or(stopped, left <= 0)),
    }
    if "made_counts" in state:
        vocabulary = ops.arange(ops.shape(state["made_counts"])[1], dtype="int32")
        made = ops.logical_and(tokens[:, None] == vocabulary[None], going[:, None])
        state["made_counts"] = state["made_counts"] + ops.cast(made, "int32")
    return state


def step(backbone: Any, state: State, cache: Cache) -> tuple[Any, Cache]:
    """Run the chosen token of each row: (B, V) logits, and the cache, in which a finished row stays where it is."""
    logits, _, after = decode_step(backbone, state["tokens"], cache)
    # What was written behind the end of a finished row is not seen.
    lengths = ops.where(state["finished"], cache["lengths"], after["lengths"])
    return logits, {**after, "lengths": lengths}


def burst(
    backbone: Any,
    cache: Cache,
    state: State,
    steps: Any,
    noise: Any,
    values: dict[str, Any],
    stop_ids: Any,
    *,
    uses: tuple[str, ...],
) -> tuple[Any, Any, State, Cache]:
    """Run and choose some tokens of each row, fewer once all rows are finished.

    Args:
        backbone: a `Gemma2Backbone`.
        cache: of B rows, with room for them.
        state: of this module.
        steps: int32 scalar, how many tokens, at most T; a program serves any number.
        noise: (B, T) float32 in [0, 1).
        values: of `Sampling.values`.
        stop_ids: (n,) int32 tokens that end a row.
        uses: of `Sampling.uses`.

    Returns:
        (B, T) int32 tokens, how many steps were run, the state and the cache.
    """
    made = ops.zeros_like(ops.cast(noise, "int32"))

    def proceed(done, made, state, cache):
        return ops.logical_and(done < steps, ops.logical_not(ops.all(state["finished"])))

    def advance(done, made, state, cache):
        logits, cache = step(backbone, state, cache)
        state = pick(logits, state, ops.take(noise, done, axis=1), values, stop_ids, uses=uses)
        here = ops.arange(ops.shape(noise)[1], dtype="int32")[None] == done
        return done + 1, ops.where(here, state["tokens"][:, None], made), state, cache

    start = (ops.convert_to_tensor(0, "int32"), made, state, cache)
    done, made, state, cache = ops.while_loop(proceed, advance, start)
    return made, done, state, cache
