from __future__ import annotations

import pytest

from gemma2_keras import Gemma2CausalLM
from tests.tasks.sharp import sharpened


@pytest.fixture(scope="session")
def sharp() -> Gemma2CausalLM:
    """Not to be trained or compiled anew: its compiled functions serve many tests."""
    return sharpened()


@pytest.fixture(scope="session")
def bare(sharp) -> Gemma2CausalLM:
    """The same without a preprocessor."""
    return Gemma2CausalLM(sharp.backbone)
