"""Text to what a causal language model trains on and generates from."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import keras_hub
import numpy as np

from gemma2_keras.errors import InputError, warn
from gemma2_keras.models.gemma2_backbone import Gemma2Backbone
from gemma2_keras.models.known_presets import KnownPresets
from gemma2_keras.preprocessing.chat_template import encode_chat_example
from gemma2_keras.preprocessing.inputs import is_graph_tensor, to_python
from gemma2_keras.preprocessing.records import columns_of, is_tokenized, texts_of
from gemma2_keras.preprocessing.token_view import TokenView
from gemma2_keras.preprocessing.tokenizer import Gemma2Tokenizer


class EncodedExample(NamedTuple):
    """One example as tokens, as long as it is.

    Attributes:
        token_ids: the tokens, start and end included.
        counted: for each of them, whether the loss counts it.
    """

    token_ids: list[int]
    counted: list[bool]


@keras.saving.register_keras_serializable(package="gemma2_keras")
class Gemma2CausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Tokenize, pad and label text, with NumPy and sentencepiece alone.

    Called, it makes `(x, y, sample_weight)` for training; `generate_preprocess` and `generate_postprocess` serve
    `generate`. It works on strings, lists and arrays of them; on `{"prompts": …, "responses": …}`, of which the loss
    counts the responses alone; on conversations, `{"messages": […]}`, of which it counts what the model says; on lists
    of records, such as `[{"text": …}, …]`; and, conversations excepted, inside `tf.data.Dataset.map`. `show` shows what
    counts. Data that is tokenized already, a dictionary with `"token_ids"`, passes through.

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
    presets = KnownPresets()

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
            x: a string or a list of them; a dictionary of columns, `"text"`, `"prompts"` and `"responses"`, or
                `"messages"`; a list of records `{"text": …}`, `{"prompt": …, "response": …}` (or `"completion"`), or
                `{"messages": …}`, all of one kind; or data tokenized already. `"messages"` are lists of `{"role": …,
                "content": …}`, as `encode_chat` takes them. Keys of other names are left aside.
            y: labels, only beside tokenized data: text makes its own.
            sample_weight: weights, likewise.
            sequence_length: overrides the constructor's.

        Returns:
            x: `{"token_ids": (B, L) int32, "padding_mask": (B, L) bool}`.
            y: (B, L) int32, the same tokens one position on.
            sample_weight: (B, L) float32, 1 where `y` counts and 0 where it is padding, part of a prompt, or of a
                conversation what the model does not say.
            A single text gives arrays without the axis B.

        Raises:
            InputError: if there is no text, one is empty, kinds are mixed, or roles are out of order; it says which
                example.
        """
        if is_tokenized(x):
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        if y is not None or sample_weight is not None:
            raise InputError("`y` and `sample_weight` are made from the text: give `x` alone, or tokenized data.")
        length = self.resolved_length(sequence_length)
        leaves = keras.tree.flatten(x)
        if any(is_graph_tensor(leaf) for leaf in leaves):
            return self._call_in_graph(x, length)
        return self._call_eagerly(x, length)

    def _call_eagerly(self, x: Any, length: int):
        encoded, single = self.encode_examples(x)
        examples = list(encoded)
        # One token more than asked: inputs drop the last, labels the first.
        cut = [self._cut(example, length + 1) for example in examples]
        longer = sum(len(example.token_ids) > length + 1 for example in examples)
        if longer:
            warn(
                f"{longer} of {len(examples)} texts were cut to `sequence_length={length}` tokens; raise it to keep "
                "all."
            )
        token_ids, mask = self._padded([example.token_ids for example in cut], length + 1)
        weight = np.zeros(token_ids.shape, "float32")
        for row, example in zip(weight, cut, strict=True):
            row[: len(example.counted)] = example.counted
        inputs = {"token_ids": token_ids[:, :-1], "padding_mask": mask[:, :-1]}
        made = (inputs, token_ids[:, 1:], weight[:, 1:])
        return keras.tree.map_structure(lambda a: a[0], made) if single else made

    def _call_in_graph(self, x: Any, length: int):
        if isinstance(x, dict) and "messages" in x:
            raise InputError(
                "Conversations do not go through `tf.data`: give `fit` the list of them, or tokens that "
                "`gemma2_keras.prepare` makes."
            )
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
        length = self.resolved_length(sequence_length)
        rows, single = self.encode_prompts(x)
        for i, row in enumerate(rows):
            if len(row) > length:
                raise InputError(
                    f"Prompt {i} has {len(row)} tokens, more than the {length} allowed. "
                    "Shorten it, or raise `sequence_length` (for `generate`: `max_length`)."
                )
        token_ids, mask = self._padded(rows, length)
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
                raise InputError(
                    f'A dictionary of prompts needs the key "prompts"; given {sorted(x)}. Token '
                    "ids are for a model that was made with `preprocessor=None`."
                )
            x = x["prompts"]
        texts, single = texts_of(x, "prompts")
        return [self._start() + ids for ids in self.tokenizer.encode(texts)], single

    def encode_examples(self, x: Any) -> tuple[Iterator[EncodedExample], bool]:
        """Training text to tokens, as long as each example is.

        Args:
            x: text, as `call` takes it.

        Returns:
            The examples, each made when it is asked for, and whether a single one was given.

        Raises:
            InputError: as `call`.
        """
        columns, single = columns_of(x)
        return self._each_encoded(columns), single

    def _each_encoded(self, columns: dict[str, list]) -> Iterator[EncodedExample]:
        for i, row in enumerate(zip(*columns.values(), strict=True)):
            with _numbered(i):
                yield self._encoded(columns, row)

    def _encoded(self, columns: Any, row: tuple) -> EncodedExample:
        if "messages" in columns:
            return EncodedExample(*encode_chat_example(self.tokenizer, row[0]))
        head = self._start()
        if "prompt" in columns:
            head += self.tokenizer.encode(row[0])
        tail = self.tokenizer.encode(row[-1]) + [self.tokenizer.end_token_id] * self.add_end_token
        # The start token is nothing to predict.
        return EncodedExample(head + tail, [False] * len(head) + [True] * len(tail))

    def _cut(self, example: EncodedExample, length: int) -> EncodedExample:
        """The beginning of an example; as in KerasHub, a text that is cut still ends with the end token."""
        token_ids, counted = example
        if len(token_ids) > length and self.add_end_token and token_ids[-1] == self.tokenizer.end_token_id:
            return EncodedExample([*token_ids[: length - 1], token_ids[-1]], [*counted[: length - 1], counted[-1]])
        return EncodedExample(token_ids[:length], counted[:length])

    def show(self, x: Any) -> TokenView:
        """What an example is as tokens, and what of it the loss counts, to look at.

        Args:
            x: one example: a string, `{"text": …}`, `{"prompt": …, "response": …}` or `{"messages": …}`.

        Returns:
            A `TokenView`: printed, what counts stands between `⟦` and `⟧`; in a notebook it is highlighted.

        Raises:
            InputError: if `x` is no single example, or not one to learn from.

        Example:

        >>> preprocessor = Gemma2CausalLMPreprocessor.from_preset("gemma2_tiny_en")
        >>> preprocessor.show({"prompt": "The cat", "response": " sleeps."})
        <bos>The cat⟦ sleeps.<eos>⟧
        """
        examples, single = self.encode_examples(x)
        if not single:
            raise InputError("`show` takes one example: give `x[0]` of a list, or `{…}` with one text for each key.")
        return TokenView(self.tokenizer, *next(examples))

    def resolved_length(self, sequence_length: int | None) -> int:
        """The length asked for, or the constructor's with `None`.

        Raises:
            InputError: if it is no whole number of at least 1.
        """
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

    def _padded(self, rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows padded on the right to `length`, and their mask."""
        token_ids = np.full((len(rows), length), self.tokenizer.pad_token_id, "int32")
        mask = np.zeros((len(rows), length), "bool")
        for i, row in enumerate(rows):
            token_ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return token_ids, mask

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


@contextlib.contextmanager
def _numbered(i: int) -> Iterator[None]:
    """Say which example it is that cannot be taken."""
    try:
        yield
    except InputError as error:
        raise InputError(f"Example {i}: {error}") from error
