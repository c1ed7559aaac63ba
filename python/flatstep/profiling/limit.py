"""The limit: the memory traffic of an update without its arithmetic."""

from __future__ import annotations

import functools
import itertools
import mmap
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from flatstep import _core
from flatstep._torch import HUGE_PAGE, zeros_flat

MOST_STREAMS = 5  # that the kernel for the limit moves at once; one of them is written
COPIED_AT_ONCE = 1 << 30  # bytes, far more than a GPU's caches hold


def bytes_moved(size: int, states: int) -> int:
    """What an update reads and writes: parameter, gradient and states; all but one are written.

    Args:
        size: Bytes of the parameters, and of the gradients, and of each state.
        states: How many states there are.
    """
    return size * ((2 + states) + (1 + states))


class Pages(NamedTuple):
    """Whether parameters and gradients, and states, lie on 2 MiB pages."""

    params: bool = False
    states: bool = False

    def __str__(self) -> str:
        params, states = (
            "2 MiB" if huge else f"{mmap.PAGESIZE >> 10} KiB" for huge in (self.params, self.states)
        )
        return params if params == states else f"{params} + {states}"


def huge_page_share(tensors: Iterable[torch.Tensor]) -> float:
    """The share of the tensors' bytes that lies on 2 MiB pages, as far as the system tells."""
    mappings = _mappings()
    starts = [start for start, _, _ in mappings]
    total, huge = 0, 0.0
    for tensor in tensors:
        begin = tensor.data_ptr()
        end = begin + tensor.nbytes
        total += tensor.nbytes
        place = max(0, bisect_right(starts, begin) - 1)
        while place < len(mappings) and starts[place] < end:
            start, stop, share = mappings[place]
            huge += max(0, min(stop, end) - max(start, begin)) * share
            place += 1
    return huge / total if total else 0.0


def _mappings() -> list[tuple[int, int, float]]:
    """Begin, end, and share on 2 MiB pages, of each piece of the process's memory."""
    try:
        text = Path("/proc/self/smaps").read_text()
    except OSError:
        return []
    mappings = []
    for line in text.splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = int(found[1], 16), int(found[2], 16)
        elif found := re.match(r"AnonHugePages: +(\d+) kB", line):
            mappings.append((start, end, 1024 * int(found[1]) / (end - start)))
    return mappings


class Moved(NamedTuple):
    """The bytes of a walk over memory, by where they lie and what becomes of them.

    Attributes:
        params: Read and written in parameters and gradients: both are counted.
        grads: Only read, in gradients.
        states: Read and written in states.
    """

    params: float = 0.0
    grads: float = 0.0
    states: float = 0.0


