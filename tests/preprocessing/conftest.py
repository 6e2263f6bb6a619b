from __future__ import annotations

import pytest

from gemma2_keras import Gemma2Tokenizer
from tests.preprocessing import tiny


@pytest.fixture(scope="session")
def tokenizer() -> Gemma2Tokenizer:
    return tiny.tokenizer()
