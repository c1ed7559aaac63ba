"""Calls of a plan in any order, with objects that make no sense: it raises, and never crashes.

`tools/fuzz.sh` runs this under libFuzzer, by way of Atheris. Addresses given as numbers are taken
at their word and are left out, and so is what changes memory between matches() and step(), which
an optimizer calls with nothing in between.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import atheris
import torch
from torch import Tensor
from torch.nn import Parameter

from flatstep import _core

REFUSED = (ValueError, TypeError, RuntimeError, IndexError, OverflowError, AttributeError, KeyError)
RULES = [rule["name"] for rule in _core.rules()]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int16]
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (7,), (3, 5), (2, 1, 4), (1,) * 7, (70_000,)]
NUMBERS = [
    0,
    1,
    2,
    -1,
    255,
    2**31 - 1,
    -(2**31),
    2**32 - 1,
    2**32,
    2**63,
    2**64,
    2**70,
    0.5,
    None,
    "x",
]
HYPER = [0.1, 0.0, -1.0, math.nan, math.inf, -math.inf, 1e308, 5e-324, None, "lr", 2**2000]

# pybind11's TypeError shows the arguments, and torch's text of a freed tensor reads freed memory.
Tensor.__repr__ = object.__repr__  # type: ignore[method-assign, assignment]


class Calling(Tensor):
    """A tensor that calls whatever it was told to when it is asked for its gradient."""

    calls: Callable[[], object] | None = None

    @property
    def grad(self) -> Any:
        if self.calls is not None:
            self.calls()
        return None


def freed(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


def misaligned(x: Tensor) -> Tensor:
    raw = torch.zeros(x.nbytes + 16, dtype=torch.uint8)
    return torch.frombuffer(raw.numpy().data, dtype=x.dtype, offset=1, count=x.numel()).view(
        x.shape
    )


MAKE: list[Callable[[Tensor], Any]] = [
    lambda x: x,
    lambda x: Parameter(x) if x.is_floating_point() or x.is_complex() else x,
    freed,
    lambda x: misaligned(x) if x.numel() else x,
    lambda x: x.to("meta"),
    lambda x: x.to_sparse(),
    lambda x: x.expand(3, *x.shape),
    lambda x: x.t() if x.dim() == 2 else x[::2] if x.dim() == 1 else x,
    lambda x: x.conj() if x.is_complex() else torch._neg_view(x),
    lambda x: x.as_subclass(Calling),
    lambda x: torch._C._functorch._add_batch_dim(x, 0, 1) if x.dim() else x,
    lambda x: x.numpy(force=True),
    lambda x: None,
    lambda x: object(),
    lambda x: Tensor,
]

CHANGE: list[Callable[[Tensor], Any]] = [
    lambda x: x.data.resize_(0),
    lambda x: x.data.resize_(x.numel() + 9),
    lambda x: x.data.untyped_storage().resize_(0),
    lambda x: setattr(x, "data", torch.ones(3, dtype=torch.float64)),
    lambda x: setattr(x, "data", torch.zeros_like(x.data)),
    lambda x: setattr(x, "grad", None),
    lambda x: setattr(x, "grad", torch.ones_like(x)),
    lambda x: x.grad.data.resize_(1) if x.grad is not None else None,
    lambda x: x.data.unsqueeze_(0),
    lambda x: x.data.fill_(math.nan) if x.untyped_storage().nbytes() else None,
]


class Session:
    """A plan, and what it may have been told of."""

    def __init__(self, data: atheris.FuzzedDataProvider) -> None:
        self.data = data
        self.flags: Any = [0]
        self.rule = self.pick(RULES)
        self.names = next(rule for rule in _core.rules() if rule["name"] == self.rule)
        self.plan = _core.Plan(self.rule)
        self.groups: Any = [{"params": []}]
        self.state: Any = {}
        self.things: list[Any] = []
        self.depth = 0

    def pick(self, among: list[Any]) -> Any:
        return among[self.data.ConsumeIntInRange(0, len(among) - 1)]

    def number(self, usual: Any) -> Any:
        return usual if self.data.ConsumeIntInRange(0, 7) else self.pick(NUMBERS)

    def tensor(self) -> Any:
        dtype, shape = self.pick(DTYPES), self.pick(SHAPES)
        x = torch.ones(shape, dtype=dtype)
        return MAKE[self.data.ConsumeIntInRange(0, len(MAKE) - 1)](x)

    def good(self) -> Parameter:
        dtype, shape = self.pick(DTYPES[:4]), self.pick(SHAPES)
        param = Parameter(torch.ones(shape, dtype=dtype))
        if self.data.ConsumeIntInRange(0, 5):
            param.grad = torch.ones_like(param)
        return param

    def begin(self) -> None:
        variants = [flags for flags, _ in self.names["variants"]]
        bits = [0, 0, 0, *_core.EXTRAS.values()]
        self.flags = [
            self.number(self.pick(variants) | self.pick(bits))
            for _ in range(self.data.ConsumeIntInRange(0, 2))
        ]
        self.groups = [{"params": []} for _ in self.flags]
        self.state = {}
        self.plan.begin(self.flags)

    def add(self) -> None:
        param: Any = self.good() if self.data.ConsumeIntInRange(0, 3) else self.tensor()
        group = self.number(max(len(self.groups) - 1, 0))
        flags = self.flags[group]
        names = dict(self.names["variants"]).get(flags & 0xFF, ())
        wide = {torch.float64: torch.float64}.get(param.dtype, torch.float32)
        states = {name: torch.zeros_like(param, requires_grad=False) for name in names}
        if flags & _core.EXTRAS["master_copy"]:
            states["master"] = torch.ones_like(param, dtype=wide, requires_grad=False)
        if flags & _core.EXTRAS["master_split"]:
            states["master_low"] = torch.ones_like(param, dtype=torch.int16, requires_grad=False)
        if flags & _core.EXTRAS["average"]:
            states["average"] = torch.ones_like(param, dtype=wide, requires_grad=False)
        step = torch.tensor(0.0)
        if not self.data.ConsumeIntInRange(0, 5):
            step = self.pick([None, torch.tensor(math.nan), torch.ones(2), 3, self.tensor()])
        if states and not self.data.ConsumeIntInRange(0, 5):
            states[self.pick(list(states))] = self.tensor()
        self.things += [param, *states.values(), step]
        self.groups[group]["params"].append(param)
        given = list(states.values())
        self.plan.add(
            group, param, given, step, self.pick([True, False, None]), self.cleared(param)
        )
        self.state[param] = {**({} if step is None else {"step": step}), **states}

    def cleared(self, param: Any) -> Any:
        return self.pick([None, None, None, param.grad, param, 3])

    def add_other(self) -> None:
        param = self.tensor()
        group = self.number(max(len(self.groups) - 1, 0))
        self.things.append(param)
        self.groups[group]["params"].append(param)
        self.plan.add_other(group, param, self.pick([True, False]))

    def end(self) -> None:
        states = [self.state, self.state, self.state, {1: 2}, {None: None}, {"x": []}, None]
        self.plan.end(self.pick(states))

    def update(self) -> None:
        """As an optimizer's step does it: nothing between the match and the update."""
        groups = self.pick([self.groups] * 6 + [[], None, [None], [{}], [{"params": [1, None]}]])
        if not self.plan.matches(groups, self.state, self.flags):
            return
        count = len(self.names["hyper"])
        odd = not self.data.ConsumeIntInRange(0, 3)
        hyper = [[self.pick(HYPER) if odd else 0.1 for _ in range(count)] for _ in self.flags]
        scales = [self.pick(HYPER) if odd else 1.0 for _ in self.flags]
        if odd and not self.data.ConsumeIntInRange(0, 2):
            hyper = hyper * 2
        extras = [(1.0, 0.9, self.number(3), -1.0) for _ in self.flags]
        threads = self.number(2)
        if self.data.ConsumeBool():
            self.plan.norm(
                self.data.ConsumeBool(), [1.0] * self.data.ConsumeIntInRange(0, 3), threads
            )
        self.plan.updated()
        self.plan.step(hyper, scales, threads, {}, self.pick([extras, [], extras * 2]))

    def change(self) -> None:
        if self.things:
            self.pick(CHANGE)(self.pick(self.things))

    def mutate(self) -> None:
        """Changes a group or a state from another place."""
        if not self.groups:
            return
        params = self.pick(self.groups)["params"]
        self.pick(
            [
                params.clear,
                params.reverse,
                self.groups.clear,
                self.state.clear,
                lambda: params.append(None),
                lambda: self.groups.append({"params": params}),
                lambda: params.pop(),
            ]
        )()

    def forget(self) -> None:
        """Lets go of everything, so that the plan may hold the last references."""
        for thing in self.things:
            if isinstance(thing, Tensor) and thing.grad is not None and not self.depth:
                weakref.finalize(thing.grad, self.again)
        self.things.clear()
        self.state.clear()
        for group in self.groups:
            group["params"].clear()

    def again(self) -> None:
        """A call from inside a call."""
        if self.depth < 2:
            self.depth += 1
            try:
                self.call()
            finally:
                self.depth -= 1

    def arm(self) -> None:
        for thing in self.things:
            if isinstance(thing, Calling):
                thing.calls = self.pick([self.again, self.mutate, self.plan.release])

    def release(self) -> None:
        self.plan.release()
        self.plan.devices()

    def early(self) -> None:
        """What must follow a match, without one."""
        self.plan.release()
        for call in (
            lambda: self.plan.step([], [], 1),
            lambda: self.plan.norm(False, [], 1),
            lambda: self.plan.norm_room(self.number(0)),
            self.plan.updated,
        ):
            try:
                call()
            except RuntimeError:
                continue
            raise AssertionError("a call without a match was taken")

    def call(self) -> None:
        calls = [
            *[self.add] * 5,
            *[self.update] * 5,
            *[self.end] * 2,
            self.begin,
            self.add_other,
            self.change,
            self.mutate,
            self.forget,
            self.arm,
            self.release,
        ]
        if not self.depth:
            calls.append(self.early)
        try:
            self.pick(calls)()
        except REFUSED:
            return


def run_one(raw: bytes) -> None:
    data = atheris.FuzzedDataProvider(raw)
    session = Session(data)
    try:
        session.begin()
    except REFUSED:
        return
    while data.remaining_bytes():
        session.call()
    session.depth = 2  # what goes now calls no more


if __name__ == "__main__":
    for name, method in list(vars(Session).items()):
        if callable(method):
            setattr(Session, name, atheris.instrument_func(method))
    atheris.Setup(sys.argv, run_one)
    atheris.Fuzz()
