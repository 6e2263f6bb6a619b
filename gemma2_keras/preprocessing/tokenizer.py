"""Gemma's SentencePiece tokenizer."""

from __future__ import annotations

import codecs
import itertools
import os
import re
from typing import Any

import keras
import keras_hub
import numpy as np
import sentencepiece

from gemma2_keras.errors import InputError
from gemma2_keras.models.gemma2_backbone import Gemma2Backbone
from gemma2_keras.models.known_presets import KnownPresets
from gemma2_keras.preprocessing.inputs import to_python

VOCABULARY_FILE = "vocabulary.spm"

# SentencePiece writes a space as this character; a text that holds the character itself is kept apart, byte by byte.
_SPACE_MARK = "\u2581"
# User-defined pieces that steer the model. The others, runs of newlines or spaces and HTML tags, are ordinary text.
_CONTROL_PIECE = re.compile(r"<mask>|<2mass>|\[@BOS@\]|<unused\d+>|<(?:start|end)_of_turn>")


@keras.saving.register_keras_serializable(package="gemma2_keras")
class Gemma2Tokenizer(keras_hub.tokenizers.Tokenizer):
    """Text to token ids and back, losslessly: `decode(encode(text)) == text` for any Unicode text.

    Args:
        proto: the SentencePiece model: a path, or its bytes. `None` only while a saved layer is being restored.
        parse_special: whether a control token spelled in a text, as in `"<start_of_turn>user"`, becomes that token. By
            default it stays plain text, so that what a user types cannot pose as the conversation's structure.
        **kwargs: `name` and the like, as `keras.layers.Layer` takes them.

    Attributes:
        pad_token_id, end_token_id, start_token_id, unk_token_id: 0, 1, 2, 3 in Gemma's vocabulary.
        start_of_turn_id, end_of_turn_id: 106 and 107; `None` where the vocabulary has no such piece.

    Raises:
        FileNotFoundError: if `proto` is a path to no file.
        ValueError: if `proto` is no SentencePiece model, or lacks `<pad>`, `<eos>`, `<bos>` or the byte pieces.

    Example:

    >>> tokenizer = Gemma2Tokenizer.from_preset("gemma2_tiny_en")
    >>> tokenizer.decode(tokenizer.encode("The cat sleeps. 🐈"))
    'The cat sleeps. 🐈'
    """

    backbone_cls = Gemma2Backbone
    presets = KnownPresets()

    def __init__(self, proto: str | os.PathLike | bytes | None = None, parse_special: bool = False, **kwargs) -> None:
        kwargs.setdefault("dtype", "int32")
        super().__init__(**kwargs)
        self.file_assets = [VOCABULARY_FILE]
        self.parse_special = parse_special
        self.proto: bytes | None = None
        if proto is not None:
            self.set_proto(proto)

    def set_proto(self, proto: str | os.PathLike | bytes) -> None:
        """Take a SentencePiece model, given as a path or as bytes."""
        if not isinstance(proto, bytes):
            with open(proto, "rb") as file:
                proto = file.read()
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(proto)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"`proto` is not a SentencePiece model ({len(proto)} bytes).") from error
        pieces = [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]
        self._processor = processor
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        missing = [piece for piece in ("<pad>", "<eos>", "<bos>", "<unk>", *byte_pieces) if piece not in self._ids]
        if missing:
            more = ", …" if len(missing) > 4 else ""
            raise ValueError(f"`proto` is no Gemma vocabulary: it lacks {', '.join(missing[:4])}{more}.")
        self._space_mark_ids = [self._ids[byte_pieces[byte]] for byte in _SPACE_MARK.encode()]
        self.proto = proto
        self.pad_token_id, self.end_token_id = self._ids["<pad>"], self._ids["<eos>"]
        self.start_token_id, self.unk_token_id = self._ids["<bos>"], self._ids["<unk>"]
        self.start_of_turn_id = self._ids.get("<start_of_turn>")
        self.end_of_turn_id = self._ids.get("<end_of_turn>")
        self._bytes = [self._bytes_of(i, piece) for i, piece in enumerate(pieces)]
        control = [piece for i, piece in enumerate(pieces) if self._is_control(i, piece)]
        self._control_ids = sorted(self._ids[piece] for piece in control)
        spelled = "|".join(re.escape(piece) for piece in sorted(control, key=len, reverse=True))
        self._control = re.compile(f"({spelled})")
        # A look-ahead finds spellings that overlap as well.
        self._control_start = re.compile(f"(?={spelled})")

    def _is_control(self, token_id: int, piece: str) -> bool:
        special = self._processor.IsControl(token_id) or self._processor.IsUnknown(token_id)
        return special or _CONTROL_PIECE.fullmatch(piece) is not None

    def _bytes_of(self, token_id: int, piece: str) -> bytes:
        if self._processor.IsByte(token_id):
            return bytes([int(piece[3:-1], 16)])
        if self._processor.IsUnknown(token_id):
            return "\ufffd".encode()
        if self._processor.IsControl(token_id):
            return b""
        return piece.replace(_SPACE_MARK, " ").encode()

    def encode(self, inputs: Any, parse_special: bool | None = None) -> Any:
        """Text to token ids, without start and end tokens.

        Args:
            inputs: a string, or any nesting of lists, tuples or arrays of strings.
            parse_special: overrides the constructor's choice.

        Returns:
            A list of ints for a string; lists of them, nested alike, for a nesting.

        Raises:
            InputError: if something other than a string stands where a string belongs, or a string holds a lone
                surrogate, which UTF-8 cannot write.

        Example:

        >>> tokenizer = Gemma2Tokenizer.from_preset("gemma2_tiny_en")
        >>> tokenizer.encode("<end_of_turn>", parse_special=True)
        [107]
        >>> 107 in tokenizer.encode("<end_of_turn>")
        False
        """
        self._require_vocabulary()
        parse = self.parse_special if parse_special is None else parse_special
        return self._encode(to_python(inputs), parse)

    def _encode(self, inputs: Any, parse: bool) -> list:
        if isinstance(inputs, str):
            return self._encode_text(inputs, parse)
        if isinstance(inputs, list | tuple):
            return [self._encode(x, parse) for x in inputs]
        raise InputError(f"The tokenizer takes strings and lists of them; given {type(inputs).__name__}: {inputs!r}.")

    def _encode_text(self, text: str, parse: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"The text holds a lone surrogate, {text[error.start]!a} at {error.start}, which is no character. "
                'Read the file with the right encoding, or with errors="replace".'
            ) from error
        if parse:
            # `split` on a group gives plain text and control tokens in turn.
            parts = self._control.split(text)
            ids = []
            for i, part in enumerate(parts):
                ids += [self._ids[part]] if i % 2 else self._encode_plain(part)
            return ids
        # A control token cut after its first character is matched by nothing.
        cuts = [match.start() + 1 for match in self._control_start.finditer(text)]
        edges = [0, *cuts, len(text)]
        return [i for start, end in itertools.pairwise(edges) for i in self._encode_plain(text[start:end])]

    def _encode_plain(self, text: str) -> list[int]:
        if _SPACE_MARK not in text:
            return self._processor.EncodeAsIds(text) if text else []
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE_MARK)):
            if i:
                ids += self._space_mark_ids
            ids += self._processor.EncodeAsIds(part) if part else []
        return ids

    def decode(self, inputs: Any) -> Any:
        """Token ids to text. `<pad>`, `<bos>` and `<eos>` give nothing; bytes that are no UTF-8 give U+FFFD.

        Args:
            inputs: a list or 1-D array of ids, or any nesting of them; rows may differ in length.

        Returns:
            A string, or lists of strings, nested alike.

        Raises:
            InputError: if an id is outside the vocabulary, or is no whole number.
        """
        self._require_vocabulary()
        inputs = to_python(inputs)
        if isinstance(inputs, int | float):
            inputs = [inputs]
        if not isinstance(inputs, list):
            raise InputError(
                f"Token ids are whole numbers in a list or an array; given {type(inputs).__name__}: {inputs!r}."
            )
        if any(isinstance(x, list) for x in inputs):
            return [self.decode(x) for x in inputs]
        return b"".join(self.token_bytes(i) for i in inputs).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one token stands for; they need not be whole characters."""
        self._require_vocabulary()
        if not isinstance(token_id, int | np.integer) or isinstance(token_id, bool):
            raise InputError(f"A token id is a whole number; given {token_id!r}.")
        if not 0 <= token_id < len(self._bytes):
            raise InputError(f"A token id lies between 0 and {len(self._bytes) - 1}; given {token_id}.")
        return self._bytes[token_id]

    def tokenize(self, inputs: Any) -> Any:
        """`encode`, under KerasHub's name."""
        return self.encode(inputs)

    def detokenize(self, inputs: Any) -> Any:
        """`decode`, under KerasHub's name."""
        return self.decode(inputs)

    def call(self, inputs: Any) -> Any:
        """`encode`."""
        return self.encode(inputs)

    def vocabulary_size(self) -> int:
        """Number of ids."""
        self._require_vocabulary()
        return len(self._bytes)

    def get_vocabulary(self) -> list[str]:
        """The pieces, in the order of their ids."""
        self._require_vocabulary()
        return list(self._ids)

    def id_to_token(self, id: int) -> str:
        """The piece of an id."""
        self.token_bytes(id)
        return self._processor.IdToPiece(int(id))

    def token_to_id(self, token: str) -> int:
        """The id of a piece, special ones by their name: `token_to_id("<start_of_turn>")`.

        Raises:
            InputError: if the vocabulary has no such piece.
        """
        self._require_vocabulary()
        if token not in self._ids:
            raise InputError(f"The vocabulary has no piece {token!r}. `encode` splits any text into pieces.")
        return self._ids[token]

    @property
    def special_token_ids(self) -> list[int]:
        """Ids of all control tokens; text never encodes to one unless asked."""
        self._require_vocabulary()
        return list(self._control_ids)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a generated text: `<eos>` and, where there is one, `<end_of_turn>`."""
        self._require_vocabulary()
        return (self.end_token_id,) if self.end_of_turn_id is None else (self.end_token_id, self.end_of_turn_id)

    def _require_vocabulary(self) -> None:
        if self.proto is None:
            raise ValueError("The tokenizer has no vocabulary yet: make it with `proto=` or `from_preset`.")

    def save_assets(self, dir_path: str) -> None:
        """Write the SentencePiece model into a folder."""
        self._require_vocabulary()
        with open(os.path.join(dir_path, VOCABULARY_FILE), "wb") as file:
            file.write(self.proto or b"")

    def load_assets(self, dir_path: str) -> None:
        """Read the SentencePiece model that `save_assets` wrote."""
        self.set_proto(os.path.join(dir_path, VOCABULARY_FILE))

    def get_config(self) -> dict:
        """Constructor arguments; the vocabulary itself is saved as an asset."""
        return {**super().get_config(), "parse_special": self.parse_special}

    @classmethod
    def from_preset(cls, preset, **kwargs):
        """Load the tokenizer of a preset name, handle or folder; `kwargs` go to the constructor.

        Raises:
            PresetError: if the name leads nowhere.
            CheckpointError: if the folder has no readable tokenizer.
        """
        from gemma2_keras.checkpoints.presets import load_tokenizer

        return load_tokenizer(cls, preset, **kwargs)

    def save_to_preset(self, preset_dir) -> None:
        """Write the tokenizer alone into a preset folder; a model saved there before stays.

        Raises:
            FileExistsError: if something else than a saved preset stands there.
        """
        from gemma2_keras.checkpoints.presets import save_preset

        save_preset(preset_dir, tokenizer=self, keep=True)


class IncrementalDecoder:
    """Token ids to text one at a time: a character whose bytes come in several tokens is held back until it is whole.

    Args:
        tokenizer: any `Gemma2Tokenizer`.

    Example:

    >>> tokenizer = Gemma2Tokenizer.from_preset("gemma2_tiny_en")
    >>> decoder = IncrementalDecoder(tokenizer)
    >>> [decoder.push(i) for i in tokenizer.encode("🐈")] + [decoder.finish()]
    ['', '', '', '🐈', '']
    """

    def __init__(self, tokenizer: Gemma2Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left: U+FFFD for bytes that never became a character, or nothing."""
        return self._decoder.decode(b"", final=True)
