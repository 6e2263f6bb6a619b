from __future__ import annotations

import pytest

from gemma2_keras.preprocessing.token_view import TokenView

pytestmark = pytest.mark.once


def test_characters_of_several_tokens_stay_whole_and_markup_is_escaped(tokenizer):
    ids = [2, *tokenizer.encode("🐈<b>")]
    view = TokenView(tokenizer, ids, [False] + [True] * (len(ids) - 1))
    assert repr(view) == "<bos>⟦🐈<b>⟧"
    assert view.parts() == [("<bos>", False), ("🐈<b>", True)]
    html = view._repr_html_()
    assert "<mark>🐈&lt;b&gt;</mark>" in html
    assert "&lt;bos&gt;" in html
    assert view.token_ids == ids
    assert sum(view.counted) == len(ids) - 1
