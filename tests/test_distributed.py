"""PyTorch's distributed engine, in two processes on gloo; the checks are in `distributed_cases`."""

from __future__ import annotations

from collections.abc import Iterator

import distributed_cases
import pytest
from distributed_pair import Pair


class Pairs:
    """One pair for all tests, made again where one has died."""

    def __init__(self) -> None:
        self._pair: Pair | None = None

    def get(self) -> Pair:
        if self._pair is None or not self._pair.is_alive:
            self.close()
            self._pair = Pair()
        return self._pair

    def close(self) -> None:
        if self._pair is not None:
            self._pair.close()


@pytest.fixture(scope="module")
def pairs() -> Iterator[Pairs]:
    pairs = Pairs()
    yield pairs
    pairs.close()


@pytest.mark.parametrize("name", distributed_cases.CHECKS)
def test_on_two_ranks(name: str, pairs: Pairs) -> None:
    answers = pairs.get().run(name)
    assert not any(answers), "\n".join(f"rank {r}: {text}" for r, text in enumerate(answers))
