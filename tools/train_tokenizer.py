"""Trains a SentencePiece model whose special ids are Gemma's.

    python tools/train_tokenizer.py --input corpus.jsonl --vocabulary-size 3072 --out tokenizer.model

Ids 0 to 472 are the same in every model that this tool writes, and the same as in Gemma 2's own tokenizer: control
pieces, placeholders, turn markers, runs of newlines and of spaces, HTML tags and the 256 byte pieces. What the text
teaches comes after them, from id 473 on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import sentencepiece

PAD_ID, EOS_ID, BOS_ID, UNK_ID = 0, 1, 2, 3
CONTROL_PIECES = ("<pad>", "<eos>", "<bos>", "<unk>")
# SentencePiece stores a space as this character.
SPACE = "\u2581"


def _tags(*names: str) -> tuple[str, ...]:
    """Returns the opening tags of `names`, then the closing ones."""
    return (*(f"<{name}>" for name in names), *(f"</{name}>" for name in names))


USER_DEFINED_PIECES: tuple[str, ...] = (
    "<mask>",
    "<2mass>",
    "[@BOS@]",
    *(f"<unused{index}>" for index in range(99)),
    "<start_of_turn>",
    "<end_of_turn>",
    *("\n" * length for length in range(1, 32)),
    *(SPACE * length for length in range(2, 32)),
    *_tags("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"),
    *_tags("h1", "h2", "h3", "h4", "h5", "h6", "blockquote"),
    *_tags("strong", "em", "b", "i", "u", "s", "sub", "sup", "code"),
)
BYTE_PIECES: tuple[str, ...] = tuple(f"<0x{byte:02X}>" for byte in range(256))
FIXED_PIECES: tuple[str, ...] = (*CONTROL_PIECES, *USER_DEFINED_PIECES, *BYTE_PIECES)
"""The pieces that every model starts with; a piece's place here is its id."""


# The trainer's own words for a size that cannot be had, and what they mean.
_TOO_SMALL = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
_TOO_LARGE = re.compile(r"Vocabulary size too high .*<= (\d+)")


def _train(texts: Iterable[str], vocabulary_size: int) -> bytes:
    """Runs the trainer and returns the serialized model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary_size,
        hard_vocab_limit=True,
        pad_id=PAD_ID,
        eos_id=EOS_ID,
        bos_id=BOS_ID,
        unk_id=UNK_ID,
        pad_piece=CONTROL_PIECES[PAD_ID],
        eos_piece=CONTROL_PIECES[EOS_ID],
        bos_piece=CONTROL_PIECES[BOS_ID],
        unk_piece=CONTROL_PIECES[UNK_ID],
        user_defined_symbols=list(USER_DEFINED_PIECES),
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        max_sentencepiece_length=16,
        # The default drops every text of more than 4,192 bytes without an error.
        max_sentence_length=1 << 30,
        # One thread and no shuffled sample: the same texts give the same bytes.
        num_threads=1,
        input_sentence_size=0,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    return model.getvalue()


def _check_ids(serialized_model: bytes, vocabulary_size: int) -> None:
    """Raises `RuntimeError` unless every fixed piece has its id and is of its type."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=serialized_model)
    if processor.vocab_size() != vocabulary_size:
        raise RuntimeError(f"The trainer wrote {processor.vocab_size()} pieces; {vocabulary_size} were asked for.")
    for index, piece in enumerate(FIXED_PIECES):
        if (found := processor.id_to_piece(index)) != piece:
            raise RuntimeError(f"Id {index} must be {piece!r}; the trainer made it {found!r}.")
        if processor.is_byte(index) != (index >= len(FIXED_PIECES) - len(BYTE_PIECES)):
            raise RuntimeError(f"Id {index} ({piece!r}) is of the wrong type: byte pieces are the last 256 fixed ids.")
    for index in range(len(FIXED_PIECES), vocabulary_size):
        if processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index):
            raise RuntimeError(f"Id {index} ({processor.id_to_piece(index)!r}) must be a learned piece.")
    # A newline run or a run of spaces that is only listed, and never matched, would be of no use.
    for text, expected in (("\n\n", 109), ("   ", 140), ("<start_of_turn>", 106), ("<table>", 169)):
        if processor.encode(f"a{text}b")[1:-1] != [expected]:
            raise RuntimeError(f"{text!r} between two letters must be encoded as the id {expected} alone.")


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> bytes:
    """Trains a BPE model on `texts` and returns it serialized.

    The same texts in the same order always give the same bytes. Each text is taken whole, newlines included.

    Args:
        texts: The texts to learn from.
        vocabulary_size: The number of pieces, the 473 fixed ones included.

    Raises:
        ValueError: There is no text, or a vocabulary of this size cannot be made from it.
        RuntimeError: The trainer failed, or did not give the fixed pieces their ids.
    """
    # The trainer answers an empty iterator with a bare assertion, and an iterator that fails with a shorter corpus.
    texts = list(texts)
    if not any(text.strip() for text in texts):
        raise ValueError("There is no text to train on.")
    smallest = len(FIXED_PIECES) + 1
    try:
        # The trainer is asked about a size that is too small as well: only it knows how many characters it needs.
        serialized_model = _train(texts, max(vocabulary_size, smallest))
    except RuntimeError as error:
        if match := _TOO_SMALL.search(str(error)):
            raise ValueError(
                f"A vocabulary of {vocabulary_size} pieces is too small for these texts: the smallest possible is "
                f"{max(int(match[1]), smallest)} ({len(FIXED_PIECES)} fixed pieces and one for each character)."
            ) from error
        if match := _TOO_LARGE.search(str(error)):
            raise ValueError(
                f"A vocabulary of {vocabulary_size} pieces is too large for these texts: the largest possible is "
                f"{match[1]}."
            ) from error
        raise
    if vocabulary_size < smallest:
        raise ValueError(f"A vocabulary of {vocabulary_size} pieces is too small: the smallest possible is {smallest}.")
    _check_ids(serialized_model, vocabulary_size)
    return serialized_model


def read_texts(path: Path) -> Iterator[str]:
    """Yields the texts of a file: the field `text` of each JSON line, or each line of any other file.

    Raises:
        ValueError: A line of a `.jsonl` file is not a JSON object with a string `text`.
    """
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if path.suffix != ".jsonl":
                yield line
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{path}, line {number}: not a JSON object with a string "text".')
            yield text


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to a temporary file beside `path`, then renames it to `path`."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        # mkstemp's files are for their owner alone.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _Parser(prog="train_tokenizer", description="Train a Gemma-shaped SentencePiece model.")
    parser.add_argument("--input", type=Path, required=True, help="the texts: .jsonl (field `text`) or plain lines")
    parser.add_argument("--vocabulary-size", type=int, default=3072, help="number of pieces (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the model file to write")
    options = parser.parse_args(arguments)
    try:
        serialized_model = train_tokenizer(read_texts(options.input), options.vocabulary_size)
        write_atomically(options.out, serialized_model)
    except (OSError, ValueError) as error:
        print(f"train_tokenizer: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {options.vocabulary_size} pieces, {len(serialized_model)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
