"""`generate`, `stream` and `chat` of a task."""

from __future__ import annotations

import functools
import time
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from gemma2_keras.errors import InputError
from gemma2_keras.generation.programs import Engine
from gemma2_keras.generation.sampling import sampling_of
from gemma2_keras.generation.search import check_sampler, search, searches
from gemma2_keras.generation.session import Session
from gemma2_keras.generation.streaming import TextAssembler, TextStream
from gemma2_keras.models.inputs import check_token_inputs, is_traced
from gemma2_keras.preprocessing.inputs import to_python
from gemma2_keras.tasks import generating
from gemma2_keras.tasks.chat import Chat


class TextGeneration(keras_hub.models.CausalLM):
    """A causal language model whose `generate`, `stream` and `chat` run on this package's engine."""

    def forget_programs(self) -> None:
        """Compile anew what is needed, since the model has other layers now."""
        self._compiled_engine: Engine | None = None
        self.forget_sampler()

    def forget_sampler(self) -> None:
        """Another sampler has its own search, and begins its seeds anew."""
        self._search: Any = None
        self._calls = 0

    def notice_adapters(self) -> None:
        """Called before anything is run: a task whose layers may have changed forgets its programs."""

    def generate(
        self,
        inputs,
        max_length=None,
        stop_token_ids: Any = "auto",
        strip_prompt=False,
        *,
        max_new_tokens=None,
        stop=None,
        seed=None,
        return_stats=False,
        verbose: Any = "auto",
        **sampling,
    ) -> Any:
        """Continue prompts, with the sampler chosen in `compile` (greedy by default).

        A list of any length is run in batches that memory can hold. Rows do not influence one another: what chance
        decides depends on the seed and the row's own prompt, not on the batch.

        Args:
            inputs: a prompt, a list of them, `{"prompts": …}`, or a `tf.data.Dataset` of prompts or batches of them;
                without a preprocessor, `{"token_ids": (B, L), "padding_mask": (B, L)}`.
            max_length: tokens of prompt and continuation together; by default the preprocessor's `sequence_length`,
                or the context of the model if that is shorter. Without a preprocessor it is L: the padding is filled.
            stop_token_ids: ids that end a continuation; `"auto"` is `<eos>` and `<end_of_turn>`, `None` is none.
            strip_prompt: whether to return the continuation alone.
            max_new_tokens: tokens of the continuation, instead of `max_length`.
            stop: a string or a list of strings; a continuation ends before the first of them. Not without a
                preprocessor.
            seed: whole number that makes sampling repeatable; `None` draws anew for each call, from the sampler's own
                seed if it has one.
            return_stats: whether to return `(texts, GenerationStats)`.
            verbose: 1 shows a progress bar, 0 none; `"auto"` shows one for more prompts than are run at once.
            **sampling: overrides the sampler for this call; `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`,
                `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `logit_bias`, `forbidden_tokens` and
                `logits_processors`, as `gemma2_keras.generation.sampling.Sampling` describes them.

        Returns:
            A string for a prompt, a list of strings for a list. Without a preprocessor, a dictionary of (B, L) NumPy
            arrays, wider than L where what was asked for is; the padding mask is true up to and including the token
            that ended the row.

        Raises:
            InputError: if there is no prompt, an empty one, one that leaves no room within `max_length` or the
                context, ids outside the vocabulary, or an argument outside what is allowed.

        Example:

        >>> model = Gemma2CausalLM.from_preset("gemma2_tiny_en")
        >>> texts = model.generate(["The sun", "Once upon a time"], max_new_tokens=4, strip_prompt=True)
        >>> len(texts)
        2
        >>> one = model.generate("The sun", max_new_tokens=8, temperature=0.8, top_p=0.9, seed=1)
        >>> one == model.generate(["The cat", "The sun"], max_new_tokens=8, temperature=0.8, top_p=0.9, seed=1)[1]
        True
        """
        generating.check_lengths(max_length, max_new_tokens)
        generating.check_verbose(verbose)
        if hasattr(inputs, "as_numpy_iterator"):
            inputs = _joined(list(inputs.as_numpy_iterator()))
        single, width = False, 0
        if self.preprocessor is None:
            if not isinstance(inputs, dict):
                raise InputError(
                    "The model was made without a tokenizer, so that it takes token ids alone: "
                    f'{{"token_ids": (B, L), "padding_mask": (B, L)}}; given {type(inputs).__name__}.'
                )
            check_token_inputs(inputs, self.backbone.config.vocabulary_size)
            if is_traced(inputs["token_ids"]):
                raise InputError("`token_ids` must have values: a symbolic tensor cannot be continued.")
            inputs = {name: np.asarray(to_python(inputs[name])) for name in ("token_ids", "padding_mask")}
            if stop:
                raise InputError("`stop` needs a preprocessor, which knows what text the tokens are.")
            rows, width = generating.rows_of(inputs), inputs["token_ids"].shape[1]
            if max_length is None and max_new_tokens is None:
                max_length = width
        else:
            rows, single = self.preprocessor.encode_prompts(inputs)
        request, assembler = self._request(rows, max_length, max_new_tokens, stop_token_ids, stop, seed, sampling)
        made, stats = generating.run(self._engine, request, assembler, self._searched(request), verbose)
        if self.preprocessor is None:
            width = max(width, *(len(row) + limit for row, limit in zip(rows, request.limits, strict=True)))
            result = generating.arrays_of(rows, [row.ids for row in made], width, strip_prompt)
        else:
            texts = [row.text for row in made]
            if not strip_prompt:
                texts = [self._text(row) + text for row, text in zip(rows, texts, strict=True)]
            result = texts[0] if single else texts
        return (result, stats) if return_stats else result

    def stream(
        self,
        prompt,
        max_length=None,
        stop_token_ids="auto",
        strip_prompt=True,
        *,
        max_new_tokens=None,
        stop=None,
        seed=None,
        **sampling,
    ) -> TextStream:
        """Continue one prompt, and give the text piece by piece while it is made.

        A character whose bytes come in several tokens is given when it is whole; what may become a stop string is
        held back until it is known. As the value of a notebook cell, or with `.show()`, the text prints itself.

        Args:
            prompt: a string.
            strip_prompt: whether to leave out the prompt, which is otherwise the first piece.
            max_length, stop_token_ids, max_new_tokens, stop, seed, **sampling: as `generate` takes them.

        Returns:
            A `TextStream`: iterate over it for strings; afterwards `.stats` is a `GenerationStats`.

        Raises:
            InputError: as `generate`, at once; also if the sampler searches, since it then has no text until its end.

        Example:

        >>> model = Gemma2CausalLM.from_preset("gemma2_tiny_en")
        >>> stream = model.stream("The sun", max_new_tokens=6)
        >>> "".join(stream) == model.generate("The sun", max_new_tokens=6, strip_prompt=True)
        True
        >>> stream.stats.new_tokens
        6
        """
        if self.preprocessor is None:
            raise InputError("`stream` needs a preprocessor, which knows what text the tokens are.")
        if not isinstance(prompt, str):
            raise InputError(f"`stream` takes one prompt, a string; given {type(prompt).__name__}.")
        rows, _ = self.preprocessor.encode_prompts(prompt)
        generating.check_lengths(max_length, max_new_tokens)
        request, assembler = self._request(rows, max_length, max_new_tokens, stop_token_ids, stop, seed, sampling)
        self._require_one_token_at_a_time()

        def pieces():
            began = time.perf_counter()
            if not strip_prompt:
                yield self._text(rows[0])
            session = Session(self._engine, 1, len(rows[0]) + request.limits[0])
            session.extend(rows)
            yield from generating.streamed(session, request, assembler(), began, len(rows[0]))

        return TextStream(pieces())

    def chat(self, system=None, max_length=None, when_full="forget", **options) -> Chat:
        """Begin a conversation, which keeps what it has computed from turn to turn.

        Args:
            system: instructions; they are put in front of the first user message, since Gemma 2 has no system role.
            max_length: most tokens of the whole conversation; by default the model's context.
            when_full: `"forget"` drops the oldest turns when a new one finds no room, `"raise"` refuses it.
            **options: `max_new_tokens`, `stop` and sampling options of every reply, as `generate` takes them.

        Raises:
            InputError: if the vocabulary has no turns, or an argument is outside what is allowed.

        Example:

        >>> model = Gemma2CausalLM.from_preset("gemma2_tiny_en")
        >>> chat = model.chat(max_new_tokens=8)
        >>> reply = chat.send("Tell me about the sun.")
        >>> [message["role"] for message in chat.messages]
        ['user', 'model']
        """
        return Chat(self, system, max_length, when_full, **options)

    def _request(
        self, rows, max_length, max_new_tokens, stop_token_ids, stop, seed, sampling
    ) -> tuple[generating.Request, Any]:
        """What the arguments of `generate` ask for, and what makes the text of a row (`None` without a tokenizer)."""
        self.notice_adapters()
        config = self.backbone.config
        tokenizer = None if self.preprocessor is None else self.preprocessor.tokenizer
        bound = None if self.preprocessor is None else int(self.preprocessor.sequence_length)
        stop_ids = generating.stop_ids_of(stop_token_ids, tokenizer, config.vocabulary_size)
        limits = generating.limits_of(rows, config.context_length, bound, max_length, max_new_tokens)
        strings = generating.stop_strings_of(stop)
        generating.check_seed(seed)
        generating.check_names("generate", sampling, generating.SAMPLING_OPTIONS)
        if searches(self.sampler) and any(value is not None for value in sampling.values()):
            raise InputError(
                f"{type(self.sampler).__name__} chooses by itself: {', '.join(sorted(sampling))} has no place in it. "
                "Choose another sampler in `compile`."
            )
        chosen = sampling_of(self.sampler, sampling)
        if searches(self.sampler) or chosen.sampler is not None:
            check_sampler(self.sampler, config.vocabulary_size)
        # Refused here, before anything is run.
        chosen.values(config.vocabulary_size)
        if seed is None:
            seed = self._next_seed()
        request = generating.Request(rows, limits, stop_ids, chosen, generating.numbered(rows, int(seed)))
        if tokenizer is None:
            return request, None
        return request, lambda: TextAssembler(tokenizer, stop_ids, strings)

    def _next_seed(self) -> int:
        """Another for each call: from the sampler's own seed, or from what `keras.utils.set_random_seed` seeds."""
        own = getattr(self.sampler, "seed", None)
        if own is None:
            return int(np.random.randint(2**31))
        self._calls += 1
        return int(np.random.SeedSequence([int(own), self._calls]).generate_state(1)[0])

    @property
    def compilations(self) -> int:
        """How many programs generation has compiled, or traced, since the model was made or got adapters."""
        return self._engine.compilations

    @property
    def programs(self) -> Engine:
        """What the model runs besides `fit`, `evaluate` and `predict`, for the layers that it has now."""
        self.notice_adapters()
        return self._engine

    @property
    def _engine(self) -> Engine:
        if self._compiled_engine is None:
            self._compiled_engine = Engine(self.backbone)
        return self._compiled_engine

    def _searched(self, request):
        """What continues rows by the chosen sampler, if it is one that searches."""
        if not searches(self.sampler):
            return None
        if self._search is None:
            self._search = self._engine.program(functools.partial(search, self, self.sampler))

        def run(rows, room):
            counts = np.asarray([len(row) for row in rows], "int32")
            token_ids = np.zeros((len(rows), counts.max()), "int32")
            for i, row in enumerate(rows):
                token_ids[i, : len(row)] = row
            static = {"shape": token_ids.shape, "room": room, "stop_ids": request.stop_ids}
            return ops.convert_to_numpy(self._search(token_ids, counts, **static))

        return run

    def _require_one_token_at_a_time(self) -> None:
        if searches(self.sampler):
            raise InputError(
                f"{type(self.sampler).__name__} has no text until its end, so that it cannot stream: choose another "
                "sampler in `compile`, or call `generate`."
            )

    def _text(self, row: list[int]) -> str:
        tokenizer = self.preprocessor.tokenizer
        special = set(tokenizer.special_token_ids)
        return tokenizer.decode([i for i in row if i not in special])

    def generate_step(self, inputs, stop_token_ids=None):
        """Continue `{"token_ids": (B, L), "padding_mask": (B, L)}`, padded on the right, as KerasHub's tasks do.

        Returns:
            A dictionary of (B, L) NumPy arrays.
        """
        check_token_inputs(inputs, self.backbone.config.vocabulary_size)
        bare = type(self)(self.backbone)
        bare.compile(sampler=self.sampler)
        bare._compiled_engine = self._engine
        return bare.generate(inputs, stop_token_ids=stop_token_ids)

    def make_generate_function(self):
        """`generate_step`; the engine compiles what it runs by itself."""
        return self.generate_step


def _joined(batches: list[Any]) -> Any:
    """The batches of a dataset, or its single prompts, as one."""
    if batches and isinstance(batches[0], dict) and "prompts" not in batches[0]:
        return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    prompts: list[str] = []
    for batch in batches:
        texts = to_python(batch["prompts"] if isinstance(batch, dict) else batch)
        prompts += [texts] if isinstance(texts, str) else texts
    return prompts
