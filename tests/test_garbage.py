"""The garbage collector looks seldom while a command starts, and as usual while it trains."""

import gc
from collections.abc import Iterator

import pytest

from hf_stable import garbage


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def test_training_collects_as_often_as_python_does() -> None:
    gc.set_threshold(700, 10, 10)
    garbage.defer()
    assert gc.get_threshold()[0] > 10_000
    garbage.resume()
    assert gc.get_threshold() == (700, 10, 10)
    assert gc.get_freeze_count() > 10_000  # what was imported is looked at no more


def test_garbage_of_the_start_does_not_stay() -> None:
    class Cycle:
        gone = False

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            Cycle.gone = True

    garbage.defer()
    Cycle()
    garbage.resume()
    assert Cycle.gone


def test_a_caller_of_train_keeps_its_collector() -> None:
    frozen, thresholds = gc.get_freeze_count(), gc.get_threshold()
    garbage.resume()  # `train` outside of a command, where nothing was deferred
    assert (gc.get_freeze_count(), gc.get_threshold()) == (frozen, thresholds)
