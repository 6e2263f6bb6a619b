"""How long to work before the caller is heard again."""

from __future__ import annotations

import math


class Pace:
    """How many steps to run at once, so that they take about as long as the caller may wait.

    Args:
        most: most steps.
        pause: seconds.

    Attributes:
        steps: how many to run next: one, as long as nothing is known of how long it takes and that matters.
    """

    def __init__(self, most: int, pause: float) -> None:
        self.most = most
        self.steps = most if pause == math.inf else 1
        self._pause = pause

    def note(self, steps: int, seconds: float) -> None:
        """So many steps took so long."""
        wanted = steps * self._pause / max(seconds, 1e-9)
        self.steps = self.most if wanted >= self.most else max(1, int(wanted))
