"""How an optimizer finds its parameters' ways, and the memory of what it updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from flatstep import _core, flat
from flatstep._torch import connect_dtensor
from flatstep.optim import extras, gpu, sharding, states
from flatstep.optim.routes import Found, Route, grad_of, layout_of, local_of, overlapping, route_of
from flatstep.optim.states import Wanted
from flatstep.optim.table import Other, Table

# The states of each of a rule's variants.
VARIANTS: dict[str, dict[int, tuple[str, ...]]] = {
    rule["name"]: dict(rule["variants"]) for rule in _core.rules()
}


class Finding:
    """The part of an optimizer that fills its table."""

    rule: ClassVar[str]
    sparse_message: ClassVar[str | None]  # of the error; None where sparse gradients are fine
    counts_steps: ClassVar[bool] = True  # whether torch's state has a "step"

    param_groups: list[dict[str, Any]]
    state: Any
    _elements_before = 0  # of parameters in front of this optimizer's, for chance
    _make_plan: Callable[[str], _core.Plan] = _core.Plan  # a recording has its own
    _gather: bool  # whether states are to be moved into new flat buffers
    _table: Table | None
    _fresh: dict[torch.Tensor, torch.Tensor]  # not 0 where a graph's next step is the first

    def _label(self, group: int, place: int) -> str:
        names = self.param_groups[group].get("param_names")
        if names:
            return f"parameter '{names[place]}'"
        return f"parameter {place} of group {group}"

    def _find(self) -> list[Found]:
        everything, first = [], self._elements_before
        for index, group in enumerate(self.param_groups):
            for place, param in enumerate(group["params"]):
                label = self._label(index, place)
                everything.append(
                    Found(param, label, index, first + sharding.first_element_of(param))
                )
                first += param.numel()
        return everything

    def _route(self, found: Found) -> Route:
        route = route_of(found, differentiable=self.param_groups[found.group]["differentiable"])
        if route is Route.SPARSE and self.sparse_message is not None:
            raise RuntimeError(self.sparse_message)
        return route

    def _counts(self, found: Found) -> bool:
        return self.counts_steps or extras.counts_steps(self.param_groups[found.group])

    def _step_device(self, found: Found) -> torch.device | None:
        """Where torch keeps the parameter's step: on its GPU where nobody may wait for it."""
        if not self._counts(found):
            return None
        group = self.param_groups[found.group]
        device = found.param.device
        on_gpu = device.type == "cuda" and (group.get("capturable") or group.get("fused"))
        return device if on_gpu else torch.device("cpu")

    def _others_moved(self, table: Table) -> bool:
        return any(
            self._route(other.found) not in (other.route, Route.KERNEL)
            or (
                other.route is Route.ALONE
                and states.are_foreign(self.state.get(other.found.param, {}), other.states)
            )
            for other in table.others
            if other.found.param.grad is not None
        )

    def _build(self, flags: list[int]) -> Table:
        """Finds every parameter's way and fills a plan. Raises before anything has changed."""
        self._table = None
        connect_dtensor()
        everything = self._find()
        if any(found.param.device.type == "cuda" for found in everything):
            gpu.warn_if_absent()
        routes = {found: self._route(found) for found in everything if found.param.grad is not None}
        plain = [found for found, route in routes.items() if route in (Route.KERNEL, Route.ALONE)]
        for place in overlapping([local_of(found.param) for found in plain]):
            routes[plain[place]] = Route.ALONE  # one after the other, as torch would
        wanted = {
            found: self._wanted(found, flags[found.group])
            for found, route in routes.items()
            if route is not Route.SPARSE
        }
        for found, of in wanted.items():
            state = self.state.get(found.param, {})
            states.check(state, found, of)
            if routes[found] is not Route.TORCH and (
                states.are_foreign(state, of)
                or layout_of(found.param, grad_of(found.param), of.dtypes[0] if of.rule else None)
                is None
            ):
                routes[found] = Route.TORCH
        for found, route in routes.items():
            group = self.param_groups[found.group]
            extras.validate_param(group, found.param, found.name)
            if route in (Route.TORCH, Route.SPARSE):
                extras.refuse(group, found.name)
        before = states.Before(self.state, [found.param for found in wanted])
        try:
            return self._fill(flags, everything, routes, wanted, before)
        except BaseException:
            before.put_back(self.state)
            raise

    def _complete(self, wanted: dict[Found, Wanted], routes: dict[Found, Route]) -> set[Found]:
        """Creates the states that are missing; returns the parameters that had none before."""
        kept = {
            found: self.state[found.param]
            for found, of in wanted.items()
            if of.names or self._counts(found)
        }
        with torch.no_grad():
            return states.complete(
                kept, wanted, routes, step_device=self._step_device, gather=self._gather
            )

    def _fill(
        self,
        flags: list[int],
        everything: list[Found],
        routes: dict[Found, Route],
        wanted: dict[Found, Wanted],
        before: states.Before,
    ) -> Table:
        """Completes the states and makes the table of them."""
        firsts = self._complete(wanted, routes)
        plan = self._make_plan(self.rule)
        plan.begin(flags)
        others: list[Other] = []
        rows = 0
        cleared: dict[flat.FlatBuffer, int] = {}
        masters: list[tuple[torch.Tensor, torch.Tensor]] = []
        written: dict[int, torch.Tensor] = {}  # one of each storage stands for all its views
        for found in everything:
            way, of = routes.get(found), wanted.get(found, Wanted((), (), ()))
            counts = self._counts(found)
            state = self.state[found.param] if of.names or (counts and way) else {}
            if extras.MASTER in of.names:
                masters.append((local_of(found.param), local_of(state[extras.MASTER])))
            if way is not Route.KERNEL:
                plan.add_other(found.group, found.param, way is None)
                if way is not None:
                    others.append(Other(found, way, of, found in firsts))
                continue
            step = state["step"] if counts else None
            first_step = None if self.counts_steps else found in firsts
            buffer = flat.clearing_buffer(found.param)
            if buffer:
                cleared[buffer] = cleared.get(buffer, 0) + 1
            tensors = [state[name] for name in of.names]
            grad = found.param.grad if buffer else None
            rows += 1
            first = found.first % 2**32
            plan.add(found.group, found.param, first, tensors, step, first_step, grad)
            for tensor in [*tensors, *([] if step is None else [step])]:
                written[local_of(tensor).untyped_storage().data_ptr()] = local_of(tensor)
        plan.end(self.state)
        devices = plan.devices()
        gpus = [device for device in devices if device >= 0]
        self._table = Table(
            plan,
            flags,
            others,
            before,
            list(written.values()),
            masters,
            cleared,
            rows,
            gpus,
            only_gpus=bool(devices) and gpus == devices and not others,
            is_double=any(found.param.dtype == torch.float64 for found in everything),
            params=[found.param for found in everything],
            norms=sharding.norms_of([found.param for found in everything]),
        )
        return self._table

    def _wanted(self, found: Found, flags: int) -> Wanted:
        """The states that a parameter's variant uses, and their dtypes."""
        group, param = self.param_groups[found.group], found.param
        rule = VARIANTS[self.rule][flags & extras.RULE_FLAGS]
        names = (*rule, *extras.names(group))
        usual = states.dtype_of(self.state.get(param, {}), found, rule)
        dtypes = tuple(extras.dtype_of(name, group, param) or usual for name in names)
        always = (*(("step",) if self.counts_steps else ()), *VARIANTS[self.rule][0])
        return Wanted(rule, names, dtypes, always)
