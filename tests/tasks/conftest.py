from __future__ import annotations

import pytest

from gemma2_keras import Gemma2CausalLM
from tests.preprocessing import tiny


@pytest.fixture(scope="session")
def model() -> Gemma2CausalLM:
    """Not to be trained or compiled anew: its compiled functions serve many tests."""
    return tiny.causal_lm()
