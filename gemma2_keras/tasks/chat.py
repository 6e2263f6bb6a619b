"""Conversations that keep what they have computed."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma2_keras.errors import InputError
from gemma2_keras.generation.session import Session
from gemma2_keras.generation.streaming import GenerationStats, TextAssembler, TextStream
from gemma2_keras.preprocessing.chat_template import begin_reply, encode_turn, end_turn, require_turns, turns
from gemma2_keras.tasks.generating import SAMPLING_OPTIONS, Request, check_lengths, check_names, streamed

if TYPE_CHECKING:
    from gemma2_keras.tasks.text_generation import TextGeneration

# Room that a reply shall find at least, when nothing else was asked for.
_REPLY = 256
_OPTIONS = SAMPLING_OPTIONS | {"max_new_tokens", "stop_token_ids", "stop", "seed"}


class Chat:
    """A conversation with a model; `Gemma2CausalLM.chat` begins one.

    Each turn runs only the tokens that are new since the last; once adapters were changed or the model was trained, all
    are run anew. Weights that were assigned by hand are not noticed: `reset()` begins anew.

    Threads may share a chat: turns that are sent follow one another. A turn that begins while another thread reads a
    stream ends that reply, as any next turn does.

    Args:
        model: a `Gemma2CausalLM` with a preprocessor.
        system: instructions in front of the first user message, or `None`.
        max_length: most tokens of the whole conversation; `None` is the model's context.
        when_full: `"forget"` or `"raise"`.
        **options: of every reply, as `Gemma2CausalLM.generate` takes them; `send` and `stream` override them.

    Raises:
        InputError: if an argument is outside what is allowed, or `max_length` leaves no room for any turn.
        TypeError: if there is no option of a name.

    Attributes:
        messages: `{"role": …, "content": …}` of all turns, forgotten ones too; the system text is not among them.
        stats: `GenerationStats` of the last reply, whose `prompt_tokens` are those that were run for it; `None` if it
            was left before its end.
    """

    def __init__(
        self,
        model: TextGeneration,
        system: str | None = None,
        max_length: int | None = None,
        when_full: str = "forget",
        **options: Any,
    ) -> None:
        if model.preprocessor is None:
            raise InputError("`chat` needs a preprocessor, which knows what text the tokens are.")
        if when_full not in ("forget", "raise"):
            raise InputError(f'`when_full` must be "forget" or "raise"; given {when_full!r}.')
        if system is not None and (not isinstance(system, str) or not system.strip()):
            raise InputError(f"`system` must be text, or None; given {system!r}.")
        check_names("chat", options, _OPTIONS)
        check_lengths(None, options.get("max_new_tokens"))
        context = model.backbone.config.context_length
        length = context if max_length is None else max_length
        if not isinstance(length, int | np.integer) or isinstance(length, bool) or not 1 <= length <= context:
            raise InputError(f"`max_length` must be a whole number from 1 to the context, {context}; given {length!r}.")
        self._tokenizer = model.preprocessor.tokenizer
        require_turns(self._tokenizer)
        self._model = model
        self._system = system
        self._length = int(length)
        self._when_full = when_full
        self._options = options
        self._last: weakref.ref[TextStream] | None = None
        # Held for each piece of a stream, and by `send` for the whole reply.
        self._lock = threading.RLock()
        self.reset()
        self._require_turns()

    def _require_turns(self) -> None:
        """Refuse now what the first turn would be refused for."""
        self._model._require_one_token_at_a_time()
        shortest, least = self._encoded([], "?"), self._least(self._options.get("max_new_tokens"))
        if len(shortest) + least > self._length:
            within, or_system = ("", "") if self._system is None else (" with the system text", ", or shorten `system`")
            raise InputError(
                f"`max_length`, {self._length}, leaves no room for any turn: the shortest message{within} has "
                f"{len(shortest)} tokens, and its reply needs {least}. Raise `max_length`, or lower `max_new_tokens`"
                f"{or_system}."
            )
        # A seed that is given is checked; none is drawn.
        seed = self._options.get("seed")
        self._asked(shortest, least, {**self._options, "seed": 0 if seed is None else seed})

    def reset(self) -> None:
        """Forget everything but the system text; a reply that is still being made ends."""
        with self._lock:
            self._leave()
            self.messages: list[dict[str, str]] = []
            self.stats: GenerationStats | None = None
            # What is remembered: a user's text, and the tokens of the model's turn that followed.
            self._turns: list[tuple[str, list[int]]] = []
            self._session: Session | None = None
            # Of what the session's cache was made.
            self._made_by: Any = None

    def send(self, text: str, **options: Any) -> str:
        """The model's reply to a message.

        Args:
            text: the message. Control tokens that it spells stay plain text.
            **options: as `Gemma2CausalLM.generate` takes them, for this reply alone.

        Raises:
            InputError: if the message is empty, or finds no room; the conversation is then as it was.
        """
        with self._lock:
            return "".join(self.stream(text, **options))

    def stream(self, text: str, **options: Any) -> TextStream:
        """The same reply, piece by piece. A reply that is left before its end is remembered as far as it went.

        Returns:
            A `TextStream`.
        """
        turns([{"role": "user", "content": text}])
        check_names("chat", options, _OPTIONS)
        options = {**self._options, **options}
        check_lengths(None, options.get("max_new_tokens"))
        with self._lock:
            self._leave()
            kept, ids, room = self._fitting(text, self._least(options.get("max_new_tokens")))
            request, assembler = self._asked(ids, room, options)
            self._model._require_one_token_at_a_time()
            stream = TextStream(self._replied(text, kept, ids, request, assembler()), self._lock)
            self._last = weakref.ref(stream)
            return stream

    def _least(self, limit: int | None) -> int:
        """Room that a reply must find."""
        return max(1, min(_REPLY, self._length // 4)) if limit is None else int(limit)

    def _asked(self, ids: list[int], room: int, options: dict[str, Any]) -> tuple[Request, Any]:
        """The request of a reply behind these tokens, and what makes the assembler of its text."""
        known = {"max_new_tokens": None, "stop_token_ids": "auto", "stop": None, "seed": None}
        limit, stop_token_ids, stop, seed = (options.get(name, default) for name, default in known.items())
        sampling = {name: value for name, value in options.items() if name not in known}
        return self._model._request([ids], None, room if limit is None else limit, stop_token_ids, stop, seed, sampling)

    def _opened(self) -> Session:
        """The session of the earlier turns, or a new one where their cache is of no use any more."""
        optimizer = getattr(self._model, "optimizer", None)
        made_by = self._model._engine, None if optimizer is None else int(optimizer.iterations)
        if self._session is None or self._made_by != made_by:
            self._session, self._made_by = Session(made_by[0], 1, self._length), made_by
        return self._session

    def _leave(self) -> None:
        # A stream that was left but is still held would go on behind what comes next.
        if self._last is not None and (last := self._last()) is not None:
            last.close()

    def _replied(
        self, text: str, kept: list[tuple[str, list[int]]], ids: list[int], request: Request, assembler: TextAssembler
    ) -> Generator[str | GenerationStats]:
        began = time.perf_counter()
        session = self._opened()
        said, counts, before, self.stats = "", False, session.prefilled, None
        try:
            session.become([ids])
            counts = True
            for piece in streamed(session, request, assembler, began, session.prefilled - before):
                if isinstance(piece, str):
                    said += piece
                else:
                    self.stats = piece
                yield piece
        except GeneratorExit:
            raise
        except BaseException as error:
            # What the cache holds is not known, and it may be gone with the program that had taken it over.
            self._session = None
            counts = counts and not isinstance(error, Exception)
            raise
        finally:
            # A reply that was left, or interrupted, counts as far as it went; one that failed does not.
            if counts:
                made = session.ids[0][len(ids) :]
                if assembler.reason == "stop_token":
                    # The turn's end stands behind it in any case.
                    made = made[:-1] if made[-1] in self._tokenizer.special_token_ids else made
                elif assembler.reason != "length":
                    # What was made goes beyond the text that was given.
                    made = self._tokenizer.encode(said)
                reply = [*begin_reply(self._tokenizer), *made, *end_turn(self._tokenizer)]
                self._turns = [*kept, (text, reply)]
                self.messages += [{"role": "user", "content": text}, {"role": "model", "content": said}]

    def _fitting(self, text: str, least: int) -> tuple[list[tuple[str, list[int]]], list[int], int]:
        """The turns that are kept, all tokens up to the beginning of the reply, and the room behind them."""
        kept = list(self._turns)
        while True:
            ids = self._encoded(kept, text)
            room = self._length - len(ids)
            if room >= least:
                return kept, ids, room
            if not kept or self._when_full == "raise":
                way = 'Call `reset()`, or use `when_full="forget"`.' if kept else "Shorten the message."
                raise InputError(
                    f"The conversation has {len(ids)} tokens, which leaves no room for {least} more within "
                    f"`max_length`, {self._length}. {way}"
                )
            del kept[0]

    def _encoded(self, kept: list[tuple[str, list[int]]], text: str) -> list[int]:
        ids = [self._tokenizer.start_token_id]
        users = [*(user for user, _ in kept), text]
        if self._system is not None:
            users[0] = f"{self._system.strip()}\n\n{users[0].strip()}"
        for user, (_, reply) in zip(users, kept, strict=False):
            ids += encode_turn(self._tokenizer, "user", user) + reply
        return ids + encode_turn(self._tokenizer, "user", users[-1]) + begin_reply(self._tokenizer)
