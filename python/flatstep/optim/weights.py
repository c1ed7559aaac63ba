"""The weights behind an optimizer's parameters: masters and averages, out and in again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from flatstep.optim import extras
from flatstep.optim.extras import AVERAGE, MASTER, MASTER_LOW
from flatstep.optim.routes import as_placed, local_of


def split(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 values as bfloat16 and int16, as :func:`flatstep.reference.split` does."""
    local = local_of(weight)
    bits = torch.where(local.isnan(), 0x7FC00000, local.view(torch.int32))
    bits = bits - ((bits & 0x1FFFF) == 0x8000).int()
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return as_placed(high, weight), as_placed(bits.to(torch.int16), weight)


def join(param: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The float32 values that :func:`split` made two of."""
    high, rest = (local_of(x).detach().view(torch.int16).int() for x in (param, low))
    return as_placed(((high << 16) + rest).view(torch.float32), param)


def reconcile(masters: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Makes masters follow parameters that something else has written, such as a checkpoint."""
    with torch.no_grad():
        for param, master in masters:
            written = master.to(param.dtype) != param
            if written.any():
                master.copy_(torch.where(written, param.float(), master))


class Weights:
    """What an optimizer offers to get at its masters and averages."""

    param_groups: list[dict[str, Any]]
    state: Any

    def master_parameters(self) -> Iterator[torch.Tensor]:
        """The weights in float32 (float64 for float64), one tensor a parameter, in order.

        A parameter that is its own master comes as it is, a float32 copy as the state's own tensor,
        a split one put together: to write any of them, use :meth:`load_master_parameters`.
        """
        for group in self.param_groups:
            for param in group["params"]:
                yield self._master(param)

    def load_master_parameters(self, masters: Iterable[torch.Tensor]) -> None:
        """Takes over weights in the order of :meth:`master_parameters`, and sets the parameters.

        Raises:
            ValueError: There are more or fewer, or one has another shape.
        """
        params = [(group, param) for group in self.param_groups for param in group["params"]]
        given = list(masters)
        if len(given) != len(params):
            raise ValueError(
                f"there are {len(params)} parameters, but {len(given)} masters; pass one for each"
            )
        for place, ((_, param), master) in enumerate(zip(params, given, strict=True)):
            if master.shape != param.shape:
                raise ValueError(
                    f"master {place} has shape {tuple(master.shape)}, but its parameter has "
                    f"{tuple(param.shape)}; pass masters in the order of master_parameters()"
                )
        for (group, param), master in zip(params, given, strict=True):
            self._set_master(group, param, master)

    def master_state_dict(self, module: torch.nn.Module) -> dict[str, Any]:
        """The module's state_dict with the weights in float32 in place of 16-bit parameters.

        Args:
            module: The module whose parameters this optimizer updates.
        """
        known = {id(param) for group in self.param_groups for param in group["params"]}
        found: dict[str, Any] = module.state_dict()
        for name, param in module.named_parameters(remove_duplicate=False):
            if id(param) in known and name in found:
                found[name] = self._master(param).detach().clone()
        return found

    def load_master_state_dict(
        self, module: torch.nn.Module, state_dict: Mapping[str, Any], strict: bool = True
    ) -> Any:
        """Loads what :meth:`master_state_dict` gave into the module and the masters.

        Args:
            module: The module whose parameters this optimizer updates.
            state_dict: Its weights, in float32 or less.
            strict: As in :meth:`torch.nn.Module.load_state_dict`.

        Returns:
            What the module's ``load_state_dict`` returned.
        """
        result = module.load_state_dict(state_dict, strict=strict)
        groups = {id(param): group for group in self.param_groups for param in group["params"]}
        for name, param in module.named_parameters():
            if id(param) in groups and name in state_dict:
                self._set_master(groups[id(param)], param, state_dict[name])
        return result

    def _master(self, param: torch.Tensor) -> torch.Tensor:
        state = self.state.get(param, {})
        if state.get(MASTER) is not None:
            master: torch.Tensor = state[MASTER]
            return master
        if state.get(MASTER_LOW) is not None:
            return join(param, state[MASTER_LOW])
        return param if param.dtype == extras.average_dtype(param) else param.detach().float()

    @torch.no_grad()
    def _set_master(
        self, group: Mapping[str, Any], param: torch.Tensor, master: torch.Tensor
    ) -> None:
        wide = master.detach().to(param.device, extras.average_dtype(param))
        kind = extras.option(group, "master")
        if kind == "split":
            high, low = split(wide)
            param.copy_(high)
            self._put(param, MASTER_LOW, low)
            return
        param.copy_(wide)
        if kind == "float32":
            self._put(param, MASTER, wide)

    def _put(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        state = self.state[param]
        if state.get(name) is None:
            state[name] = value.clone()
        else:
            state[name].copy_(value)

    def _averages(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = []
        for group in self.param_groups:
            if extras.option(group, "ema_decay") is None:
                continue
            for param in group["params"]:
                average = self.state.get(param, {}).get(AVERAGE)
                # One that has never been updated is its own average.
                if average is not None:
                    found.append((param, average))
        if not found:
            raise RuntimeError(
                "there are no averages: construct the optimizer with ema_decay=..., and step at "
                "least once"
            )
        return found

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """The parameters are the averages of the weights inside, and themselves again after it.

        Takes as much memory as the parameters, for as long as it lasts. What is written to the
        parameters inside is lost; do not step there.

        Raises:
            RuntimeError: There are no averages.
        """
        averages = self._averages()
        kept = [param.detach().clone() for param, _ in averages]
        try:
            with torch.no_grad():
                for param, average in averages:
                    param.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for (param, _), own in zip(averages, kept, strict=True):
                    param.copy_(own)

    @torch.no_grad()
    def copy_average_to(self, module: torch.nn.Module) -> None:
        """Copies the averages into another module, such as a deepcopy of the model.

        Parameters are matched by name where this optimizer was given names, else by their order in
        the optimizer and in ``module.parameters()``. One without an average is copied as it is.

        Raises:
            RuntimeError: There are no averages.
            ValueError: The module has other parameters.
        """
        averages = {id(param): average for param, average in self._averages()}
        own = [param for group in self.param_groups for param in group["params"]]
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        if len(names) == len(own):
            by_name = dict(module.named_parameters())
            missing = [name for name in names if name not in by_name]
            if missing:
                raise ValueError(f"the module has no parameter '{missing[0]}'")
            targets = [by_name[name] for name in names]
        else:
            targets = list(module.parameters())
        if [tuple(x.shape) for x in targets] != [tuple(x.shape) for x in own]:
            raise ValueError(
                "the module's parameters are not those of this optimizer, in its order; construct "
                "it with model.named_parameters() to match them by name"
            )
        for target, param in zip(targets, own, strict=True):
            target.copy_(averages.get(id(param), param))