class Mix(NamedTuple):
    """How many streams stand for each kind of :class:`Moved`, and the bytes of each array."""

    params: int
    grads: int
    states: int
    size: int

    @property
    def nbytes(self) -> int:
        """Of all streams together, where they are cut out of one array."""
        return 4 * self.floats(self.size // 4) * (self.params + self.grads + self.states)

    @staticmethod
    def floats(count: int) -> int:
        """From the beginning of one stream to that of the next: at multiples of 64 bytes."""
        return -(-count // 16) * 16

    @staticmethod
    def of(moved: Moved) -> Mix:
        """The streams whose bytes divide most nearly as those that are moved."""

        def distance(counts: tuple[int, ...]) -> tuple[float, int, int]:
            bytes_of = [2 * counts[0], counts[1], 2 * counts[2]]
            shares = [own / sum(bytes_of) for own in bytes_of]
            wanted = [own / sum(moved) for own in moved]
            apart = sum(abs(a - b) for a, b in zip(shares, wanted, strict=True))
            return round(apart, 9), counts[2], -sum(counts)

        choices = itertools.product(range(MOST_STREAMS + 1), repeat=3)
        fitting = [c for c in choices if sum(c) <= MOST_STREAMS and c[0] + c[2] > 0]
        params, grads, states = min(fitting, key=distance)
        size = round(sum(moved) / (2 * params + grads + 2 * states))
        return Mix(params, grads, states, size)


class Traffic(Protocol):
    """Moves as many bytes as an update."""

    size: int

    def pages(self, params: Iterable[torch.Tensor], states: Iterable[torch.Tensor]) -> Pages | None:
        """The pages that parameters with gradients, and states, lie on, where that matters."""

    def kinds(self, found: Iterable[Pages | None]) -> list[Pages | None]:
        """The kinds of pages to measure the limit on, given those that were found."""

    def traffic(self, states: int, pages: Pages | None) -> Callable[[], None]:
        """A function that moves an update's bytes once."""

    def granted(self, pages: Pages | None) -> bool:
        """Whether the last traffic had the pages that were wanted for it."""


class Streams:
    """Arrays of zeros to be moved through memory, kept from one measurement to the next."""

    def __init__(self, size: int):
        """Arrays of ``size`` bytes each, made when they are first called for."""
        self.size = size
        self._arrays: dict[bool, list[torch.Tensor]] = {False: [], True: []}

    def pages(self, params: Iterable[torch.Tensor], states: Iterable[torch.Tensor]) -> Pages:
        """The pages that most of the memory lies on; small ones where none could be large."""
        if self.size < HUGE_PAGE:
            return Pages()
        return Pages(huge_page_share(params) > 0.5, huge_page_share(states) > 0.5)

    def kinds(self, found: Iterable[Pages | None]) -> list[Pages | None]:
        """Those that were found, and both extremes."""
        if self.size < HUGE_PAGE:
            return [Pages()]
        return list(dict.fromkeys([Pages(params=True, states=True), *found, Pages()]))

    def traffic(self, states: int, pages: Pages | None) -> Callable[[], None]:
        """The traffic of an update: parameter, gradient and states read, all but one written back.

        Returns:
            A function that moves it once, on torch's number of threads.
        """
        pages = pages or Pages()
        param, grad = self._take(pages.params, 0, 2)
        kept = self._take(pages.states, 2, 2 + states)
        addresses = [array.data_ptr() for array in [param, *kept, grad]]
        return functools.partial(
            _core.traffic, addresses, 1 + states, self.size // 4, torch.get_num_threads()
        )

    def walks(self, moved: Sequence[Moved], pages: Pages) -> Callable[[], None]:
        """The traffic of walks over arrays of several dtypes, one walk after the other.

        Up to five streams of floats stand for the arrays of a walk, as many as come nearest to its
        shares of what is only read and of what lies on the states' pages; their length gives the
        right sum of bytes. A kernel that only reads is not there: a fifth of the reading of such a
        walk's streams is written back.

        Returns:
            A function that moves it once, on torch's number of threads.
        """
        calls = []
        for walk in moved:
            mix = Mix.of(walk)
            count = mix.size // 4
            own = self._cut(pages.params, 0, mix.params + mix.grads, count)
            kept = self._cut(pages.states, len(own), mix.states, count)
            addresses = [
                array.data_ptr() for array in [*own[: mix.params], *kept, *own[mix.params :]]
            ]
            written, threads = mix.params + mix.states, torch.get_num_threads()
            calls.append(functools.partial(_core.traffic, addresses, written, count, threads))

        def move() -> None:
            for call in calls:
                call()

        return move

    def granted(self, pages: Pages | None) -> bool:
        """Whether the arrays lie on the pages that were wanted for them."""
        wanted = set(pages or Pages())
        return all((huge_page_share(self._arrays[huge]) > 0.5) == huge for huge in wanted)

    def _take(self, huge: bool, begin: int, end: int) -> list[torch.Tensor]:
        arrays = self._arrays[huge]
        while len(arrays) < end:
            arrays.append(zeros_flat(self.size // 4, torch.float32, huge_pages=huge).zero_())
        return arrays[begin:end]

    def _cut(self, huge: bool, begin: int, number: int, count: int) -> list[torch.Tensor]:
        """Streams of ``count`` floats out of the first array, after ``begin`` others."""
        if not self._arrays[huge]:
            self._arrays[huge] = [zeros_flat(self.size // 4, torch.float32, huge_pages=huge)]
        step = Mix.floats(count)
        starts = range(begin * step, (begin + number) * step, step)
        # What has never been written takes no memory, and none is moved where it is read.
        return [self._arrays[huge][0].narrow(0, start, count).zero_() for start in starts]


class Copies:
    """Copies from one place of a device's memory to another, where pages are nobody's concern."""

    def __init__(self, size: int, where: torch.device):
        """Of arrays of ``size`` bytes; the memory is taken when it is first called for."""
        self.size = size
        self._where = where
        self._memory: list[torch.Tensor] = []

    def pages(self, params: Iterable[torch.Tensor], states: Iterable[torch.Tensor]) -> None:
        """None: they are not known."""

    def kinds(self, found: Iterable[Pages | None]) -> list[Pages | None]:
        """One kind, without a name."""
        return [None]

    def traffic(self, states: int, pages: Pages | None = None) -> Callable[[], None]:
        """Copies of half an update's bytes: each byte is read once and written once.

        They are copies of :data:`COPIED_AT_ONCE` and of what remains, between the same two arrays.
        """
        half = bytes_moved(self.size, states) // 2
        needed = min(half, COPIED_AT_ONCE)
        if not self._memory or self._memory[0].nbytes < needed:
            self._memory = []
            for _ in range(2):
                self._memory.append(torch.zeros(needed, dtype=torch.uint8, device=self._where))
        source, target = self._memory
        whole, rest = divmod(half, COPIED_AT_ONCE)
        pieces = [COPIED_AT_ONCE] * whole + [rest] * (rest > 0)
        pairs = [(target[:piece], source[:piece]) for piece in pieces]

        def copy() -> None:
            for to, of in pairs:
                to.copy_(of)

        return copy

    def granted(self, pages: Pages | None) -> bool:
        """True: nothing in particular was wanted."""
        return True
