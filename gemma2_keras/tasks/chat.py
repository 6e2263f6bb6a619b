"""Conversations that keep what they have computed."""

from __future__ import annotations

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

    Each turn runs only the tokens that are new since the last. Weights that change meanwhile are not noticed:
    `reset()` begins anew.

    Args:
        model: a `Gemma2CausalLM` with a preprocessor.
        system: instructions in front of the first user message, or `None`.
        max_length: most tokens of the whole conversation; `None` is the model's context.
        when_full: `"forget"` or `"raise"`.
        **options: of every reply, as `Gemma2CausalLM.generate` takes them; `send` and `stream` override them.

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
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system text; a reply that is still being made ends."""
        self._leave()
        self.messages: list[dict[str, str]] = []
        self.stats: GenerationStats | None = None
        # What is remembered: a user's text, and the tokens of the model's turn that followed.
        self._turns: list[tuple[str, list[int]]] = []
        self._session: Session | None = None

    def send(self, text: str, **options: Any) -> str:
        """The model's reply to a message.

        Args:
            text: the message. Control tokens that it spells stay plain text.
            **options: as `Gemma2CausalLM.generate` takes them, for this reply alone.

        Raises:
            InputError: if the message is empty, or finds no room; the conversation is then as it was.
        """
        return "".join(self.stream(text, **options))

    def stream(self, text: str, **options: Any) -> TextStream:
        """The same reply, piece by piece. A reply that is left before its end is remembered as far as it went.

        Returns:
            A `TextStream`.
        """
        turns([{"role": "user", "content": text}])
        check_names("chat", options, _OPTIONS)
        self._leave()
        options = {**self._options, **options}
        check_lengths(None, options.get("max_new_tokens"))
        limit = options.pop("max_new_tokens", None)
        kept, ids, room = self._fitting(text, max(1, min(_REPLY, self._length // 4)) if limit is None else limit)
        asked = (
            options.pop(name, default) for name, default in (("stop_token_ids", "auto"), ("stop", None), ("seed", None))
        )
        stop_token_ids, stop, seed = asked
        request, assembler = self._model._request(
            [ids], None, room if limit is None else limit, stop_token_ids, stop, seed, options
        )
        self._model._require_one_token_at_a_time()
        stream = TextStream(self._replied(text, kept, ids, request, assembler()))
        self._last = weakref.ref(stream)
        return stream

    def _leave(self) -> None:
        # A stream that was left but is still held would go on behind what comes next.
        if self._last is not None and (last := self._last()) is not None:
            last.close()

    def _replied(
        self, text: str, kept: list[tuple[str, list[int]]], ids: list[int], request: Request, assembler: TextAssembler
    ) -> Generator[str | GenerationStats]:
        began = time.perf_counter()
        if self._session is None:
            self._session = Session(self._model._engine, 1, self._length)
        session, before = self._session, self._session.prefilled
        session.become([ids])
        said, failed, self.stats = "", False, None
        try:
            for piece in streamed(session, request, assembler, began, session.prefilled - before):
                if isinstance(piece, str):
                    said += piece
                else:
                    self.stats = piece
                yield piece
        except Exception:
            failed = True
            raise
        finally:
            # A reply that was left, or interrupted, counts as far as it went; one that failed does not.
            if not failed:
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
