"""One case on bytes: the reference's arrays beside those of a kernel, guards included."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flatstep import _core, reference
from flatstep._torch import Arguments, update_memory
from flatstep.optim import gpu
from flatstep.verify.cases import FORMATS, GPU, SETUPS, Bits, Case, draw, draw_bits, format_of

GUARD = 64  # elements before and after each array that nobody may touch
CACHE_LINE = 64  # bytes
UNTOUCHED = 0xA5
SEED = 0x0123456789ABCDEF  # of chance
FIRST = 2**32 - 40  # number of an element, for chance: they go on at 0


class Arena:
    """The arrays of a case in one block of bytes, with guards before, between and after.

    A comparison of two blocks thus sees a wrong value, a gradient that was written and a write
    outside the arrays alike.
    """

    def __init__(self, case: Case):
        self.case = case
        self.size = case.size
        self.dtypes = case.form.arrays(case.variant.states)
        self.starts: dict[str, int] = {}  # in bytes
        end = 0
        for i, (name, dtype) in enumerate(self.dtypes.items()):
            itemsize = format_of(dtype).unsigned.itemsize
            aligned = -(-end // CACHE_LINE) * CACHE_LINE
            shifted = GUARD + i * case.numbers.shift % GUARD
            self.starts[name] = aligned + shifted * itemsize
            end = self.starts[name] + (case.size + GUARD) * itemsize
        self.bytes = end

    def block(self) -> Bits:
        """A block at a 64-byte aligned address, all guard."""
        raw = np.full(self.bytes + CACHE_LINE, UNTOUCHED, np.uint8)
        skip = -raw.ctypes.data % CACHE_LINE
        return raw[skip : skip + self.bytes]

    def array(self, block: Bits, name: str, before: int = 0, after: int = 0) -> Bits:
        """One array of a block, as bits, with so many elements of the guards."""
        unsigned = format_of(self.dtypes[name]).unsigned
        start = self.starts[name] - before * unsigned.itemsize
        end = self.starts[name] + (self.size + after) * unsigned.itemsize
        return block[start:end].view(unsigned)

    def stored(self, block: Bits, name: str) -> npt.NDArray[Any]:
        """One array of a block, as :mod:`flatstep.reference` takes it."""
        return self.array(block, name).view(format_of(self.dtypes[name]).storage)

    def address(self, block: Bits, name: str) -> int:
        """Where an array of a block begins."""
        return int(block.ctypes.data) + self.starts[name]

    def differences(self, got: Bits, expected: Bits) -> list[tuple[str, npt.NDArray[np.intp]]]:
        """The places in each array, guards included, at which two blocks differ."""
        if np.array_equal(got, expected):
            return []
        found = []
        for name, dtype in self.dtypes.items():
            ours, its = (self.array(block, name, GUARD, GUARD) for block in (got, expected))
            places = differences(ours, its, dtype)
            if places.size:
                found.append((name, places - GUARD))
        return found


class Expected:
    """What the reference makes of a case: the block before, and after each update."""

    def __init__(self, case: Case):
        self.case = case
        self.arena = arena = Arena(case)
        variant, form = case.variant, case.form
        self.hyper = case.numbers.values(variant.hyper)
        self.grads = draw(form.grad, *case.drawn).grads
        self.start = arena.block()
        arena.array(self.start, "param")[:] = draw(form.param, *case.drawn).param
        states = draw(form.state, *case.drawn)
        sign = format_of(form.state).sign
        for name, bits in zip(variant.states, states.states, strict=False):
            if "sq" in name:  # an average of squares
                bits = np.where(states.ordinary, bits & ~bits.dtype.type(sign), bits)
            arena.array(self.start, name)[:] = bits
        for name in arena.dtypes.keys() & {"master", "average"}:
            dtype = arena.dtypes[name]
            arena.array(self.start, name)[:] = (
                draw_bits(*case.drawn) if dtype == "int16" else draw(dtype, *case.drawn).states[-1]
            )
        self.after: list[Bits] = []
        block = self.start
        for update, grad in enumerate(self.grads):
            block = block.copy()
            arena.array(block, "grad")[:] = grad
            reference.update(
                variant.rule,
                variant.flags,
                dict(zip(variant.hyper, self.hyper, strict=True)),
                arena.stored(block, "param"),
                arena.stored(block, "grad"),
                {name: arena.stored(block, name) for name in variant.states},
                step=case.numbers.step + update,
                scale=case.numbers.scale,
                dtype=form.param,
                grad_dtype=form.grad,
                state_dtype=form.state,
                extras=self._extras(block, update),
            )
            self.after.append(block)

    def _extras(self, block: Bits, update: int) -> reference.Extras:
        form, numbers, arena = self.case.form, self.numbers(update), self.arena
        return reference.Extras(
            master=arena.stored(block, "master") if form.master else None,
            stochastic=form.chance,
            seed=numbers["seed"],
            step_count=numbers["count_of_step"],
            first=FIRST,
            average=arena.stored(block, "average") if form.average else None,
            average_decay=numbers["average_decay"],
            unscale=numbers["unscale"] if form.writes_grad else None,
        )

    def numbers(self, update: int) -> dict[str, Any]:
        """The numbers of what is done beside the rule, as ``_core.update`` takes them."""
        setup = self.case.numbers
        return {
            "unscale": abs(setup.scale),
            "average_decay": setup.hyper["beta1"],
            "seed": SEED,
            "count_of_step": setup.step + update,
            "first": FIRST,
        }

    def before(self, update: int) -> Bits:
        """The block that an update begins with."""
        block = (self.after[update - 1] if update else self.start).copy()
        self.arena.array(block, "grad")[:] = self.grads[update]
        return block


@dataclass(frozen=True)
class Difference:
    """Where a kernel first left the reference."""

    update: int
    array: str
    index: int  # below zero or from the size on: outside the array
    got: Bits  # the kernel's block
    count: int  # of elements that differ


@dataclass(frozen=True)
class NormCase:
    """A gradient whose norm is compared."""

    dtype: str
    size: int
    setup: int
    seed: int
    norm_type: float

    def gradient(self) -> Bits:
        """Its bits, away from an aligned address; in all setups but the first, finite."""
        form = FORMATS[self.dtype]
        drawn = draw(self.dtype, self.size, self.setup, self.seed).grads[0]
        is_finite = (drawn & form.unsigned.type(form.sign - 1)) < form.infinity
        shift = SETUPS[self.setup].shift
        bits = np.zeros(self.size + shift, form.unsigned)
        bits[shift:] = drawn if self.setup == 0 else np.where(is_finite, drawn, 0)
        return bits[shift:]

    def expected(self, gradient: Bits) -> float:
        """What the reference says: a sum of squares, or the largest magnitude."""
        stored = gradient.view(FORMATS[self.dtype].storage)
        return reference.norm_total([(stored, self.dtype)], self.norm_type)

    def got(self, gradient: Bits, threads: int) -> float:
        """What the kernel in use says."""
        largest = self.norm_type == math.inf
        arguments = [gradient.ctypes.data], [self.dtype], [self.size]
        return _core.norms(*arguments, largest, threads)[0]

    def got_on_gpu(self, gradient: Bits) -> float:
        """What torch's current GPU says, of a gradient as far from an aligned address."""
        shift = SETUPS[self.setup].shift * gradient.itemsize
        there = torch.empty(shift + gradient.nbytes, dtype=torch.uint8, device=GPU)
        there[shift:].copy_(torch.from_numpy(gradient.view(np.uint8).copy()))
        index, largest = torch.cuda.current_device(), self.norm_type == math.inf
        [norm] = gpu.norms([there.data_ptr() + shift], [self.dtype], [self.size], largest, index)
        return norm


