"""Where a case builds optimizers, steps them, and holds them against the truth."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from flatstep.conformance.results import Evidence
from flatstep.conformance.truth import DEFAULTS, Truth, bits_of, name_of, value_of
from flatstep.subjects import Subject
from flatstep.verify.cases import FORMATS

GUARD = 7.0  # what lies around a parameter that is a view

# What cases ask for where neither they nor the user say otherwise. The updates are a few hundredths
# of the parameters, so that they show in 16 bits and no parameter crosses zero, where a distance in
# ULP says little; eps is one that float16 can hold.
USUAL: dict[str, dict[str, Any]] = {
    "adam": {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-3},
    "adamw": {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1},
    "rmsprop": {"lr": 0.01, "alpha": 0.9, "eps": 1e-3},
    "sgd": {"lr": 0.05, "momentum": 0.9},
}


class NotOfferedError(Exception):
    """The optimizer has no such option."""


class WrongError(Exception):
    """The optimizer did something else than its rule says."""

    def __init__(self, evidence: Evidence) -> None:
        super().__init__(evidence.what)
        self.evidence = evidence


class IgnoredError(WrongError):
    """The optimizer took an option that then changed nothing."""


class RaisedError(Exception):
    """The optimizer, or torch on its behalf, raised an exception.

    Args:
        doing: What it was asked to do.
        cause: What it raised.
        unchanged: Whether parameters and states are as before.
        step: In which step, or after which.
    """

    def __init__(self, doing: str, cause: Exception, unchanged: bool, step: int) -> None:
        super().__init__(str(cause))
        self.doing = doing
        self.cause = cause
        self.unchanged = unchanged
        self.step = step


class Lab:
    """What a case works with: the subject, a dtype, a size.

    Args:
        subject: The optimizer under test.
        dtype: Of the parameters.
        size: The number of elements, or of rows, of a parameter.
        on_step: Called with the number of a step before it is made.
    """

    def __init__(
        self,
        subject: Subject,
        dtype: torch.dtype,
        size: int,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.subject = subject
        self.rule = subject.rule
        self.dtype = dtype
        self.size = size
        self.on_step = on_step
        self.ulp = 0

    def values(self, *shape: int, index: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Weights between 1 and 2 in size, of either sign."""
        generator = torch.Generator().manual_seed(index)
        size = 1 + torch.rand(shape, generator=generator, dtype=torch.float64)
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return (size * sign).to(dtype or self.dtype)

    def param(self, *shape: int, index: int = 0, dtype: torch.dtype | None = None) -> Parameter:
        """A contiguous parameter of such values; of ``size`` elements where no shape is given."""
        return Parameter(self.values(*(shape or (self.size,)), index=index, dtype=dtype))

    def gradient(self, param: Tensor, step: int, index: int = 0) -> Tensor:
        """A contiguous gradient between a quarter and one in size, of either sign."""
        generator = torch.Generator().manual_seed(1000 * step + index + 1)
        shape = tuple(param.shape)
        size = 0.25 + 0.75 * torch.rand(shape, generator=generator, dtype=torch.float64)
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return (size * sign).to(param.dtype)

    def options(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """A case's options, over the user's, over the usual ones."""
        return {**USUAL[self.rule], **self.subject.options, **wanted}

    def run(self, params: Sequence[Parameter], **wanted: Any) -> Run:
        """An optimizer over parameters, beside their truths."""
        return self.run_groups([(params, {})], **wanted)

    def run_groups(
        self, groups: Sequence[tuple[Sequence[Parameter], Mapping[str, Any]]], **wanted: Any
    ) -> Run:
        """An optimizer over groups of parameters with options of their own.

        Raises:
            NotOfferedError: The optimizer's signature has not what the case asks for.
        """
        usual = dict(USUAL[self.rule])
        for name in list(usual):
            if not self.subject.accepts(name):
                del usual[name]
        for name in wanted:
            if not self.subject.accepts(name):
                raise NotOfferedError(f"it has no option '{name}'")
        while True:
            options = {**usual, **self.subject.options, **wanted}
            given = [{"params": list(params), **own} for params, own in groups]
            if len(given) == 1 and len(given[0]) == 1:
                given = given[0]["params"]
            try:
                optimizer = self.subject(given, **options)
            except TypeError as error:
                unknown = unknown_option(error)
                if unknown in wanted:
                    raise NotOfferedError(f"it has no option '{unknown}'") from None
                if unknown in usual:
                    del usual[unknown]
                    continue
                raise RaisedError("building it", error, unchanged=True, step=0) from error
            except Exception as error:
                raise RaisedError("building it", error, unchanged=True, step=0) from error
            return Run(self, optimizer, [(list(p), {**options, **own}) for p, own in groups])


def unknown_option(error: TypeError) -> str:
    """The name of the option that a signature has not, if that is what an error says, or ""."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return found[1] if found else ""


class Run:
    """An optimizer and the truths of its parameters.

    Args:
        lab: Of the case.
        optimizer: Under test.
        groups: Its parameters with the options that hold for them.
    """

    def __init__(
        self,
        lab: Lab,
        optimizer: torch.optim.Optimizer,
        groups: Sequence[tuple[list[Parameter], dict[str, Any]]],
    ) -> None:
        self.lab = lab
        self.optimizer = optimizer
        self.params: list[Parameter] = []
        self.options: list[dict[str, Any]] = []
        self.truths: list[Truth] = []
        self.steps = 0
        self.guards: list[tuple[Tensor, Tensor, Tensor]] = []
        for params, options in groups:
            self.add(params, options)

    def add(self, params: Sequence[Parameter], options: Mapping[str, Any]) -> None:
        """Follows further parameters."""
        for param in params:
            self.params.append(param)
            self.options.append(dict(options))
            self.truths.append(Truth(self.lab.rule, param))

    def guard(self, storage: Tensor, view: Tensor) -> None:
        """Watches what of ``storage`` is outside ``view``, from now on."""
        outside = torch.ones(storage.numel(), dtype=torch.bool)
        shape, stride = tuple(view.shape), view.stride()
        outside.as_strided(shape, stride, view.storage_offset()).fill_(False)
        self.guards.append((storage, outside, storage.detach().clone()))

    def set(self, **options: Any) -> None:
        """Changes options of every group, and of the truths."""
        for group in self.optimizer.param_groups:
            group.update(options)
        for known in self.options:
            known.update(options)

    def follow_groups(self) -> None:
        """Takes the truths' options from the optimizer's groups, which a scheduler has changed."""
        place = 0
        for group in self.optimizer.param_groups:
            for _ in group["params"]:
                known = {name: group[name] for name in DEFAULTS[self.lab.rule] if name in group}
                self.options[place].update(known)
                place += 1

    def give(self, grads: Sequence[Tensor | None] | None = None) -> None:
        """Gives every parameter its gradient for the next step, or those that are listed."""
        for index, param in enumerate(self.params):
            param.grad = (
                self.lab.gradient(param, self.steps, index) if grads is None else grads[index]
            )

    def step(self, grads: Sequence[Tensor | None] | None = None, *, check: bool = True) -> None:
        """Gives gradients, steps optimizer and truths, and compares them."""
        self.give(grads)
        self.advance([param.grad for param in self.params])
        with self.doing("step()"):
            self.optimizer.step()
        if check:
            self.check()

    def advance(self, grads: Sequence[Tensor | None]) -> None:
        """Steps the truths of the parameters that have a gradient."""
        self.steps += 1
        self.lab.on_step(self.steps)
        for truth, grad, options in zip(self.truths, grads, self.options, strict=True):
            if grad is not None:
                truth.advance(grad, options)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Says what an exception interrupted, and whether anything had changed."""
        before = self.snapshot()
        try:
            yield
        except (NotOfferedError, WrongError, RaisedError):
            raise
        except Exception as error:
            unchanged = len(self.snapshot()) == len(before) and not self.changed_since(before)
            raise RaisedError(what, error, unchanged, self.steps) from error

    def snapshot(self) -> list[tuple[str, Tensor]]:
        """Copies of parameters and states, each with a name."""
        return [(name, x.detach().clone()) for name, x in self.tensors()]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and states, each with a name."""
        for index, param in enumerate(self.params):
            yield f"parameter {index}", param
        for index, param in enumerate(self.params):
            for name, x in dict(self.optimizer.state.get(param, {})).items():
                if isinstance(x, Tensor):
                    yield f"state '{name}' of parameter {index}", x

    def changed_since(self, before: list[tuple[str, Tensor]]) -> str | None:
        """The name of what is not as it was; a new state does not count."""
        now = dict(self.tensors())
        for name, old in before:
            new = now.get(name)
            if new is None or new.shape != old.shape or not same_bits(new, old):
                return name
        return None

    def check(self) -> None:
        """Compares parameters with their truths, and what is around them with what was there.

        Raises:
            WrongError: They differ by more than a careful implementation may.
        """
        for storage, outside, before in self.guards:
            self._check_guard(storage, outside, before)
        for param, truth in zip(self.params, self.truths, strict=True):
            distance = truth.distance(param)
            if distance.wrong:
                self.fail(
                    "a parameter is not what the rule says",
                    param,
                    at=distance.wrong[0],
                    expected=truth.expected(),
                    allowed=distance.allowed,
                    count=len(distance.wrong),
                )
            self.lab.ulp = max(self.lab.ulp, distance.ulp)

    def _check_guard(self, storage: Tensor, outside: Tensor, before: Tensor) -> None:
        flat, old = storage.detach().reshape(-1), before.reshape(-1)
        changed = outside & (flat != old)
        if changed.any():
            at = int(changed.nonzero()[0])
            what = "it writes outside the parameter: the index is one of the storage around it"
            self.fail(what, storage, at=at, expected=old, count=int(changed.sum()))

    def fail(
        self,
        what: str,
        param: Tensor | None = None,
        *,
        at: int | None = None,
        expected: Tensor | None = None,
        allowed: float | None = None,
        count: int = 0,
        kind: type[WrongError] = WrongError,
    ) -> None:
        """Raises what a case found.

        Args:
            what: One sentence.
            param: In which it was found.
            at: The place of the element, in the order of the indices.
            expected: What there should be, flat.
            allowed: How far it may be from the exact result.
            count: How many elements are wrong.
            kind: Of error.
        """
        evidence = Evidence(what, step=self.steps, allowed=allowed, count=count)
        if param is not None:
            evidence.shape, evidence.stride = list(param.shape), list(param.stride())
            if at is not None:
                evidence.index = [int(i) for i in unravel(at, param.shape)]
                evidence.got = value_of(param.detach().reshape(-1)[at : at + 1])
                if expected is not None:
                    evidence.expected = value_of(expected[at : at + 1])
        raise kind(evidence)


def unravel(place: int, shape: Sequence[int]) -> list[int]:
    """The indices of an element that is at a place in their order."""
    indices = []
    for length in reversed(shape):
        place, index = divmod(place, length)
        indices.append(index)
    return indices[::-1]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN and all."""
    if a.dtype != b.dtype:
        return False
    if name_of(a.dtype) in FORMATS:
        return bool((bits_of(a) == bits_of(b)).all())
    return torch.equal(a, b)
