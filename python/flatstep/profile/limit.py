"""The machine's limit: the memory traffic of an update without its arithmetic."""

from __future__ import annotations

import functools
import mmap
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from flatstep import _core
from flatstep._torch import zeros_flat


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


class Streams:
    """Arrays of zeros to be moved through memory, kept from one measurement to the next."""

    def __init__(self, size: int):
        """Arrays of ``size`` bytes each, made when they are first called for."""
        self.size = size
        self._arrays: dict[bool, list[torch.Tensor]] = {False: [], True: []}

    def traffic(self, states: int, pages: Pages) -> Callable[[], None]:
        """The traffic of an update: parameter, gradient and states read, all but one written back.

        Returns:
            A function that moves it once, on torch's number of threads.
        """
        param, grad = self._take(pages.params, 0, 2)
        kept = self._take(pages.states, 2, 2 + states)
        addresses = [array.data_ptr() for array in [param, *kept, grad]]
        return functools.partial(
            _core.traffic, addresses, 1 + states, self.size // 4, torch.get_num_threads()
        )

    def granted(self, pages: Pages) -> bool:
        """Whether the arrays lie on the pages that were wanted for them."""
        return all((huge_page_share(self._arrays[huge]) > 0.5) == huge for huge in set(pages))

    def _take(self, huge: bool, begin: int, end: int) -> list[torch.Tensor]:
        arrays = self._arrays[huge]
        while len(arrays) < end:
            arrays.append(zeros_flat(self.size // 4, torch.float32, huge_pages=huge).zero_())
        return arrays[begin:end]