class Kernel:
    """Runs the kernel in use, or the GPU's, on one case, in memory of its own."""

    def __init__(self, expected: Expected):
        self.expected = expected
        arena = expected.arena
        self.block = arena.block()
        self.grad = arena.array(self.block, "grad")
        self.addresses = {name: arena.address(self.block, name) for name in arena.starts}

    def first_difference(self, threads: int, *, on_gpu: bool = False) -> Difference | None:
        """Runs every update; None where each leaves the same bits as the reference."""
        expected = self.expected
        self.block[:] = expected.start
        for update, values in enumerate(expected.grads):
            self.grad[:] = values
            if on_gpu:
                self._update_on_gpu(update)
            else:
                self._update(update, threads)
            differ = expected.arena.differences(self.block, expected.after[update])
            if differ:
                name, places = differ[0]
                count = sum(places.size for _, places in differ)
                return Difference(update, name, int(places[0]), self.block.copy(), count)
        return None

    def _update(self, update: int, threads: int) -> None:
        arguments = self._arguments(update, self.addresses)
        _core.update(*arguments, threads, **self._beside(update, self.addresses))

    def _beside(self, update: int, addresses: dict[str, int]) -> dict[str, Any]:
        if self.expected.case.form.is_uniform:
            return {}
        places = {name: addresses.get(name, 0) for name in ("master", "average")}
        return {**self.expected.numbers(update), **places}

    def _arguments(self, update: int, addresses: dict[str, int]) -> Arguments:
        case = self.expected.case
        return (
            case.variant.rule,
            case.variant.number | case.form.bits,
            case.layout,
            addresses["param"],
            addresses["grad"],
            [addresses[name] for name in case.variant.states],
            case.size,
            self.expected.hyper,
            case.numbers.step + update,
            case.numbers.scale,
        )

    def _update_on_gpu(self, update: int) -> None:
        """Guards and all: the block goes to the GPU and comes back."""
        host = torch.from_numpy(self.block)
        device = host.cuda()
        moved = device.data_ptr() - int(self.block.ctypes.data)
        addresses = {name: address + moved for name, address in self.addresses.items()}
        beside = self._beside(update, addresses)
        update_memory(device.device, self._arguments(update, addresses), **beside)
        host.copy_(device)


def differences(got: Bits, expected: Bits, dtype: str) -> npt.NDArray[np.intp]:
    """The places where bits differ; NaN is NaN whatever its payload and sign."""
    places = np.flatnonzero(got != expected)
    if dtype not in FORMATS:
        return places
    both_nan = _is_nan(got[places], dtype) & _is_nan(expected[places], dtype)
    return places[~both_nan]


def _is_nan(bits: Bits, dtype: str) -> npt.NDArray[np.bool_]:
    form = FORMATS[dtype]
    magnitude = form.unsigned.type(form.sign - 1)
    return np.asarray((bits & magnitude) > form.infinity)
