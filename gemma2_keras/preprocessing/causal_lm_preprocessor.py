"""Text to what a causal language model trains on and generates from."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import keras
import keras_hub
import numpy as np

from gemma2_keras.errors import InputError
from gemma2_keras.models.gemma2_backbone import Gemma2Backbone
from gemma2_keras.preprocessing.inputs import is_graph_tensor, to_python
from gemma2_keras.preprocessing.tokenizer import Gemma2Tokenizer


@keras.saving.register_keras_serializable(package="gemma2_keras")
class Gemma2CausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Tokenize, pad and label text, with NumPy and sentencepiece alone.

    Called, it makes `(x, y, sample_weight)` for training; `generate_preprocess` and `generate_postprocess` serve
    `generate`. It works on strings, lists and arrays of them, on `{"prompts": …, "responses": …}` (the loss then counts
    the responses alone), and inside `tf.data.Dataset.map`. Data that is tokenized already, a dictionary with
    `"token_ids"`, passes through.

    Args:
        tokenizer: a `Gemma2Tokenizer`.
        sequence_length: length, in tokens, that examples are padded or cut to.
        add_start_token: whether each text begins with `<bos>`.
        add_end_token: whether each training text ends with `<eos>`.
        **kwargs: as `keras.layers.Layer` takes them.

    Raises:
        InputError: when called on no text at all, an empty text, or something that is no text.

    Example:

    >>> preprocessor = Gemma2CausalLMPreprocessor.from_preset("gemma2_tiny_en", sequence_length=8)
    >>> x, y, sample_weight = preprocessor(["The cat sleeps."])
    >>> x["token_ids"].shape, int(x["token_ids"][0, 0])
    ((1, 8), 2)
    """

    backbone_cls = Gemma2Backbone
    tokenizer_cls = Gemma2Tokenizer

    def __init__(self, tokenizer, sequence_length=1024, add_start_token=True, add_end_token=True, **kwargs) -> None:
        if not isinstance(sequence_length, int) or isinstance(sequence_length, bool) or sequence_length < 2:
            raise ValueError(f"`sequence_length` must be a whole number of at least 2; given {sequence_length!r}.")
        super().__init__(
            tokenizer=tokenizer,
            sequence_length=sequence_length,
            add_start_token=add_start_token,
            add_end_token=add_end_token,
            **kwargs,
        )

    def build(self, input_shape) -> None:
        """Nothing to make."""
        self.built = True

    def call(self, x: Any, y: Any = None, sample_weight: Any = None, sequence_length: int | None = None):
        """Text to `(x, y, sample_weight)` for training.

        Args:
            x: text, or `{"prompts": …, "responses": …}`, or data tokenized already.
            y: labels, only beside tokenized data: text makes its own.
            sample_weight: weights, likewise.
            sequence_length: overrides the constructor's.

        Returns:
            x: `{"token_ids": (B, L) int32, "padding_mask": (B, L) bool}`.
            y: (B, L) int32, the same tokens one position on.
            sample_weight: (B, L) float32, 1 where `y` counts and 0 where it is padding or part of a prompt.
            A single text gives arrays without the axis B.
        """
        if is_tokenized(x):
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        if y is not None or sample_weight is not None:
            raise InputError("`y` and `sample_weight` are made from the text: give `x` alone, or tokenized data.")
        length = self._length(sequence_length)
        leaves = keras.tree.flatten(x)
        if any(is_graph_tensor(leaf) for leaf in leaves):
            return self._call_in_graph(x, length)
        return self._call_eagerly(x, length)

    def _call_eagerly(self, x: Any, length: int):
        rows, counted_from, single = self._training_rows(x)
        # One token more than asked: inputs drop the last, labels the first.
        token_ids, mask, cut = self._packed(rows, length + 1, self.add_end_token)
        if cut:
            warnings.warn(
                f"{cut} of {len(rows)} texts were cut to `sequence_length={length}` tokens; raise it to keep all.",
                stacklevel=4,
            )
        weight = mask & (np.arange(length + 1) >= np.asarray(counted_from)[:, None])
        inputs = {"token_ids": token_ids[:, :-1], "padding_mask": mask[:, :-1]}
        example = (inputs, token_ids[:, 1:], weight[:, 1:].astype("float32"))
        return keras.tree.map_structure(lambda a: a[0], example) if single else example

    def _call_in_graph(self, x: Any, length: int):
        tensorflow = sys.modules["tensorflow"]
        leaves = keras.tree.flatten(x)

        def run(*values):
            texts = keras.tree.pack_sequence_as(x, [to_python(value) for value in values])
            inputs, y, weight = self._call_eagerly(texts, length)
            return inputs["token_ids"], inputs["padding_mask"], y, weight

        dtypes = (tensorflow.int32, tensorflow.bool, tensorflow.int32, tensorflow.float32)
        outputs = tensorflow.numpy_function(run, leaves, dtypes)
        for output in outputs:
            output.set_shape((*leaves[0].shape, length))
        token_ids, padding_mask, y, weight = outputs
        return {"token_ids": token_ids, "padding_mask": padding_mask}, y, weight

    def generate_preprocess(self, x: Any, sequence_length: int | None = None) -> dict[str, np.ndarray]:
        """Prompts to padded token ids, without an end token.

        Args:
            x: a prompt, a list of them, or `{"prompts": …}`.
            sequence_length: padded length; `None` is the constructor's.

        Returns:
            `{"token_ids": (B, L) int32, "padding_mask": (B, L) bool}`, padded on the right; a single prompt gives
            arrays without the axis B.

        Raises:
            InputError: if a prompt is empty or has more than `sequence_length` tokens.
        """
        length = self._length(sequence_length)
        rows, single = self.encode_prompts(x)
        for i, row in enumerate(rows):
            if len(row) > length:
                raise InputError(
                    f"Prompt {i} has {len(row)} tokens, more than the {length} allowed. "
                    "Shorten it, or raise `sequence_length` (for `generate`: `max_length`)."
                )
        token_ids, mask, _ = self._packed(rows, length, add_end=False)
        return {"token_ids": token_ids[0] if single else token_ids, "padding_mask": mask[0] if single else mask}

    def generate_postprocess(self, x: dict[str, Any]) -> Any:
        """Generated token ids to text, without padding and control tokens.

        Args:
            x: `{"token_ids": (B, L), "padding_mask": (B, L)}`, or without the axis B.

        Returns:
            A list of B strings; one string without the axis B.
        """
        token_ids = np.asarray(to_python(x["token_ids"]))
        keep = np.asarray(to_python(x["padding_mask"])).astype(bool)
        keep &= ~np.isin(token_ids, self.tokenizer.special_token_ids)
        if token_ids.ndim == 1:
            return self.tokenizer.decode(token_ids[keep])
        return [self.tokenizer.decode(row[kept]) for row, kept in zip(token_ids, keep, strict=True)]

    def encode_prompts(self, x: Any) -> tuple[list[list[int]], bool]:
        """Prompts to rows of token ids as long as they are, with the start token.

        Args:
            x: a prompt, a list of them, or `{"prompts": …}`.

        Returns:
            The rows, and whether a single prompt was given.

        Raises:
            InputError: if there is no prompt, an empty one, or something that is no text.
        """
        if isinstance(x, dict):
            if "prompts" not in x:
                raise InputError(f'A dictionary of prompts needs the key "prompts"; given {sorted(x)}.')
            x = x["prompts"]
        texts, single = _texts(x, "prompts")
        return [self._start() + ids for ids in self.tokenizer.encode(texts)], single

    def _training_rows(self, x: Any) -> tuple[list[list[int]], list[int], bool]:
        if not isinstance(x, dict):
            texts, single = _texts(x, "texts")
            return [self._start() + ids for ids in self.tokenizer.encode(texts)], [0] * len(texts), single
        if set(x) != {"prompts", "responses"}:
            raise InputError(f'A dictionary of texts needs the keys "prompts" and "responses"; given {sorted(x)}.')
        prompts, single = _texts(x["prompts"], "prompts")
        responses, one_response = _texts(x["responses"], "responses")
        if single != one_response:
            raise InputError("`prompts` and `responses` must both be a string, or both be lists.")
        if len(prompts) != len(responses):
            raise InputError(f"`prompts` and `responses` must be as many; given {len(prompts)} and {len(responses)}.")
        heads = [self._start() + ids for ids in self.tokenizer.encode(prompts)]
        tails = self.tokenizer.encode(responses)
        rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
        return rows, [len(head) for head in heads], single

    def _length(self, sequence_length: int | None) -> int:
        if sequence_length is None:
            return self.sequence_length
        if (
            not isinstance(sequence_length, int | np.integer)
            or isinstance(sequence_length, bool)
            or sequence_length < 1
        ):
            raise InputError(f"`sequence_length` must be a whole number of at least 1; given {sequence_length!r}.")
        return int(sequence_length)

    def _start(self) -> list[int]:
        return [self.tokenizer.start_token_id] if self.add_start_token else []

    def _packed(self, rows: list[list[int]], length: int, add_end: bool) -> tuple[np.ndarray, np.ndarray, int]:
        """Rows padded on the right or cut to `length`, their mask, and how many were cut."""
        token_ids = np.full((len(rows), length), self.tokenizer.pad_token_id, "int32")
        mask = np.zeros((len(rows), length), "bool")
        room = length - add_end
        for i, row in enumerate(rows):
            # As in KerasHub, a text that is cut still ends with the end token.
            kept = row[:room] + [self.tokenizer.end_token_id] * add_end
            token_ids[i, : len(kept)] = kept
            mask[i, : len(kept)] = True
        return token_ids, mask, sum(len(row) > room for row in rows)

    @classmethod
    def from_preset(cls, preset, **kwargs):
        """Load the preprocessor of a preset name, handle or folder; `kwargs` override what it holds.

        Raises:
            PresetError: if the name leads nowhere.
            CheckpointError: if the folder has no readable tokenizer.
        """
        from gemma2_keras.checkpoints.presets import load_preprocessor

        return load_preprocessor(cls, preset, **kwargs)

    def save_to_preset(self, preset_dir) -> None:
        """Write preprocessor and tokenizer alone into a preset folder; a model saved there before stays.

        Raises:
            FileExistsError: if something else than a saved preset stands there.
        """
        from gemma2_keras.checkpoints.presets import save_preset

        save_preset(preset_dir, tokenizer=self.tokenizer, preprocessor=self, keep=True)


def is_tokenized(x: Any) -> bool:
    """Whether `x` is data that went through a preprocessor already."""
    return isinstance(x, dict) and "token_ids" in x


def _texts(x: Any, what: str) -> tuple[list[str], bool]:
    x = to_python(x)
    single = isinstance(x, str)
    texts = [x] if single else x
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"`{what}` must be a string or a list of strings; given {_short(x)}.")
    if not texts:
        raise InputError(f"`{what}` is empty: give at least one string.")
    for i, text in enumerate(texts):
        if not text:
            raise InputError(
                f"`{what}` {i} is an empty string: give it at least one character. To let a model begin on its own, "
                "generate from token ids that hold the start token alone."
            )
    return texts, single


def _short(x: Any) -> str:
    shown = repr(x)
    return shown if len(shown) <= 80 else f"{shown[:77]}…"
