"""The way of a step: from what the groups ask for to the plan's one call, and what is left over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flatstep import flat, reference
from flatstep._torch import connect_dtensor, increment_version
from flatstep.optim import clipping, extras, gpu, sharding, torch_ops
from flatstep.optim.finding import Finding
from flatstep.optim.routes import Route, grad_of, local_of, update_alone
from flatstep.optim.rules import RULES, Variant, flag_bits
from flatstep.optim.table import Other, Table


class Updating(Finding):
    """The part of an optimizer that makes a step of its table."""

    _clipped: clipping.Outcome

    def variant(self, group: dict[str, Any]) -> Variant:
        """The variant of the rule that a group's options ask for."""
        raise NotImplementedError

    def _update(self) -> None:
        """Makes a step. One that fails, or is left out, leaves the states as they were."""
        groups = self.param_groups
        variants = [self.variant(group) for group in groups]
        flags = [variant.flags for variant in variants]
        clipped = None
        asks = any(map(extras.are_in, groups))  # for more than torch's update
        if asks:
            unscales = getattr(self, "grad_scale", None) is not None
            bits = [extras.bits(group, unscales=unscales) for group in groups]
            flags = [rule | beside for rule, beside in zip(flags, bits, strict=True)]
            clipped = clipping.asked(groups)
        is_made = False
        try:
            table = self._matching_table(flags, clipped)
            is_made = self._update_all(table, variants, clipped, asks=asks)
        finally:
            if not is_made:
                self._take_back()

    def _matching_table(self, flags: list[int], clipped: clipping.Asked | None) -> Table:
        """The table, made anew where it is not true of the live objects."""
        groups, table = self.param_groups, self._table
        if (
            table is not None
            and table.plan.matches(groups, self.state, flags)
            and not (table.others and self._others_moved(table))
        ):
            return table
        if clipped is not None and clipped.clips:
            self._clipped.warn_of_trainer(self)
        table = self._build(flags)
        if not table.plan.matches(groups, self.state, flags):
            raise RuntimeError("the parameters changed while step() was looking at them")
        return table

    def _update_all(
        self,
        table: Table,
        variants: Sequence[Variant],
        clipped: clipping.Asked | None,
        *,
        asks: bool,
    ) -> bool:
        """Updates every parameter with a gradient, unless the step is to be left out.

        Args:
            table: Whose plan has just matched.
            variants: Of each group.
            clipped: What is to be done about the norm.
            asks: Whether any group has an option that torch does not have.

        Returns:
            Whether it did.
        """
        groups, plan = self.param_groups, table.plan
        deferred = table.only_gpus and self._leaves_all_there(table, clipped)
        if table.gpus and not deferred and not self._may_wait(clipped):
            return False
        grad_scale = None if deferred else getattr(self, "grad_scale", None)
        unscale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
        scales = [-unscale if group["maximize"] else unscale for group in groups]
        if clipped is not None and not deferred:
            norm = self._norm(table, clipped, unscale)
            if norm is None:
                return False
            factors = [clipping.factor(group, norm) for group in groups]
            scales = [scale * factor for scale, factor in zip(scales, factors, strict=True)]
        hyper = [
            [0.0] * len(values)
            if group["differentiable"]
            else gpu.numbers(values, deferred=deferred)
            for group, (_, values) in zip(groups, variants, strict=True)
        ]
        reader = None  # holds what the addresses belong to
        if table.gpus:
            reader = self._read_there(table, variants, clipped, deferred=deferred)
        updated = plan.updated()
        beside: list[tuple[float, float, int, float]] = []
        if asks:
            beside = self._prepare_extras(table, updated, unscale)
        # Before, not after: now torch's objects are in the caches.
        increment_version(updated + table.written)
        inputs: Any = {} if reader is None else reader.inputs
        plan.step(hyper, scales, torch.get_num_threads(), inputs, beside)
        if table.before is not None:
            table.before, self._gather = None, False
        if table.cleared:
            is_known = not deferred or not self._may_be_left_out_there(clipped)
            self._note_cleared(table, updated, is_known=is_known)
        if table.others:
            self._update_others(table, variants, scales, unscale)
        if asks:
            table.note_masters()
        return True

    def _take_back(self) -> None:
        """Lets go of the gradients, and of what was made for a step that was then not made."""
        table = self._table
        if table is None:
            return
        table.plan.release()
        if table.before is not None and not table.plan.has_stepped:
            self._table = None
            table.before.put_back(self.state)

    # ---- what a GPU reads where it is

    def _leaves_all_there(self, table: Table, clipped: clipping.Asked | None) -> bool:
        """Whether nobody has to wait for what the GPUs know."""
        if not self.counts_steps and getattr(self, "found_inf", None) is not None:
            return False
        if clipped is None:
            return True
        counted_there = self.counts_steps and all(
            group.get("capturable") or group.get("fused") for group in self.param_groups
        )
        may_skip = not clipped.skips or counted_there
        return table.one_gpu is not None and not clipped.raises and may_skip

    def _may_wait(self, clipped: clipping.Asked | None) -> bool:
        """Whether a step for which the host waits is to be made: GradScaler found no overflow.

        Raises:
            RuntimeError: The work goes into a graph, and cannot be waited for.
        """
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf):
            return False
        if clipped is not None and gpu.is_being_captured():
            raise RuntimeError(
                "a graph is being captured, but the host would have to wait for the norm of "
                "the gradients: leave out error_if_nonfinite, have all parameters on one GPU, "
                "and with skip_nonfinite let capturable=True count the steps there"
            )
        return True

    def _may_be_left_out_there(self, clipped: clipping.Asked | None) -> bool:
        """Whether only the GPUs know if a step is made that is left to them."""
        skips = clipped is not None and clipped.skips
        return skips or getattr(self, "found_inf", None) is not None

    def _read_there(
        self,
        table: Table,
        variants: Sequence[Variant],
        clipped: clipping.Asked | None,
        *,
        deferred: bool,
    ) -> gpu.Reader:
        """What the GPUs read, the norm among it; that is under way when this returns."""
        norm = None
        if clipped is not None and deferred:
            norm = self._clipped.on(table.gpus[0])
        reader = gpu.Reader(
            table.gpus,
            [values for _, values in variants],
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            deferred=deferred,
            norm=norm,
            skips=clipped is not None and clipped.skips,
        )
        if clipped is not None and norm is not None:
            inputs = reader.inputs[norm.gpu]
            self._clipped.leave_there(table.plan, clipped, inputs, norm, table.is_double)
        return reader

    # ---- what is beside torch's update

    def _norm(self, table: Table, clipped: clipping.Asked, unscale: float) -> float | None:
        """The gradients' norm, or None where the step is to be left out for it."""
        total = self._clipped.take_ahead(clipped.largest)
        if total is None:
            total = table.total(clipped.largest, self._clipped)
        elif isinstance(total, gpu.Norm):
            total = total.total
        norm = reference.norm_of(total, clipped.norm_type, unscale)
        return norm if self._clipped.judge(norm, clipped, table.is_double) else None

    def _prepare_extras(
        self, table: Table, updated: Sequence[torch.Tensor], unscale: float
    ) -> list[tuple[float, float, int, float]]:
        """Each group's numbers; makes masters and versions ready for the update."""
        table.follow_masters()
        if any(variant & extras.WRITES_GRAD for variant in table.flags):
            increment_version([grad_of(param) for param in updated])
        return [
            (*extras.numbers(group, unscale), clipping.most_of(group))
            for group in self.param_groups
        ]

    def _note_cleared(
        self, table: Table, updated: Sequence[torch.Tensor], *, is_known: bool
    ) -> None:
        """Tells flat buffers of their gradients that are zero now, as far as the host knows."""
        has_all = is_known and len(updated) == table.rows
        for buffer, count in table.cleared.items():
            buffer.mark_cleared(count if has_all else 0)

    def check_gradients(self) -> torch.Tensor | None:
        """Whether a gradient is not finite, as 1 or 0, in one pass that only reads.

        Where gradients are clipped, the pass is the one that the next step needs, and is not made
        again. For :class:`flatstep.GradScaler`, directly before a step.

        Returns:
            A 0-dim float32 tensor, where the gradients are; None where torch is to find out, as on
            several GPUs.
        """
        clipped = clipping.asked(self.param_groups)
        largest = clipped is None or clipped.largest
        table, total = self._table, None
        self._clipped.ahead = None
        if table is not None and table.plan.matches(self.param_groups, self.state, table.flags):
            if table.one_gpu is not None:
                norm = self._clipped.on(table.one_gpu)
                overflow = torch.empty((), dtype=torch.float32, device=norm.found.device)
                norm.add_up(table.plan, largest=largest, overflow=overflow)
                table.plan.release()
                if clipped is not None:
                    self._clipped.ahead = (norm, largest)
                return overflow
            if not table.gpus:
                total = table.total(largest, self._clipped)
            table.plan.release()
        elif not self.is_on_gpu():
            connect_dtensor()
            total = sharding.total([found.param for found in self._find()], largest)
        if total is None:
            return None
        if clipped is not None:
            self._clipped.ahead = (total, largest)
        return torch.tensor(0.0 if math.isfinite(total) else 1.0)

    def is_on_gpu(self) -> bool:
        """Whether any parameter is on a GPU."""
        return any(found.param.device.type == "cuda" for found in self._find())

    # ---- what the plan's one call does not update

    def _update_others(
        self, table: Table, variants: Sequence[Variant], scales: Sequence[float], unscale: float
    ) -> None:
        for other in table.others:
            param, index = other.found.param, other.found.group
            if param.grad is None:
                continue
            variant = Variant(table.flags[index], variants[index].hyper)
            self._update_other(other, variant, scales[index], unscale)
            if flat.clearing_buffer(param):
                param.grad.zero_()

    def _update_other(self, other: Other, variant: Variant, scale: float, unscale: float) -> None:
        found, param = other.found, other.found.param
        group = self.param_groups[found.group]
        counts = self._counts(found)
        state = self.state[param] if other.states.names or counts else {}
        count = int(state["step"]) + 1 if counts else 1
        differentiable = group["differentiable"]
        if not differentiable:
            variant = variant._replace(hyper=[float(value) for value in variant.hyper])
        with torch.set_grad_enabled(differentiable):
            if other.route is Route.ALONE:
                numbers = extras.numbers(group, unscale)
                self._update_alone(other, variant, state, scale, count, numbers)
            else:
                self._update_by_torch(other, variant, state, scale, count)
        with torch.no_grad():
            if variant.flags & extras.WRITES_GRAD:
                grad_of(param).mul_(unscale)
            if counts:
                state["step"].add_(1)
        other.first_step = False

    def _step_of(self, other: Other, count: int) -> int:
        """The number of the step, as the rule sees it."""
        return count if self.counts_steps else 2 - other.first_step

    def _update_alone(
        self,
        other: Other,
        variant: Variant,
        state: Mapping[str, Any],
        scale: float,
        count: int,
        numbers: tuple[float, float, int],
    ) -> None:
        """Updates one parameter by a call of the kernel of its own."""
        param, names = other.found.param, other.states.names
        rule_states = [state[name] for name in other.states.rule]
        kept = {place: state[name] for name, place in extras.PLACES.items() if name in names}
        _, decay, seed = numbers
        update_alone(
            self.rule,
            variant.flags & ~extras.WRITES_GRAD,
            variant.hyper,
            local_of(param),
            local_of(grad_of(param)),
            [local_of(tensor) for tensor in rule_states],
            self._step_of(other, count),
            scale,
            beside={place: local_of(tensor) for place, tensor in kept.items()},
            average_decay=decay,
            seed=seed,
            count_of_step=count,
            first=other.found.first % 2**32,
        )
        increment_version([param, *rule_states, *kept.values()])

    def _update_by_torch(
        self, other: Other, variant: Variant, state: Mapping[str, Any], scale: float, count: int
    ) -> None:
        """Updates one parameter by torch's operations."""
        param, grad = other.found.param, grad_of(other.found.param)
        hyper = dict(zip(RULES[self.rule]["hyper"], variant.hyper, strict=True))
        flags = {name: bool(variant.flags & bit) for name, bit in flag_bits(self.rule).items()}
        if other.route is Route.SPARSE:
            torch_ops.update_sparse(hyper, flags, param, grad, self.state, scale)
            return
        states = {name: state[name] for name in other.states.rule}
        step = self._step_of(other, count)
        torch_ops.update(self.rule, flags, hyper, param, grad, states, step, scale)
