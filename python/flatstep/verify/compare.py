"""One case on bytes: the reference's arrays beside those of a kernel, guards included."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from flatstep import _core, reference
from flatstep._torch import Arguments, update_memory
from flatstep.verify.cases import FORMATS, Bits, Case, draw

GUARD = 64  # elements before and after each array that nobody may touch
CACHE_LINE = 64  # bytes
_UNTOUCHED = 0xA5A5A5A5A5A5A5A5


class Arena:
    """The arrays of a case in one block of memory, with guards before, between and after.

    A comparison of two blocks thus sees a wrong value, a gradient that was written and a write
    outside the arrays alike.
    """

    def __init__(self, case: Case):
        self.case = case
        self.format = FORMATS[case.dtype]
        self.size = case.size
        self.starts: dict[str, int] = {}
        end = 0
        for i, name in enumerate(("param", "grad", *case.variant.states)):
            aligned = -(-end // GUARD) * GUARD
            self.starts[name] = aligned + GUARD + i * case.numbers.shift % GUARD
            end = self.starts[name] + case.size + GUARD
        self.elements = end

    def block(self) -> Bits:
        """A block at a 64-byte aligned address, all guard."""
        itemsize = self.format.unsigned.itemsize
        raw = np.full(self.elements * itemsize + CACHE_LINE, _UNTOUCHED & 0xFF, np.uint8)
        skip = -raw.ctypes.data % CACHE_LINE
        return raw[skip : skip + self.elements * itemsize].view(self.format.unsigned)

    def array(self, block: Bits, name: str) -> Bits:
        """One array of a block, as bits."""
        start = self.starts[name]
        return block[start : start + self.size]

    def address(self, block: Bits, name: str) -> int:
        """Where an array of a block begins."""
        return int(block.ctypes.data) + self.starts[name] * self.format.unsigned.itemsize

    def place(self, at: int) -> tuple[str, int]:
        """The array that holds, or is nearest to, an element of a block, and the index in it."""

        def distance(name: str) -> int:
            index = at - self.starts[name]
            return max(-index, index - self.size + 1, 0)

        name = min(self.starts, key=distance)
        return name, at - self.starts[name]


class Expected:
    """What the reference makes of a case: the block before, and after each update."""

    def __init__(self, case: Case):
        self.case = case
        self.arena = arena = Arena(case)
        variant, form = case.variant, arena.format
        data = draw(case.dtype, case.size, case.setup, case.seed)
        self.hyper = case.numbers.values(variant.hyper)
        self.grads = data.grads
        self.start = arena.block()
        arena.array(self.start, "param")[:] = data.param
        for name, bits in zip(variant.states, data.states, strict=False):
            if "sq" in name:  # an average of squares
                bits = np.where(data.ordinary, bits & ~form.unsigned.type(form.sign), bits)
            arena.array(self.start, name)[:] = bits
        self.after: list[Bits] = []
        block = self.start
        for update, grad in enumerate(self.grads):
            block = block.copy()
            arena.array(block, "grad")[:] = grad
            reference.update(
                variant.rule,
                variant.flags,
                dict(zip(variant.hyper, self.hyper, strict=True)),
                arena.array(block, "param").view(form.storage),
                arena.array(block, "grad").view(form.storage),
                {name: arena.array(block, name).view(form.storage) for name in variant.states},
                step=case.numbers.step + update,
                scale=case.numbers.scale,
                dtype=case.dtype,
            )
            self.after.append(block)

    def before(self, update: int) -> Bits:
        """The block that an update begins with."""
        block = (self.after[update - 1] if update else self.start).copy()
        self.arena.array(block, "grad")[:] = self.grads[update]
        return block


@dataclass(frozen=True)
class Difference:
    """Where a kernel first left the reference."""

    update: int
    at: int  # in the block
    got: Bits  # the kernel's block
    count: int  # of elements that differ


class Kernel:
    """Runs the kernel in use, or the GPU's, on one case, in memory of its own."""

    def __init__(self, expected: Expected):
        self.expected = expected
        arena = expected.arena
        self.block = arena.block()
        self.grad = arena.array(self.block, "grad")
        self.addresses = [arena.address(self.block, name) for name in arena.starts]

    def first_difference(self, threads: int, *, on_gpu: bool = False) -> Difference | None:
        """Runs every update; None where each leaves the same bits as the reference."""
        expected, case = self.expected, self.expected.case
        self.block[:] = expected.start
        for update, values in enumerate(expected.grads):
            self.grad[:] = values
            if on_gpu:
                self._update_on_gpu(update)
            else:
                _core.update(*self._arguments(update, self.addresses), threads)
            differ = differences(self.block, expected.after[update], case.dtype)
            if differ.size:
                return Difference(update, int(differ[0]), self.block.copy(), differ.size)
        return None

    def _arguments(self, update: int, addresses: list[int]) -> Arguments:
        case = self.expected.case
        param, grad, *states = addresses
        return (
            case.variant.rule,
            case.variant.number,
            case.layout,
            param,
            grad,
            states,
            case.size,
            self.expected.hyper,
            case.numbers.step + update,
            case.numbers.scale,
        )

    def _update_on_gpu(self, update: int) -> None:
        """Guards and all: the block goes to the GPU and comes back."""
        host = torch.from_numpy(self.block.view(np.uint8))
        device = host.cuda()
        moved = device.data_ptr() - int(self.block.ctypes.data)
        arguments = self._arguments(update, [address + moved for address in self.addresses])
        update_memory(device.device, arguments)
        host.copy_(device)


def differences(got: Bits, expected: Bits, dtype: str) -> npt.NDArray[np.intp]:
    """The places where bits differ; NaN is NaN whatever its payload and sign."""
    places = np.flatnonzero(got != expected)
    both_nan = _is_nan(got[places], dtype) & _is_nan(expected[places], dtype)
    return places[~both_nan]


def _is_nan(bits: Bits, dtype: str) -> npt.NDArray[np.bool_]:
    form = FORMATS[dtype]
    magnitude = form.unsigned.type(form.sign - 1)
    return np.asarray((bits & magnitude) > form.infinity)
