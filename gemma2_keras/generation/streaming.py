"""Made tokens to text while they come, and what is known when they end."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Generator, Sequence
from typing import Any

from gemma2_keras.memory import peak_bytes
from gemma2_keras.preprocessing.tokenizer import Gemma2Tokenizer, IncrementalDecoder


@dataclasses.dataclass(frozen=True)
class GenerationStats:
    """What a generation took.

    Attributes:
        prompt_tokens: tokens of the prompts that were run; those of a conversation's earlier turns are not.
        new_tokens: tokens made.
        prefill_seconds: time until the first token.
        decode_seconds: time of the others.
        finish_reasons: for each row why it ended: `"stop_token"`, `"stop_string"` or `"length"`.
        peak_memory_bytes: the most that the process has held so far; `None` where the system does not say.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    finish_reasons: tuple[str, ...]
    peak_memory_bytes: int | None = dataclasses.field(default_factory=peak_bytes)

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens run in a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens made in a second, after the first of each row."""
        made = max(self.new_tokens - len(self.finish_reasons), 0)
        return made / self.decode_seconds if self.decode_seconds else 0.0

    def __str__(self) -> str:
        reasons = ", ".join(sorted(set(self.finish_reasons)))
        peak = "" if self.peak_memory_bytes is None else f", peak memory {self.peak_memory_bytes / 1e9:.2f} GB"
        return (
            f"{self.prompt_tokens} prompt tokens ({self.prompt_tokens_per_second:.1f}/s), "
            f"{self.new_tokens} new tokens ({self.tokens_per_second:.1f}/s), finished by {reasons}{peak}"
        )


class TextAssembler:
    """Tokens of one row to text that is final: no half character, and nothing that may turn out to be a stop string.

    Args:
        tokenizer: of the tokens; its control tokens give no text.
        stop_ids: tokens that end the row.
        stop: strings that end the row, wherever token borders lie; the text ends before the one that is whole first.

    Attributes:
        reason: why the row ended; `None` while it goes on.

    >>> tokenizer = Gemma2Tokenizer.from_preset("gemma2_tiny_en")
    >>> assembler = TextAssembler(tokenizer, (), ["cat"])
    >>> "".join(map(assembler.push, tokenizer.encode("The cat sleeps"))), assembler.reason
    ('The ', 'stop_string')
    """

    def __init__(self, tokenizer: Gemma2Tokenizer, stop_ids: Collection[int], stop: Sequence[str] = ()) -> None:
        self.reason: str | None = None
        self._decoder = IncrementalDecoder(tokenizer)
        self._silent = frozenset(tokenizer.special_token_ids)
        self._stop_ids = frozenset(stop_ids)
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that is final with this token; nothing once the row has ended."""
        if self.reason is not None:
            return ""
        text = "" if token_id in self._silent else self._decoder.push(token_id)
        if token_id not in self._stop_ids:
            return self._released(text)
        text = self._released(text + self._decoder.finish(), last=True)
        self.reason = self.reason or "stop_token"
        return text

    def finish(self) -> str:
        """The rest, once no token will come."""
        if self.reason is not None:
            return ""
        text = self._released(self._decoder.finish(), last=True)
        self.reason = self.reason or "length"
        return text

    def _released(self, text: str, last: bool = False) -> str:
        text = self._held + text
        # The one that is whole first ends the row, so that it does not matter how the text was cut into tokens.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.reason, self._held = "stop_string", ""
            return text[: min(found)[1]]
        keep = 0 if last else self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


class TextStream:
    """Pieces of text while a model makes them; an iterator, and a notebook cell's value that fills while it is made.

    Several threads may read it: each piece goes to one of them.

    Args:
        pieces: strings, then the statistics.
        lock: held while a piece is made; `None` is one of its own.

    Attributes:
        text: what was made so far.
        stats: `GenerationStats`, once the stream has ended.
    """

    def __init__(self, pieces: Generator[str | GenerationStats], lock: Any = None) -> None:
        self.text = ""
        self.stats: GenerationStats | None = None
        self._pieces = pieces
        self._lock = threading.RLock() if lock is None else lock

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        with self._lock:
            for piece in self._pieces:
                if isinstance(piece, str):
                    self.text += piece
                    return piece
                self.stats = piece
        raise StopIteration

    def close(self) -> None:
        """Make no more; a piece that another thread is waiting for is made first."""
        with self._lock:
            self._pieces.close()

    def show(self) -> str:
        """Print the pieces as they come, then the statistics.

        Returns:
            The whole text.
        """
        if self.text:
            print(self.text, end="", flush=True)
        for piece in self:
            print(piece, end="", flush=True)
        print(f"\n\n[{self.stats}]" if self.stats else "")
        return self.text

    def _ipython_display_(self) -> None:
        self.show()
