"""How many steps are run at once."""

import pytest

from gemma2_keras.generation.pace import Pace


@pytest.mark.once
def test_a_pace_follows_how_long_steps_take():
    assert Pace(8, float("inf")).steps == 8
    pace = Pace(8, 0.03)
    assert pace.steps == 1
    for steps, seconds, expected in (
        (1, 20.0, 1),
        (1, 0.01, 3),
        (3, 0.009, 8),
        (8, 0.048, 5),
        (5, 0.0, 8),
        (8, 1.0, 1),
    ):
        pace.note(steps, seconds)
        assert pace.steps == expected
