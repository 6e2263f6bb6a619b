"""Tokens to look at."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence

from gemma2_keras.preprocessing.tokenizer import Gemma2Tokenizer


class TokenView:
    """Tokens of one example as text, with what the loss counts marked.

    Printed, what counts stands between `⟦` and `⟧`; in a notebook it is highlighted. Control tokens have their names.

    Args:
        tokenizer: whose tokens they are.
        token_ids: the tokens.
        counted: for each of them, whether the loss counts it.

    Attributes:
        token_ids: as given.
        counted: as given.

    Example:

    >>> tokenizer = Gemma2Tokenizer.from_preset("gemma2_tiny_en")
    >>> TokenView(tokenizer, [2, *tokenizer.encode("The cat"), 1], [False, True, True, False])
    <bos>⟦The cat⟧<eos>
    """

    def __init__(self, tokenizer: Gemma2Tokenizer, token_ids: Sequence[int], counted: Sequence[bool]) -> None:
        self._tokenizer = tokenizer
        self.token_ids, self.counted = list(token_ids), list(counted)

    def parts(self) -> list[tuple[str, bool]]:
        """Stretches of text, and whether each counts."""
        pairs = zip(self.token_ids, self.counted, strict=True)
        return [
            (self._text([token_id for token_id, _ in part]), bool(counts))
            for counts, part in itertools.groupby(pairs, key=lambda pair: bool(pair[1]))
        ]

    def _text(self, token_ids: list[int]) -> str:
        control = {*self._tokenizer.special_token_ids}
        pieces = [
            self._tokenizer.id_to_token(i).encode() if i in control else self._tokenizer.token_bytes(i)
            for i in token_ids
        ]
        return b"".join(pieces).decode(errors="replace")

    def __repr__(self) -> str:
        return "".join(f"⟦{text}⟧" if counts else text for text, counts in self.parts())

    def _repr_html_(self) -> str:
        marked = (
            f"<mark>{html.escape(text)}</mark>" if counts else f'<span style="opacity: 0.6">{html.escape(text)}</span>'
            for text, counts in self.parts()
        )
        return f'<pre style="white-space: pre-wrap">{"".join(marked)}</pre>'
