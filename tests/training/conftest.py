from __future__ import annotations

import keras
import pytest
from keras import ops

from tests.training import small


class Runs:
    """One model, brought back to its beginning before each run, so that it is compiled once."""

    def __init__(self, lora: bool) -> None:
        self.model = small.model(lora)
        self.model.optimizer.build(self.model.trainable_variables)
        self._first = [(v, ops.convert_to_numpy(v).copy()) for v in self._variables()]
        # Building draws random numbers on PyTorch.
        self.model.fit(small.data(2), verbose=0)

    def _variables(self):
        return [*self.model.variables, *self.model.optimizer.variables]

    def fresh(self):
        """The model as it was at first."""
        for variable, value in self._first:
            variable.assign(value)
        keras.utils.set_random_seed(3)
        return self.model

    def weights(self):
        return [ops.convert_to_numpy(v).copy() for v in self.model.trainable_variables]


@pytest.fixture(scope="session")
def adapters() -> Runs:
    return Runs(lora=True)


@pytest.fixture(scope="session")
def whole_model() -> Runs:
    return Runs(lora=False)
